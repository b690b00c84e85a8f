"""Bias-free linear layers with the initialisation of the released code."""

import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig

_LEAST_ROWS = 8  # of a tensor core's product


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
            y = enough_rows(lambda rows: rows @ kernel, x)
            return jnp.split(y, list(itertools.accumulate(self.widths[:-1])), axis=-1)
        ends = itertools.accumulate(self.widths)
        return [x @ kernel[:, end - width : end] for width, end in zip(self.widths, ends, strict=True)]


def enough_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The product of x [rows, in] with a weight; on a GPU one of few rows is computed with more, of zeros.

    Of one row XLA makes a sum instead, which on an H100 reads the weights at less than half the rate of a product.
    """
    rows = x.shape[0]
    if x.ndim != 2 or rows >= _LEAST_ROWS or jax.default_backend() != "gpu":
        return product(x)
    padded = product(jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0))))
    return jax.lax.optimization_barrier(padded)[:rows]  # lest XLA multiply only what is kept


def closing_gain(config: ModelConfig) -> float:
    """Of a layer whose output is added to the residual stream: 1/√(residuals_per_layer · n_layers)."""
    return 1 / math.sqrt(config.residuals_per_layer * config.n_layers)
