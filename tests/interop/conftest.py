"""Models with random parameters, in each of the released variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import build_config
from m3jax.models.language_model import LanguageModel

SIZES = {"vocab_size": 261, "d_model": 16, "n_layers": 3, "d_intermediate": 20, "headdim": 8, "d_state": 12}


def random_model(**changes):
    """(model config, parameters that all differ, by the shapes that the model itself asks for)."""
    config = build_config({"model": SIZES | {"dtype": changes.get("param_dtype", "float32")} | changes}).model
    rng = np.random.default_rng(0)
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: LanguageModel(config).init(jax.random.key(0), tokens))["params"]
    return config, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="session")
def siso():
    return random_model()


def assert_same(params, expected) -> None:
    """Compares trees bit for bit: names, shapes, dtypes and numbers."""
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (where, leaf), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(where), strict=True)
