"""The gated MLP."""

import flax.linen as nn
import jax

from m3jax.config import ModelConfig
from m3jax.kernels import Sums
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import Normed


class SwiGLU(nn.Module):
    """fc2(value · silu(gate)) with fc1 giving [value | gate]; width `config.d_mlp`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array | Normed, residual: jax.Array) -> jax.Array | Sums:
        """[..., d_model] → [..., d_model], added to the residual or, of a step, maybe about to be."""
        m = self.config
        (y,) = Linear(m, (m.d_mlp, m.d_mlp), gated=True, name="fc1")(x)
        (y,) = Linear(m, (m.d_model,), closing_gain(m), name="fc2")(y, residual)
        return y
