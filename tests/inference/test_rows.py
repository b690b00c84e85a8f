"""The compiled decode loop: the state stays where it is, as it was before a row ends and after."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.inference import cache
from m3jax.inference.rows import decode, empty_rows
from m3jax.models.language_model import LanguageModel

CONFIG = {
    "hybrid": ModelConfig(
        vocab_size=61, d_model=16, n_layers=2, mixers="mamba3, attention", d_intermediate=0, headdim=8, d_state=8,
        mimo_rank=2, dtype="float32", attention_heads=4, attention_kv_heads=2, attention_headdim=8,
    ),
    "gated_deltanet": ModelConfig(
        vocab_size=61, d_model=16, n_layers=1, mixers="gated_deltanet", d_intermediate=0, gdn_heads=2, gdn_headdim=8,
        dtype="float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG)
def test_state_is_updated_in_place(name):
    """No copy of a recurrent state or of a cache in any layout, anywhere in the program; its memory is the input's."""
    model = LanguageModel(CONFIG[name])

    def arguments():
        params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return model.separate_layers(params), empty_rows(model, 3, 37, 8)

    params, rows = jax.eval_shape(arguments)
    ended, steps = jnp.zeros(3, bool), jnp.int32(4)
    compiled = decode.lower(model, params, rows, ended, steps, None, most=4).compile()
    copied = [
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    ]
    large = [leaf.size for leaf in jax.tree.leaves(rows.state) if leaf.size > 600]  # H, memory, keys, values
    assert len(large) == (3 if name == "hybrid" else 1)
    assert copied and not set(copied) & set(large)  # small things are, which shows that copies are found
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows.state))


def test_rows_are_taken_put_and_cleared():
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "key": jax.random.split(jax.random.key(0), 3)}
    one = cache.take_row(tree, 2)
    assert one["a"].tolist() == [[8, 9, 10, 11]] and one["key"].shape == (1,)
    put = cache.put_rows(tree, 0, one)
    assert put["a"].tolist() == [[8, 9, 10, 11], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (put["key"] == tree["key"][np.array([2, 1, 2])]).all()
    shorter = cache.put_rows({"a": tree["a"]}, 1, {"a": jnp.ones((1, 2))})
    assert shorter["a"].tolist() == [[0, 1, 2, 3], [1, 1, 0, 0], [8, 9, 10, 11]]
    cleared = cache.clear_rows({"a": tree["a"].at[1].set(jnp.nan)}, jnp.array([False, True, False]))
    assert cleared["a"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [8, 9, 10, 11]]
