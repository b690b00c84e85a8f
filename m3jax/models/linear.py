"""Bias-free linear layers with the initialisation of the released code."""

import math

import flax.linen as nn

from m3jax.config import ModelConfig


def linear(config: ModelConfig, features: int, name: str, closes_residual: bool = False) -> nn.Dense:
    """A bias-free layer, weights U(±1/√fan_in); one that closes a residual branch starts smaller.

    Args:
      config: supplies dtypes and, for `closes_residual`, the divisor √(residuals_per_layer · n_layers).
      features: output width.
      name: parameter name.
      closes_residual: whether the output is added to the residual stream.
    """
    gain = 1 / math.sqrt(config.residuals_per_layer * config.n_layers) if closes_residual else 1.0
    return nn.Dense(
        features,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        # variance_scaling's uniform bound is √(3 · scale / fan_in).
        kernel_init=nn.initializers.variance_scaling(gain**2 / 3, "fan_in", "uniform"),
        name=name,
    )
