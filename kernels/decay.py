"""How far down the logarithm of a decay says anything."""

import math

import jax.numpy as jnp


def min_log_decay(dtype: jnp.dtype) -> float:
    """A float whose exponential is 0 in `dtype`, and not much lower."""
    info = jnp.finfo(dtype)
    return (info.minexp - info.nmant) * math.log(2) - 2.0  # from exponents: the number itself may be flushed to 0
