"""The gated MLP."""

import flax.linen as nn
import jax

from m3jax.config import ModelConfig
from m3jax.models.linear import Linear, closing_gain


class SwiGLU(nn.Module):
    """fc2(value · silu(gate)) with fc1 giving [value | gate]; width `config.d_mlp`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_model] → [..., d_model]."""
        m = self.config
        value, gate = Linear(m, (m.d_mlp, m.d_mlp), name="fc1")(x)
        (y,) = Linear(m, (m.d_model,), closing_gain(m), name="fc2")(value * jax.nn.silu(gate))
        return y
