"""Writing the released layout: every number comes back, from every variant, and a tensor at a time is copied."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from m3jax.errors import CheckpointError, ConfigError
from m3jax.interop import mamba_ssm
from tests.interop.conftest import assert_same, random_model

_GOLDEN = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize("name", ["A_siso", "B_mimo"])
def test_golden_models_are_written_as_they_were_read(name, tmp_path):
    config, params = mamba_ssm.load(_GOLDEN / name)
    mamba_ssm.write(tmp_path / "copy", config.model, params)
    original, written = (load_file(path / "model.safetensors") for path in (_GOLDEN / name, tmp_path / "copy"))
    assert sorted(written) == sorted(original)
    for tensor_name, tensor in original.items():
        np.testing.assert_array_equal(written[tensor_name], tensor, err_msg=tensor_name, strict=True)
    again, params_again = mamba_ssm.load(tmp_path / "copy")
    assert again == config
    assert_same(params_again, params)
    # The fields with another value are those that say how, not what, the authors' code computes.
    before, after = (json.loads((path / "config.json").read_text()) for path in (_GOLDEN / name, tmp_path / "copy"))
    mixer_before, mixer_after = before.pop("ssm_cfg"), after.pop("ssm_cfg")
    assert before | {"fused_add_norm": True} == after
    assert mixer_before | {"chunk_size": mixer_after["chunk_size"]} == {key: mixer_after[key] for key in mixer_before}


@pytest.mark.parametrize(
    "changes",
    [
        {"param_dtype": "bfloat16", "rope_fraction": 1.0, "a_floor": 1e-3},
        {"outproj_norm": True, "ngroups": 2, "mimo_rank": 2, "tie_embeddings": False, "pad_vocab_multiple": 16},
        {"d_intermediate": 0, "a_activation": "softplus", "dt_max": 0.2, "expand": 3, "headdim": 12},
        {"mixers": "mamba2", "d_conv": 3, "d_intermediate": 0, "pad_vocab_multiple": 16, "param_dtype": "bfloat16"},
        {"mixers": "mamba2", "tie_embeddings": False},
        {"mixers": "mamba3,attention,mamba3", "rope_theta": 0.0, "outproj_norm": True, "param_dtype": "bfloat16"},
        {
            "mixers": "attention,mamba2",
            "n_layers": 4,
            "attention_heads": 4,
            "attention_kv_heads": 2,
            "attention_headdim": 6,
            "rope_theta": 5e5,
        },
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_variant_comes_back(changes, tmp_path):
    config, params = random_model(**changes)
    mamba_ssm.write(tmp_path / "out", config, params)
    again, params_again = mamba_ssm.load(tmp_path / "out")
    assert again.model == config
    assert_same(params_again, params)


def test_jax_arrays_and_a_pattern_of_one_mixer(tmp_path, siso):
    config, params = siso
    repeated = dataclasses.replace(config, mixers="mamba3,mamba3,mamba3")
    layers = {str(i): jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i : i + 1]), params["layers"]) for i in range(3)}
    mamba_ssm.write(tmp_path / "out", repeated, params | {"layers": layers})
    assert_same(mamba_ssm.load(tmp_path / "out")[1], params)


def test_large_models_are_divided_over_files(tmp_path, siso):
    config, params = siso
    mamba_ssm.write(tmp_path / "out", config, params, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    n = len(files)
    assert n > 2 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    contents = {file: load_file(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in contents.values()]
    assert sum(sizes) == index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all(size <= 20_000 or len(contents[file]) == 1 for file, size in zip(files, sizes, strict=True))
    assert_same(mamba_ssm.load(tmp_path / "out")[1], params)


def test_mixed_dtypes_are_kept_and_aligned(tmp_path):
    config, params = random_model(headdim=32)  # one head, so that a layer's dt_bias has two bytes
    mixer = params["layers"]["mixer"]
    mixer["dt_bias"] = mixer["dt_bias"].astype(ml_dtypes.bfloat16)
    mamba_ssm.write(tmp_path / "out", config, params)
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    np.testing.assert_array_equal(stored["backbone.layers.0.mixer.dt_bias"], mixer["dt_bias"][0], strict=True)
    np.testing.assert_array_equal(stored["backbone.embedding.weight"], params["embedding"], strict=True)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in stored.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": "standard"}, "rotation = 'standard': the released code has only rotation = 'data'"),
        ({"fixed_lambda": 1.0}, "fixed_lambda = 1.0: the released code has only fixed_lambda = None"),
        ({"bc_bias": False}, "bc_bias = False: the released code has only bc_bias = True"),
        ({"rope_fraction": 0.0}, "rope_fraction = 0.0: the released code has only 0.5 and 1"),
        ({"mixers": "mamba2", "ngroups": 2}, "ngroups = 2: the released code has only ngroups = 1 for mamba2"),
        ({"mixers": "mamba3,mamba2,attention"}, "mixers = 'mamba3,mamba2,attention': .* all alike but for layers of"),
        ({"mixers": "attention"}, "mixers = 'attention'"),
        ({"mixers": "gated_deltanet"}, "mixers = 'gated_deltanet'"),
    ],
)
def test_what_the_released_code_has_not_is_refused(changes, message, tmp_path, siso):
    config = dataclasses.replace(siso[0], **changes)
    with pytest.raises(ConfigError, match=rf"config\.model\.{message}"):
        mamba_ssm.write(tmp_path / "out", config, {})
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_model_are_listed(tmp_path, siso):
    config, params = siso
    wrong = {name: leaf for name, leaf in params.items() if name != "norm"} | {"head": params["embedding"]}
    with pytest.raises(CheckpointError) as error:
        mamba_ssm.write(tmp_path / "out", dataclasses.replace(config, vocab_size=300), wrong)
    assert str(error.value).splitlines()[1:] == [
        "  missing: norm/scale (16,)",
        "  unexpected: head (264, 16)",
        "  shape of embedding: (264, 16), expected (304, 16)",
    ]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, siso, monkeypatch):
    config, params = siso
    mamba_ssm.write(tmp_path / "out", config, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        mamba_ssm.write(tmp_path / "out", config, jax.tree.map(np.zeros_like, params))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before

    class Unreadable:
        def __init__(self, leaf):
            self.shape, self.dtype = leaf.shape, leaf.dtype

        def __array__(self, *_, **__):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        mamba_ssm.write(tmp_path / "new", config, params | {"norm": {"scale": Unreadable(params["norm"]["scale"])}})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_tensor_at_a_time_is_copied(tmp_path):
    config, params = random_model(d_model=128, n_layers=8, d_intermediate=256, headdim=32, d_state=32)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params)) / config.n_layers
    tracemalloc.start()
    try:
        mamba_ssm.write(tmp_path / "out", config, params, shard_bytes=total // 3)
        written, _ = tracemalloc.get_traced_memory()[1], tracemalloc.reset_peak()
        _, again = mamba_ssm.load(tmp_path / "out")
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The tensor transposed and in its file's order; headers, lists and the index are what is left.
    assert written < 3 * largest + 0.05 * total, f"{written} bytes to write {total}"
    assert read < total + 3 * largest + 0.05 * total, f"{read} bytes to read {total}"
    assert_same(again, params)
