"""python -m m3jax.convert in both directions, and what the other programs make of its copies."""

import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

import m3jax
from m3jax import evaluate
from m3jax.config import build_config
from m3jax.convert import main
from m3jax.data.tokenizer import ByteTokenizer, load_tokenizer
from m3jax.errors import CheckpointError, ConfigError
from m3jax.interop import mamba_ssm
from m3jax.training.checkpoint import Checkpoint, Checkpointer, load_checkpoint, save_parameters
from tests.interop.conftest import SIZES, assert_same, random_model

_TINY = {"n_layers": 1, "d_intermediate": 0, "d_state": 4}


@pytest.fixture
def released(tmp_path):
    """A directory in the released layout with a tokenizer.json, and its parameters."""
    config, params = random_model(**_TINY)
    vocabulary = {"In": 0, "the": 1, "beginning": 2, "?": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    mamba_ssm.write(tmp_path / "released", config, params, tokenizer.to_str())
    return tmp_path / "released", params


def test_there_and_back(released, tmp_path, capsys):
    source, params = released
    main(["--from", str(source), "--to", str(tmp_path / "ours"), "--config.model.a_activation=softplus"])
    checkpoint = load_checkpoint(tmp_path / "ours")
    assert checkpoint.config.model.a_activation == "softplus" and checkpoint.step == 0
    assert checkpoint.tokenizer.id == load_tokenizer(str(source)).id
    assert_same(jax.tree.map(np.asarray, checkpoint.params), params)
    assert_same(jax.tree.map(np.asarray, m3jax.load(tmp_path / "ours")[1]), params)

    capsys.readouterr()
    main(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")])
    assert re.search("format mamba_ssm\n.*softplus", capsys.readouterr().out)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert after.pop("ssm_cfg") == before.pop("ssm_cfg") | {"a_activation": "softplus"} and after == before
    assert m3jax.load(tmp_path / "back")[0].config.a_activation == "softplus"
    assert m3jax.load(tmp_path / "back", a_activation="heavy_tail")[0].config.a_activation == "heavy_tail"


def test_narrower_numbers(tmp_path):
    _, params = random_model(**_TINY)
    save_parameters(
        tmp_path / "run", Checkpoint(tmp_path, 7, build_config({"model": SIZES | _TINY}), params, ByteTokenizer())
    )
    main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--config.model.param_dtype=bfloat16"])
    model, narrow = m3jax.load(tmp_path / "out")
    assert model.config.dtype == "bfloat16"
    assert_same(narrow, jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "bfloat16"), params))
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # bytes need none


def test_copies_are_no_runs_to_continue(released, tmp_path):
    main(["--from", str(released[0]), "--to", str(tmp_path / "ours"), "--config.data.tokenizer=bytes"])
    config = load_checkpoint(tmp_path / "ours").config
    assert config.data.tokenizer == "bytes"
    with pytest.raises(CheckpointError, match="was converted and has parameters only: no run continues from it"):
        Checkpointer(tmp_path / "ours", config.checkpoint).read_run(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--to", "{}/released"], CheckpointError, "released exists already, and nothing is ever overwritten"),
        (["--to", "{}/new", "--ema"], CheckpointError, "released is in the released layout, which has no steps"),
        (["--to", "{}/new", "--format", "gguf"], ConfigError, "invalid choice: 'gguf'"),
        (["--to", "{}/new", "--config.model.d_model=32"], CheckpointError, r"shape of .*embedding.*\(264, 16\)"),
        (
            ["--to", "{}/new", "--config.model.vocab_size=257", "--config.data.tokenizer=bytes"],
            ConfigError,
            "vocab_size = 257: expected at least 258",
        ),
        ([], ConfigError, "required: --to"),
    ],
)
def test_bad_input(released, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        main(["--from", str(released[0]), *(argument.format(tmp_path) for argument in arguments)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released"]


def test_tokenizer_is_asked_for(released, tmp_path):
    (released[0] / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json: give .*--config\.data\.tokenizer"):
        main(["--from", str(released[0]), "--to", str(tmp_path / "new")])


_KILLED = """
import os, signal, sys
from m3jax.interop import safetensors_files
write = safetensors_files._write_file
def write_and_die(path, tensors):
    write(path, tensors)
    os.kill(os.getpid(), signal.SIGKILL)
safetensors_files._write_file = write_and_die
from m3jax.convert import main
main(sys.argv[1:])
"""


def test_killed_conversion_leaves_nothing_that_looks_finished(released, tmp_path):
    target = tmp_path / "new"
    arguments = ["--from", str(released[0]), "--to", str(target), "--format", "mamba_ssm"]
    process = subprocess.run([sys.executable, "-c", _KILLED, *arguments], timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.rglob("*") if released[0] not in (path, *path.parents)]
    assert any(path.name == "model.safetensors" for path in left)  # it was killed late
    assert not target.exists() and not any(mamba_ssm.is_released_checkpoint(path) for path in left)
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "released"]


def test_evaluate_tells_the_activation_of_a(tmp_path, capsys):
    changes = {"vocab_size": 258, "a_activation": "softplus"}
    config, params = random_model(**_TINY, **changes)
    mamba_ssm.write(tmp_path / "released", config, params)
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth.")
    flags = [
        "--checkpoint", str(tmp_path / "released"), "--both-a-activations", "--json", str(tmp_path / "out.json"),
        f"--config.data.validation_source={tmp_path}/text.txt", "--config.data.tokenizer=bytes",
        "--config.data.batch_size=1", "--config.data.sequence_length=60",
    ]  # fmt: skip
    evaluate.main(flags)
    result = json.loads((tmp_path / "out.json").read_text())
    losses = {name: values["loss"] for name, values in result["a_activations"].items()}
    assert sorted(losses) == ["heavy_tail", "softplus"] and losses["heavy_tail"] != losses["softplus"]
    best = min(losses, key=losses.get)
    assert result["loss"] == losses[best]
    assert f"lower loss: {best}" in capsys.readouterr().out
