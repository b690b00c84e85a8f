"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    """x / √(mean(x²) + ε) · weight over the last axis, computed in float32 or better, returned in `dtype`."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (x * weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))).astype(dtype)
