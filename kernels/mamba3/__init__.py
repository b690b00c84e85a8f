"""The Mamba-3 recurrence: scan over a sequence, step for decoding, and the state that passes between them."""

from .api import mamba3_scan, mamba3_step
from .state import Mamba3State

__all__ = ["Mamba3State", "mamba3_scan", "mamba3_step"]
