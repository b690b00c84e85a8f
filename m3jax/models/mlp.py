"""The gated MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.models.linear import linear


class SwiGLU(nn.Module):
    """fc2(value · silu(gate)) with fc1 giving [value | gate]; width `config.d_mlp`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_model] → [..., d_model]."""
        value, gate = jnp.split(linear(self.config, 2 * self.config.d_mlp, "fc1")(x), 2, axis=-1)
        return linear(self.config, self.config.d_model, "fc2", closes_residual=True)(value * jax.nn.silu(gate))
