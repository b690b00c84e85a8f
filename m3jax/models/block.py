"""Layers: mixer and MLP, each on a normalised copy of the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.models.mixers import MIXERS, State
from m3jax.models.mlp import SwiGLU
from m3jax.models.norm import RMSNorm


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x); the residual stream x is float32 or better."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State | None]:
        """Arguments and state as in mixers.py; x [b, l, d_model] or [b, d_model]."""
        dtypes = {"dtype": jnp.dtype(self.config.dtype), "param_dtype": jnp.dtype(self.config.param_dtype)}
        mixer = MIXERS[self.mixer].module(self.config, name="mixer")
        mixed, state = mixer(RMSNorm(**dtypes, name="mixer_norm")(x), segment_ids, state)
        x = x + mixed.astype(x.dtype)
        if self.config.d_intermediate:
            x = x + SwiGLU(self.config, name="mlp")(RMSNorm(**dtypes, name="mlp_norm")(x)).astype(x.dtype)
        return x, state


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
