"""The Mamba-3 recurrence: scan over a sequence, step for decoding, the state between them, and what they start from."""

from .api import mamba3_projected_step, mamba3_scan, mamba3_step
from .coefficients import mamba3_coefficients
from .state import Mamba3State

__all__ = ["Mamba3State", "mamba3_coefficients", "mamba3_projected_step", "mamba3_scan", "mamba3_step"]
