"""Layers: mixer and MLP, each on a normalised copy of the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Sums, add_and_norm
from m3jax.models.mixers import MIXERS, State
from m3jax.models.mlp import SwiGLU
from m3jax.models.norm import EPSILON, Normed, RMSNorm, Scale


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x); the residual stream x is float32 or better."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(
        self, x: jax.Array | Sums, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array | Sums, State | None]:
        """Arguments and state as in mixers.py; x [b, l, d_model] or [b, d_model], that also not added up yet."""
        mixer = MIXERS[self.mixer].module(self.config, name="mixer")
        x, u = self._normed(x, "mixer_norm")
        x, state = mixer(u, segment_ids, state, x)
        if self.config.d_intermediate:
            x, u = self._normed(x, "mlp_norm")
            x = SwiGLU(self.config, name="mlp")(u, x)
        return x, state

    def _normed(self, x: jax.Array | Sums, name: str) -> tuple[jax.Array, jax.Array | Normed]:
        """x as an array, and its norm."""
        dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
        if isinstance(x, Sums):
            return add_and_norm(x, Scale(param_dtype, name=name)(x.residual.shape[-1]), EPSILON, dtype)
        if x.ndim == 2:
            return x, Normed(x, Scale(param_dtype, name=name)(x.shape[-1]))
        return x, RMSNorm(dtype, param_dtype, name=name)(x)


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
