"""Scans of state space models, and steps of decoding: arrays in, arrays out. Knows jax and nothing else of m3jax."""

from .cached_attention import cached_attention_step
from .few_rows import Sums, add_and_norm, few_rows_product
from .gated_delta import gated_delta_scan, gated_delta_step
from .gpu import one_device
from .mamba3 import Mamba3State, mamba3_coefficients, mamba3_projected_step, mamba3_scan, mamba3_step
from .residuals import SCAN_RESIDUALS

__all__ = [
    "SCAN_RESIDUALS",
    "Mamba3State",
    "Sums",
    "add_and_norm",
    "cached_attention_step",
    "few_rows_product",
    "gated_delta_scan",
    "gated_delta_step",
    "mamba3_coefficients",
    "mamba3_projected_step",
    "mamba3_scan",
    "mamba3_step",
    "one_device",
]
