"""Reading released checkpoints: what does not fit is listed. (Correct values: tests/models/test_golden.py.)"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m3jax.errors import CheckpointError
from m3jax.interop import mamba_ssm
from m3jax.models.language_model import LanguageModel
from tests.tolerances import assert_close, rounding

_SISO = Path(__file__).parents[1] / "reference" / "A_siso"


@pytest.fixture
def copy(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(_SISO / name, tmp_path / name)
    return tmp_path


def _edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_all_problems_are_listed(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["backbone.layers.1.mixer.D"]
    tensors["backbone.layers.0.mixer.dt_bias"] = np.zeros(9, np.float32)
    tensors["backbone.layers.0.mixer.conv1d.weight"] = np.zeros(3, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        mamba_ssm.load(copy)
    message = str(error.value)
    assert "missing: backbone.layers.1.mixer.D (8,)" in message
    assert "unexpected: backbone.layers.0.mixer.conv1d.weight (3,)" in message
    assert "shape of backbone.layers.0.mixer.dt_bias: (9,), expected (8,)" in message


@pytest.mark.parametrize(("changes", "message"), [
    ({"ssm_cfg": {"layer": "Mamba2"}}, "unsupported layer"),
    ({"attn_layer_idx": [1]}, "unsupported attn_layer_idx"),
])  # fmt: skip
def test_other_models_are_refused(copy, changes, message):
    _edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        mamba_ssm.load(copy)


def test_missing_field(copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    del config["d_model"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no field 'd_model'"):
        mamba_ssm.load(copy)


def test_truncated_file(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="Cannot read the checkpoint"):
        mamba_ssm.load(copy)


def test_untied_head(copy):
    _edit_config(copy, tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        mamba_ssm.load(copy)
    tensors = load_file(copy / "model.safetensors")
    head = np.random.default_rng(0).normal(size=tensors["backbone.embedding.weight"].shape).astype(np.float32)
    save_file(tensors | {"lm_head.weight": head}, copy / "model.safetensors")
    config, params = mamba_ssm.load(copy)
    np.testing.assert_array_equal(params["head"], head)
    tokens = np.arange(10)[None]
    model = LanguageModel(config)
    hidden = model.apply({"params": params}, tokens, method="hidden")
    logits = model.apply({"params": params}, tokens)
    assert_close(logits, hidden @ head.T, rounding("float32", config.d_model), "logits")


def test_config_of_the_released_model():
    config, params = mamba_ssm.load(_SISO)
    assert (config.d_model, config.n_heads, config.mimo_rank, config.dtype) == (64, 8, 1, "float32")
    assert params["layers"]["mixer"]["in_proj"]["kernel"].shape == (2, 64, 352)
