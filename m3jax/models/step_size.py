"""Initial step sizes of the recurrent mixers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig


def dt_bias_init(config: ModelConfig) -> nn.initializers.Initializer:
    """softplus⁻¹ of step sizes log-uniform in [dt_min, dt_max], none under dt_init_floor."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
        dt = jnp.maximum(dt, config.dt_init_floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


def log_decay_rate_init(least: float, most: float) -> nn.initializers.Initializer:
    """Logarithm of decay rates uniform in [least, most]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, minval=least, maxval=most)).astype(dtype)

    return init
