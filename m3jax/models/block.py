"""One layer: mixer and MLP, each on a normalised copy of the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State
from m3jax.models.mamba3 import Mamba3Mixer
from m3jax.models.mlp import SwiGLU
from m3jax.models.norm import RMSNorm


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x); the residual stream x is float32 or better."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: Mamba3State | None
    ) -> tuple[jax.Array, Mamba3State | None]:
        """Arguments and state as in `Mamba3Mixer`; x [b, l, d_model] or [b, d_model]."""
        dtypes = {"dtype": jnp.dtype(self.config.dtype), "param_dtype": jnp.dtype(self.config.param_dtype)}
        mixed, state = Mamba3Mixer(self.config, name="mixer")(
            RMSNorm(**dtypes, name="mixer_norm")(x), segment_ids, state
        )
        x = x + mixed.astype(x.dtype)
        if self.config.d_intermediate:
            x = x + SwiGLU(self.config, name="mlp")(RMSNorm(**dtypes, name="mlp_norm")(x)).astype(x.dtype)
        return x, state
