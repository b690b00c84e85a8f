"""Root-mean-square normalisation."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.kernels.rms_norm import rms_norm

EPSILON = 1e-5  # of every norm of the released models


class Scale(nn.Module):
    """The weight of a norm that is computed elsewhere."""

    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        """[width], starting at 1."""
        return self.param("scale", nn.initializers.ones, (width,), self.param_dtype)


class Normed(NamedTuple):
    """What `RMSNorm` makes of x, not computed yet: for `Linear`, whose product of few rows does it on the way."""

    x: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of x."""
        return self.x.shape

    @property
    def ndim(self) -> int:
        """That of x."""
        return self.x.ndim


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, computed in float32 or better, returned in `dtype`."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., n] → [..., n]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale, EPSILON, self.dtype)
