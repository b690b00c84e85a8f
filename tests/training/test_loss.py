"""The chunked cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.training.loss import linear_cross_entropy
from tests import tolerances


def _inputs(dtype):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 7, 5)), rng.normal(size=(11, 5))
    targets, weights = rng.integers(0, 11, size=(3, 7)), rng.uniform(size=(3, 7))
    weights[0, 2:4] = 0
    return hidden.astype(dtype), head.astype(dtype), targets, weights.astype(dtype)


def _plain(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("chunk", [1, 6, 9, 21, 1000])
def test_value_and_gradients(chunk, x64):
    hidden, head, targets, weights = _inputs("float64")
    run = jax.value_and_grad(lambda h, w: 3 * linear_cross_entropy(h, w, targets, weights, chunk), argnums=(0, 1))
    plain = jax.value_and_grad(lambda h, w: 3 * _plain(h, w, targets, weights), argnums=(0, 1))
    (value, gradients), (expected, expected_gradients) = run(hidden, head), plain(hidden, head)
    tolerance = tolerances.rounding("float64", 21 * 11)
    tolerances.assert_close(value, expected, tolerance, "loss")
    for name, actual, wanted in zip(("hidden", "embedding"), gradients, expected_gradients, strict=True):
        tolerances.assert_close(actual, wanted, tolerance, name)
    without_gradient = linear_cross_entropy(hidden, head, targets, weights, chunk)
    tolerances.assert_close(3 * without_gradient, expected, tolerance, "value alone")


def test_no_array_of_all_logits():
    batch, length, vocabulary, chunk = 4, 64, 512, 32
    hidden, head = jnp.zeros((batch, length, 8)), jnp.zeros((vocabulary, 8))
    targets, weights = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length))
    run = jax.grad(lambda h, w: linear_cross_entropy(h, w, targets, weights, chunk), argnums=(0, 1))
    compiled = jax.jit(run).lower(hidden, head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * batch * length * vocabulary
