"""Every tolerance of the suite, each derived from the dtype and the number of terms added.

Errors are the largest absolute difference over the largest absolute value of the expected array, if nothing else is
said. n terms added in any order, each rounded to relative precision u = eps/2, are off by about √n · u of their largest
partial sum; SAFETY covers chains of such operations (projection, scan, norm, projection) and the maximum over an array.
"""

import math

import jax.numpy as jnp
import numpy as np

SAFETY = 16

# The golden files hold float64 results rounded to float32: half a unit in the last place of the largest entry.
GOLDEN_ROUNDING = 2.0**-24
# Phases are stored in float32 in [0, 2π): half a unit in the last place of numbers over 4, and as much again for 2π.
GOLDEN_PHASE = 2 * 2.0**-22


# A function of one number, written out in float32: its largest relative error, of eight roundings by half a unit in the
# last place. They rarely point the same way: on average a fourth of it.
FLOAT32_FUNCTION = 8 * 2.0**-24

# Numbers under this one are 0 in float32 (its smallest normal number is 1.2e-38).
FLOAT32_UNDERFLOW = 1e-37


def rounding(dtype, terms: int) -> float:
    """Bound for results that add `terms` products in `dtype`."""
    return SAFETY * float(jnp.finfo(dtype).eps) / 2 * math.sqrt(terms)


def golden(dtype, terms: int) -> float:
    """Bound against a golden array for a computation in `dtype`."""
    return 2 * GOLDEN_ROUNDING + rounding(dtype, terms)


def narrow_rms(dtype, roundings: int) -> float:
    """Bound on RMS(error) / RMS(expected) where every term went through `roundings` roundings to `dtype` in a row.

    An even spread over half a unit in the last place, of numbers anywhere between two powers of two, has a relative
    RMS of at most eps/4; independent ones add as squares. Twice that for terms which partly cancel.
    """
    return 2 * float(jnp.finfo(dtype).eps) / 4 * math.sqrt(roundings)


def phase_walk(steps: int) -> float:
    """Radians: `steps` float32 additions to a phase in [0, 2π), each rounded by at most 2^-22, a random walk."""
    return SAFETY / 4 * 2.0**-22 * math.sqrt(steps)


def phase_of_equal_steps(radians: float) -> float:
    """Radians: steps of a phase that reached `radians`, all rounded alike by a quotient, a product and in turns."""
    return 3 * 2.0**-24 * radians


def assert_close(actual, expected, tolerance: float, name: str, scale: float = 0.0) -> None:
    """Compares relative to the largest expected entry, or to `scale` if that is larger.

    `scale`: for results that are small differences of large terms, the size of a term. The message gives max, mean and
    RMS ratio.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    error, scale = np.abs(actual - expected), max(np.abs(expected).max(), FLOAT32_UNDERFLOW, scale)
    largest = error.max() / scale
    rms = np.sqrt((error**2).mean() / max((expected**2).mean(), 1e-300))
    assert largest <= tolerance, (
        f"{name}: max {largest:.2e}, mean {error.mean():.2e}, RMS ratio {rms:.2e} > {tolerance:.2e}"
    )


def rms_ratio(actual, expected, scale: float = 0.0) -> float:
    """RMS of the error over the RMS of what is expected, or over `scale` if that is larger."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return 0.0
    return float(np.sqrt(((actual - expected) ** 2).mean()) / max(np.sqrt((expected**2).mean()), scale, 1e-300))


def assert_phase_close(actual, expected, tolerance: float, name: str) -> None:
    """Compares radians modulo 2π."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    largest = np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max(initial=0)
    assert largest <= tolerance, f"{name}: {largest:.2e} rad > {tolerance:.2e}"
