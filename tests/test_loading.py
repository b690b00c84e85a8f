"""The public entrance: m3jax.load takes both kinds of directory and computes in the stored dtype by default."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax.config import build_config
from m3jax.data.tokenizer import ByteTokenizer
from m3jax.errors import CheckpointError
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpointer
from m3jax.training.step import init_state
from tests import tolerances

_RELEASED = Path(__file__).parent / "reference" / "A_siso"
_MODEL = {"vocab_size": 258, "d_model": 16, "n_layers": 1, "d_intermediate": 0, "headdim": 8, "d_state": 8}


def test_released_directory():
    model, params = m3jax.load(_RELEASED)
    arrays = np.load(_RELEASED / "io.npz")
    logits = jax.jit(model.apply)({"params": params}, arrays["input_ids"])
    tolerance = tolerances.golden("float32", 2 * (2 * 64 + 128 + 32))  # as in tests/models/test_golden.py
    tolerances.assert_close(logits, arrays["logits"], tolerance, "logits")
    tokens = m3jax.generate(model, params, arrays["input_ids"], max_new_tokens=8, temperature=0.0)
    np.testing.assert_array_equal(tokens, arrays["gen_ids"])


def test_workdir_trained_in_bfloat16_computes_in_float32(tmp_path):
    config = build_config({"model": _MODEL})
    assert config.model.dtype == "bfloat16"
    state = jax.jit(lambda: init_state(config, LanguageModel(config.model)))()
    checkpointer = Checkpointer(tmp_path, config.checkpoint)
    checkpointer.save(state, config, ByteTokenizer(), {})
    checkpointer.wait()
    model, params = m3jax.load(tmp_path)
    assert model.config.dtype == model.config.state_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_dtype():
    model, params = m3jax.load(_RELEASED, dtype="bfloat16")
    assert model.config.dtype == "bfloat16" and model.config.state_dtype == "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match="dtype = 'int8'; expected None or one of float32, bfloat16, float64"):
        m3jax.load(_RELEASED, dtype="int8")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        m3jax.load(tmp_path / "missing")
    with pytest.raises(CheckpointError):
        m3jax.load(tmp_path)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        m3jax.lod  # noqa: B018 (the access is what is tested)
