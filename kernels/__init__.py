"""Scans of state space models: arrays in, arrays out. Knows jax and nothing of the rest of m3jax."""

from .mamba3 import Mamba3State, mamba3_scan, mamba3_step

__all__ = ["Mamba3State", "mamba3_scan", "mamba3_step"]
