"""Rotary position embedding (arXiv 2104.09864): how fast coordinate pairs turn where no input says so."""

import numpy as np


def standard_rates(pairs: int, base: float) -> np.ndarray:
    """Radians per token of each pair, base^(-i/pairs): [pairs], float64."""
    return base ** (-np.arange(pairs) / pairs)
