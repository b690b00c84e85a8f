"""Scans of state space models: arrays in, arrays out. Knows jax and nothing of the rest of m3jax."""

from .gated_delta import gated_delta_scan, gated_delta_step
from .mamba3 import Mamba3State, mamba3_coefficients, mamba3_projected_step, mamba3_scan, mamba3_step
from .residuals import SCAN_RESIDUALS

__all__ = [
    "SCAN_RESIDUALS",
    "Mamba3State",
    "gated_delta_scan",
    "gated_delta_step",
    "mamba3_coefficients",
    "mamba3_projected_step",
    "mamba3_scan",
    "mamba3_step",
]
