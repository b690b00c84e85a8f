"""Runs that start from the parameters of another checkpoint: of m3jax, converted, or in the released layout."""

import json
import shutil

import jax
import numpy as np
import pytest

from m3jax.data import load_tokenizer
from m3jax.errors import CheckpointError
from m3jax.interop import mamba_ssm
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpoint, load_checkpoint, save_parameters
from m3jax.training.initial import find_initial
from m3jax.training.loop import train
from m3jax.training.sharding import make_mesh, state_shardings, with_shardings
from m3jax.training.step import init_params, init_state
from tests.training.conftest import SmallModel, use_small_model

BYTES = load_tokenizer("bytes")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module")
def source(small_config, tmp_path_factory):
    """The workdir of a run of SmallModel."""
    workdir = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        use_small_model(patch)
        train(small_config({"train.stop_at": 5, "train.ema_decay": 0.5}), workdir)
    return workdir


def released(small_config, directory, **edits):
    """Writes random parameters in the released layout; returns them."""
    config = small_config()
    params = jax.jit(lambda: init_params(config, LanguageModel(config.model)))()
    mamba_ssm.write(directory, config.model, params)
    values = json.loads((directory / "config.json").read_text())
    values["ssm_cfg"] |= edits
    (directory / "config.json").write_text(json.dumps(values))
    return params


def abstract_params(config, model):
    abstract = jax.eval_shape(lambda: init_state(config, model))
    return with_shardings(abstract, state_shardings(abstract, make_mesh(config))).params


def test_a_run_starts_there_and_continues_alone(small_config, source, small_model, tmp_path, capsys):
    # One step so small that it changes nothing: the parameters and their average are those of the source.
    changes = {"train.init_from": str(source), "optimizer.learning_rate": 1e-30, "train.ema_decay": 0.5}
    changes |= {"optimizer.final_learning_rate": 0.0, "train.stop_at": 1}
    train(small_config(changes), tmp_path / "run")
    assert f"starts with the parameters of {source}/checkpoints/5" in capsys.readouterr().out
    expected = load_checkpoint(source).params
    assert_same(load_checkpoint(tmp_path / "run").params, expected)
    assert_same(load_checkpoint(tmp_path / "run", ema=True).params, expected)

    # The loss of the first step is that of these parameters, of later ones lower: the optimizer starts anew, and works.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["loss"]
    started_at = json.loads((source / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < started_at - 0.01

    # To continue, the source is not needed, whatever the key says.
    assert train(small_config(changes | {"train.init_from": "/gone", "train.stop_at": 2}), tmp_path / "run").step == 2
    assert "starts with" not in capsys.readouterr().out


def test_one_checkpoint_of_a_workdir_into_another_dtype_and_mesh(small_config, source, small_model):
    changes = {"model.param_dtype": "bfloat16", "mesh.fsdp": 4, "mesh.data": 2, "model.remat": "full"}
    config = small_config(changes | {"train.init_from": str(source / "checkpoints" / "5")})
    abstract = abstract_params(config, SmallModel(config.model))
    params = find_initial(config, BYTES).read(abstract)
    assert jax.tree.map(lambda a: (a.dtype, a.sharding), params) == jax.tree.map(
        lambda a: (a.dtype, a.sharding), abstract
    )
    assert params["embedding"].dtype == "bfloat16"
    stored = load_checkpoint(source).params
    assert_same(params, jax.tree.map(lambda stored, new: stored.astype(new.dtype), stored, params))


@pytest.mark.parametrize("layout", ["released", "converted"])
def test_released_and_converted(small_config, tmp_path, layout):
    params = released(small_config, tmp_path / "there")
    if layout == "converted":
        config = small_config()
        save_parameters(tmp_path / "ours", Checkpoint(tmp_path, 0, config, params, BYTES))
    path = tmp_path / ("there" if layout == "released" else "ours")
    config = small_config({"train.init_from": str(path), "mesh.fsdp": 8, "model.dt_min": 1e-2})
    abstract = abstract_params(config, LanguageModel(config.model))
    found = find_initial(config, BYTES).read(abstract)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, abstract)
    assert_same(found, params)


def test_activation_that_a_released_checkpoint_does_not_say(small_config, tmp_path):
    released(small_config, tmp_path / "silent")
    config = {"model.a_activation": "softplus", "train.init_from": str(tmp_path / "silent")}
    assert find_initial(small_config(config), BYTES).path == tmp_path / "silent"
    released(small_config, tmp_path / "says", a_activation="softplus")
    with pytest.raises(CheckpointError, match=r"config.model.a_activation = 'heavy_tail': .*=softplus"):
        find_initial(small_config({"train.init_from": str(tmp_path / "says")}), BYTES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.d_model": 64, "model.rope_fraction": 1.0},
            r"config\.model\.d_model = 64, config\.model\.rope_fraction = 1\.0: the model in .*checkpoints/5, .*"
            r"Set --config\.model\.d_model=32, --config\.model\.rope_fraction=0\.5",
        ),
        ({"model.mixers": "mamba2"}, r"config\.model\.mixers = 'mamba2': .*--config\.model\.mixers=mamba3"),
        ({"train.init_from": "/nowhere"}, "/nowhere does not exist"),
        ({"train.init_from": "."}, "no checkpoints"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    small_config, source, small_model, tmp_path, changes, message
):
    with pytest.raises(CheckpointError, match=message):
        train(small_config({"train.init_from": str(source)} | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer(small_config, source, small_model):
    other = type("Other", (), {"name": "other.json", "id": "sha256:0"})
    with pytest.raises(CheckpointError, match=r"config\.data\.tokenizer = 'other\.json': .*another tokenizer"):
        find_initial(small_config({"train.init_from": str(source)}), other)


def test_damaged_parameters(small_config, source, small_model, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    damaged = next((tmp_path / "copy/checkpoints/5/params/d").iterdir())
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{damaged.name} does not have the SHA-256"):
        train(small_config({"train.init_from": str(tmp_path / "copy")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
