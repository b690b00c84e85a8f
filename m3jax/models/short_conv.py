"""The short causal convolution of Mamba-2 and Gated DeltaNet: every channel by itself, over the last few tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels.documents import number_documents


class ShortConv(nn.Module):
    """silu of a depthwise convolution over `config.d_conv` tokens of one document."""

    config: ModelConfig
    bias: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Over a sequence, or one step.

        Args:
          x: [b, l, d], or [b, d] for a step.
          segment_ids: [b, l] or None; documents do not see each other. Not used by a step.
          state: inputs of the d_conv - 1 tokens before, [b, d_conv - 1, d], 0 where another document was; None = none.

        Returns:
          (output of x's shape and dtype, state after the last token, or None if none was given).
        """
        m = self.config
        d, taps = x.shape[-1], m.d_conv
        # PyTorch's initialisation of a convolution with one input channel.
        bound = 1 / math.sqrt(taps)
        kernel = self.param("conv_kernel", _uniform(bound), (taps, d), m.param_dtype).astype(x.dtype)
        offset = self.param("conv_bias", _uniform(bound), (d,), m.param_dtype) if self.bias else None
        one_token = x.ndim == 2
        if one_token:
            x = x[:, None]
        length = x.shape[1]
        before = jnp.zeros((x.shape[0], taps - 1, d), x.dtype) if state is None else state.astype(x.dtype)
        padded = jnp.concatenate([before, x], axis=1)
        document = None
        if segment_ids is not None:
            own_document = number_documents(segment_ids)  # ids may come again
            document = jnp.pad(own_document, ((0, 0), (taps - 1, 0)), mode="edge")
        y = jnp.zeros_like(x)
        for age in range(taps):
            at = slice(taps - 1 - age, taps - 1 - age + length)
            tap = padded[:, at] * kernel[taps - 1 - age][None, None]
            if document is not None and age:
                tap = jnp.where((document[:, at] == own_document)[..., None], tap, 0)
            y = y + tap
        if offset is not None:
            y = y + offset.astype(x.dtype)[None, None]
        y = jax.nn.silu(y)
        if state is not None:
            last = padded[:, length:]
            if document is not None:
                last = jnp.where((document[:, length:] == document[:, -1:])[..., None], last, 0)
            state = last.astype(state.dtype)
        return (y[:, 0] if one_token else y), state


def initial_state(config: ModelConfig, batch: int, channels: int) -> jax.Array:
    """No tokens before the first."""
    return jnp.zeros((batch, config.d_conv - 1, channels), config.dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
