"""Reading released checkpoints: what does not fit is listed. (Correct values: tests/models/test_golden.py.)"""

import json
import shutil
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m3jax.errors import CheckpointError, ConfigError
from m3jax.interop import mamba_ssm, safetensors_files
from m3jax.models.language_model import LanguageModel
from tests.interop.conftest import assert_same
from tests.tolerances import assert_close, rounding

_SISO = Path(__file__).parents[1] / "reference" / "A_siso"
_WEIGHTS = "model.safetensors"
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def copy(tmp_path):
    for name in ("config.json", _WEIGHTS):
        shutil.copy(_SISO / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def sharded(copy):
    """The same tensors in two files, divided in the middle of a layer."""
    tensors = load_file(copy / _WEIGHTS)
    (copy / _WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for file, own in zip(_SHARDS, (names[:11], names[11:]), strict=True):
        save_file({name: tensors[name] for name in own}, copy / file)
        index |= dict.fromkeys(own, file)
    _write_index(copy, index)
    return copy


def _write_index(path: Path, index: dict) -> None:
    (path / f"{_WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _read_index(path: Path) -> dict:
    return json.loads((path / f"{_WEIGHTS}.index.json").read_text())["weight_map"]


def _edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_all_problems_are_listed(copy):
    tensors = load_file(copy / _WEIGHTS)
    del tensors["backbone.layers.1.mixer.D"]
    tensors["backbone.layers.0.mixer.dt_bias"] = np.zeros(9, np.float32)
    tensors["backbone.layers.0.mixer.conv1d.weight"] = np.zeros(3, np.float32)
    save_file(tensors, copy / _WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        mamba_ssm.load(copy)
    assert str(error.value).splitlines()[1:] == [
        "  missing: backbone.layers.1.mixer.D (8,)",
        "  unexpected: backbone.layers.0.mixer.conv1d.weight (3,)",
        "  shape of backbone.layers.0.mixer.dt_bias: (9,), expected (8,)",
    ]


def test_files_of_a_sharded_checkpoint_are_one(sharded):
    assert_same(mamba_ssm.load(sharded)[1], mamba_ssm.load(_SISO)[1])


def test_missing_shard(sharded):
    (sharded / _SHARDS[1]).unlink()
    with pytest.raises(CheckpointError) as error:
        mamba_ssm.load(sharded)
    assert str(error.value).splitlines()[1:] == [f"  missing file: {_SHARDS[1]}, which has 15 tensors"]


def test_index_that_names_a_tensor_twice(sharded):
    file, name = sharded / f"{_WEIGHTS}.index.json", "backbone.norm_f.weight"
    file.write_text(file.read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{_SHARDS[0]}", '))
    with pytest.raises(CheckpointError, match=rf"named twice in model\.safetensors\.index\.json: {name}"):
        mamba_ssm.load(sharded)


def test_index_that_the_files_contradict(sharded):
    index = _read_index(sharded)
    index["backbone.norm_f.weight"] = _SHARDS[0]
    del index["backbone.embedding.weight"]
    _write_index(sharded, index)
    with pytest.raises(CheckpointError) as error:
        mamba_ssm.load(sharded)
    assert str(error.value).splitlines()[1:] == [
        f"  backbone.embedding.weight is in {_SHARDS[0]}, and nowhere by the index",
        f"  backbone.norm_f.weight is in {_SHARDS[1]}, and in {_SHARDS[0]} by the index",
        "  missing: backbone.embedding.weight (256, 64)",
        "  missing: backbone.norm_f.weight (64,)",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_index_that_is_none(sharded, text):
    (sharded / f"{_WEIGHTS}.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"Cannot read .*index\.json"):
        mamba_ssm.load(sharded)


def test_truncated_file(copy, sharded):
    data = (sharded / _SHARDS[0]).read_bytes()
    (sharded / _SHARDS[0]).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"Cannot read .*{_SHARDS[0]}"):
        mamba_ssm.load(sharded)


def test_stored_dtype(copy):
    tensors = load_file(copy / _WEIGHTS)
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(narrow, copy / _WEIGHTS)
    config, params = mamba_ssm.load(copy)
    assert config.model.dtype == config.model.param_dtype == "bfloat16"
    np.testing.assert_array_equal(params["embedding"], narrow["backbone.embedding.weight"], strict=True)
    # What PyTorch keeps of a model made in bfloat16: some parameters are float32 whatever was asked for.
    bias = "backbone.layers.0.mixer.dt_bias"
    save_file(narrow | {bias: tensors[bias]}, copy / _WEIGHTS)
    config, params = mamba_ssm.load(copy)
    assert config.model.dtype == config.model.param_dtype == "float32"
    np.testing.assert_array_equal(params["embedding"], narrow["backbone.embedding.weight"].astype(np.float32))
    np.testing.assert_array_equal(params["layers"]["mixer"]["dt_bias"][0], tensors[bias], strict=True)
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, copy / _WEIGHTS)
    assert mamba_ssm.load(copy)[0].model.param_dtype == "float32"
    save_file(narrow | {bias: tensors[bias].astype(np.int32)}, copy / _WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{bias} is stored as I32, expected one of F64, F32, F16, BF16"):
        mamba_ssm.load(copy)


@pytest.mark.parametrize(("changes", "message"), [
    ({"ssm_cfg": {}}, "ssm_cfg.layer = 'Mamba1', expected Mamba2 or Mamba3"),
    ({"attn_layer_idx": [1], "rms_norm": False}, r"attn_cfg.num_heads = None, expected how many.*rms_norm = False"),
    ({"attn_layer_idx": [1, 2], "attn_cfg": {"num_heads": 4, "causal": True, "qkv_proj_bias": False, "d_conv": 4,
                                             "rotary_emb_dim": 8}},
     r"attn_layer_idx = \[1, 2\], expected layers in \[0, 2\); no attn_cfg.out_proj_bias, expected False; "
     "attn_cfg.d_conv = 4, expected 0; attn_cfg.rotary_emb_dim = 8, expected 0 or the whole head, 16"),
    ({"n_layer": "2"}, "n_layer = '2', expected an integer"),
    ({"ssm_cfg": {"layer": "Mamba2", "ngroups": 2, "rmsnorm": False}}, "ssm_cfg.ngroups = 2.*ssm_cfg.rmsnorm = False"),
])  # fmt: skip
def test_other_models_are_refused(copy, changes, message):
    _edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        mamba_ssm.load(copy)


def test_missing_field(copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    del config["d_model"], config["n_layer"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no field 'd_model', 'n_layer'"):
        mamba_ssm.load(copy)


def test_pickles_are_refused_with_a_way_out(copy):
    (copy / _WEIGHTS).rename(copy / "pytorch_model.bin")
    assert mamba_ssm.is_released_checkpoint(copy)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*\n.*torch\.load\('pytorch_model\.bin'"):
        mamba_ssm.load(copy)


def test_untied_head(copy):
    _edit_config(copy, tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        mamba_ssm.load(copy)
    tensors = load_file(copy / _WEIGHTS)
    head = np.random.default_rng(0).normal(size=tensors["backbone.embedding.weight"].shape).astype(np.float32)
    save_file(tensors | {"lm_head.weight": head}, copy / _WEIGHTS)
    config, params = mamba_ssm.load(copy)
    np.testing.assert_array_equal(params["head"], head)
    tokens = np.arange(10)[None]
    model = LanguageModel(config.model)
    hidden = model.apply({"params": params}, tokens, method="hidden")
    logits = model.apply({"params": params}, tokens)
    assert_close(logits, hidden @ head.T, rounding("float32", config.model.d_model), "logits")


def test_stored_head_of_a_tied_model_is_the_embedding(copy, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_ROWS", 7)
    tensors = load_file(copy / _WEIGHTS)
    embedding = tensors["backbone.embedding.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, copy / _WEIGHTS)
    assert "head" not in mamba_ssm.load(copy)[1]
    other = embedding.copy()
    other[-1, -1] += 1
    for head in (other, embedding[:-1], embedding.astype(np.float16)):
        save_file(tensors | {"lm_head.weight": np.ascontiguousarray(head)}, copy / _WEIGHTS)
        for read in (mamba_ssm.load, partial(mamba_ssm.read_config, a_activation="heavy_tail")):
            with pytest.raises(CheckpointError, match=r"lm_head\.weight and .* differ: set tie_embeddings to false"):
                read(copy)
    save_file(tensors | {"lm_head.weight": other}, copy / _WEIGHTS)
    assert mamba_ssm.load(copy, {"model.tie_embeddings": False})[1]["head"][-1, -1] == other[-1, -1]


def test_config_of_the_released_model():
    config, params = mamba_ssm.load(_SISO)
    model = config.model
    assert (model.d_model, model.n_heads, model.mimo_rank, model.dtype) == (64, 8, 1, "float32")
    assert model.a_activation == "heavy_tail"
    assert params["layers"]["mixer"]["in_proj"]["kernel"].shape == (2, 64, 352)
    assert mamba_ssm.load(_SISO, {"model.a_activation": "softplus"})[0].model.a_activation == "softplus"
    with pytest.raises(ConfigError, match=r"config\.model\.a_activation = 'relu'"):
        mamba_ssm.load(_SISO, {"model.a_activation": "relu"})
