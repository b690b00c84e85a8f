"""A product of few rows in parts, before it is added to its residual."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..rms_norm import rms_norm


class Sums(NamedTuple):
    """residual + Σ parts, not added up yet."""

    residual: jax.Array | None  # [rows, out]
    parts: jax.Array  # [parts, rows, out]

    def added(self, dtype: jnp.dtype) -> jax.Array:
        """[rows, out], the parts added in their order and rounded to `dtype`, and to that added the residual."""
        y = functools.reduce(operator.add, list(self.parts)).astype(dtype)
        return y if self.residual is None else self.residual + y.astype(self.residual.dtype)

    def added_and_normed(self, scale: jax.Array, epsilon: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """`added`, and its norm in `dtype`."""
        y = self.added(dtype)
        return y, rms_norm(y, scale, epsilon, dtype)
