"""Layers: mixer and MLP, each on a normalised copy of the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.models.mixers import MIXERS, State
from m3jax.models.mlp import SwiGLU
from m3jax.models.norm import Normed, RMSNorm, Scale


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x); the residual stream x is float32 or better."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State | None]:
        """Arguments and state as in mixers.py; x [b, l, d_model] or [b, d_model]."""
        mixer = MIXERS[self.mixer].module(self.config, name="mixer")
        x, state = mixer(self._normed(x, "mixer_norm"), segment_ids, state, x)
        if self.config.d_intermediate:
            x = SwiGLU(self.config, name="mlp")(self._normed(x, "mlp_norm"), x)
        return x, state

    def _normed(self, x: jax.Array, name: str) -> jax.Array | Normed:
        dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
        if x.ndim == 2:
            return Normed(x, Scale(param_dtype, name=name)(x.shape[-1]))
        return RMSNorm(dtype, param_dtype, name=name)(x)


class Period(nn.Module):
    """A layer for every mixer of the pattern, one after another."""

    config: ModelConfig
    block: type[nn.Module]  # Block, maybe with recomputation

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, state: None) -> tuple[jax.Array, None]:
        """As `Block`, without a state."""
        for i, mixer in enumerate(self.config.mixer_pattern):
            x, _ = self.block(self.config, mixer, name=str(i))(x, segment_ids, state)
        return x, None
