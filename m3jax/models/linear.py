"""Bias-free linear layers with the initialisation of the released code."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig


class Linear(nn.Module):
    """One weight "kernel" [in, sum(widths)], used as one product for each width where there are many rows.

    What follows takes the outputs apart anyway. Separate products spare copies of activations: slices of the output on
    the way forward and, on the way back, the concatenation of its parts' gradients. Where the rows are fewer than the
    inputs, as in decoding, these copies are smaller than those of the weight's parts.
    """

    config: ModelConfig
    widths: tuple[int, ...]
    gain: float = 1.0  # weights start in U(±gain/√in)

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[..., in] → [..., width] for each width."""
        # variance_scaling's uniform bound is √(3 · scale / fan_in).
        init = nn.initializers.variance_scaling(self.gain**2 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (x.shape[-1], sum(self.widths)), self.config.param_dtype)
        x, kernel = x.astype(self.config.dtype), kernel.astype(self.config.dtype)
        if x.size < x.shape[-1] ** 2:
            return jnp.split(x @ kernel, list(itertools.accumulate(self.widths[:-1])), axis=-1)
        ends = itertools.accumulate(self.widths)
        return [x @ kernel[:, end - width : end] for width, end in zip(self.widths, ends, strict=True)]


def closing_gain(config: ModelConfig) -> float:
    """Of a layer whose output is added to the residual stream: 1/√(residuals_per_layer · n_layers)."""
    return 1 / math.sqrt(config.residuals_per_layer * config.n_layers)
