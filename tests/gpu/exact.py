"""What these tests share: arrays in float64, comparison with a function in float64, numbers of documents."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests import tolerances


def documents_of(rows: int, length: int) -> np.ndarray:
    """Their numbers, int32 [rows, length]: of 100 tokens on average."""
    starts = np.random.default_rng(3).random((rows, length)) < 0.01
    return np.cumsum(starts, axis=1, dtype=np.int32)


def in_float64(tree):
    """Its arrays in float64."""
    return jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), tree)


def gradients(function: Callable, args: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The result, and the gradient of each argument of the sum of the result's cosines."""
    y, pullback = jax.vjp(lambda args: function(**args), args)
    return {"y": y} | pullback(jnp.cos(y))[0]


def assert_close_to_float64(function: Callable, exact: Callable, args: dict[str, jax.Array], tolerance: float) -> None:
    """The function and its gradients against another one's in float64."""
    actual = jax.jit(functools.partial(gradients, function))(args)
    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(gradients, exact))(in_float64(args))
    errors = {name: tolerances.rms_ratio(value, expected[name]) for name, value in actual.items()}
    assert max(errors.values()) <= tolerance, errors
