"""Bias-free linear layers with the initialisation of the released code."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Sums, few_rows_product
from m3jax.kernels.rms_norm import rms_norm
from m3jax.models.norm import EPSILON, Normed


class Linear(nn.Module):
    """One weight "kernel" [in, sum(widths)], used as one product for each width where there are many rows.

    What follows takes the outputs apart anyway. Separate products spare copies of activations: slices of the output on
    the way forward and, on the way back, the concatenation of its parts' gradients. Where the rows are no more than the
    inputs, as in decoding, these copies are smaller than those of the weight's parts.
    """

    config: ModelConfig
    widths: tuple[int, ...]
    gain: float = 1.0  # weights start in U(±gain/√in)
    gated: bool = False  # of two equal widths: one output, the first times silu of the second
    apart: bool = False  # kernels read the outputs, each an array of its own

    @nn.compact
    def __call__(self, x: jax.Array | Normed, residual: jax.Array | None = None) -> list[jax.Array | Sums]:
        """[..., in] → [..., width] for each width; of one added to the residual if given, or about to be (`Sums`)."""
        m = self.config
        x, scale = x if isinstance(x, Normed) else (x.astype(m.dtype), None)
        # variance_scaling's uniform bound is √(3 · scale / fan_in).
        init = nn.initializers.variance_scaling(self.gain**2 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (x.shape[-1], sum(self.widths)), m.param_dtype).astype(m.dtype)
        if x.size <= x.shape[-1] ** 2:
            y = few_rows_product(
                x, kernel, scale=scale, epsilon=EPSILON, residual=residual, gated=self.gated, pending=True,
                implementation=product_implementation(m),
            )  # fmt: skip
            if self.gated or len(self.widths) == 1:
                return [y]
            return jnp.split(y, list(itertools.accumulate(self.widths[:-1])), axis=-1)
        if scale is not None:
            x = rms_norm(x, scale, EPSILON, m.dtype)
        ends = itertools.accumulate(self.widths)
        xs = _unjoined(x, len(self.widths)) if self.apart else [x] * len(self.widths)
        ys = [x @ kernel[:, end - width : end] for x, width, end in zip(xs, self.widths, ends, strict=True)]
        if self.gated:
            ys = [ys[0] * jax.nn.silu(ys[1])]
        return ys if residual is None else [residual + ys[0].astype(residual.dtype)]


def _unjoined(x: jax.Array, count: int) -> list[jax.Array]:
    """The array once for each of so many products.

    XLA for GPUs makes one product of those that share an operand, if one of them is small, with a copy that joins their
    weights and others that part the outputs. It takes arrays behind a barrier for different ones.
    """
    return jax.lax.optimization_barrier([x] * count) if jax.default_backend() == "gpu" else [x] * count


def product_implementation(config: ModelConfig) -> str | None:
    """What a scan is told binds products in so far as it is told to do without kernels."""
    return "xla" if config.scan_implementation in ("reference", "xla") else None


def closing_gain(config: ModelConfig) -> float:
    """Of a layer whose output is added to the residual stream: 1/√(residuals_per_layer · n_layers)."""
    return 1 / math.sqrt(config.residuals_per_layer * config.n_layers)
