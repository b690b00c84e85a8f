"""What the step's kernel makes of a token's projection: the formulas of ../coefficients.py, in float32.

Accurate where the hardware's functions are not: Δ and ω set the phase, whose errors add up over all tokens.
"""

import triton
import triton.language as tl

from .step_pieces import exp

_PI = tl.constexpr(3.141592653589793)


@triton.jit
def token_pointers(z_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr, batch, head, H: tl.constexpr,
                   G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
                   OMEGA_HEADS: tl.constexpr, HAS_LAM: tl.constexpr, RAW: tl.constexpr):  # fmt: skip
    """Where z, x, B, C, Δ, A, λ of a batch row and ω of its head start; RAW: all of them in the array of z."""
    row = batch.to(tl.int64)
    if RAW:
        LAM: tl.constexpr = H if HAS_LAM else 0
        z_ptr += row * (2 * H * P + 2 * R * G * N + 2 * H + LAM + S)
        x_ptr = z_ptr + H * P
        b_ptr = x_ptr + H * P
        c_ptr = b_ptr + R * G * N
        dt_ptr = c_ptr + R * G * N
        a_ptr = dt_ptr + H
        lam_ptr = a_ptr + H
        omega_ptr = lam_ptr + LAM
    else:
        z_ptr, x_ptr = z_ptr + row * (H * P), x_ptr + row * (H * P)
        b_ptr, c_ptr = b_ptr + row * (R * G * N), c_ptr + row * (R * G * N)
        dt_ptr, a_ptr, lam_ptr = dt_ptr + row * H, a_ptr + row * H, lam_ptr + row * H
        omega_ptr += (row * H + head if OMEGA_HEADS else row) * S
    return z_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr


@triton.jit
def log1p(v):
    """Of a v in [0, 1], as 2 artanh(v / (2 + v))."""
    s = v / (2.0 + v)
    q = s * s
    series = 0.0909090909091 + q * (0.0769230769231 + q * 0.0666666666667)
    series = 0.3333333333333 + q * (0.2 + q * (0.1428571428571 + q * (0.1111111111111 + q * series)))
    return 2.0 * (s + s * q * series)


@triton.jit
def softplus(v):
    """log(1 + e^v)."""
    return tl.maximum(v, 0.0) + log1p(exp(-tl.abs(v)))


@triton.jit
def heavy_tail(v):
    """1 + v for v ≥ 0, 1 / (1 - v) below."""
    return tl.maximum(v, 0.0) + 1.0 / (1.0 - tl.minimum(v, 0.0))


@triton.jit
def logistic(v):
    """1 / (1 + e^-v)."""
    small = exp(-tl.abs(v))
    return tl.where(v < 0, small, 1.0) / (1.0 + small)


@triton.jit
def tanh(v):
    """(1 - e^-2|v|) / (1 + e^-2|v|) with v's sign, and a series where that difference would be small."""
    size = tl.abs(v)
    small = exp(-2.0 * size)
    large = (1.0 - small) / (1.0 + small)
    q = v * v
    series = v + v * q * (-0.3333333333333 + q * (0.1333333333333 - q * 0.0539682539683))
    return tl.where(size < 0.125, series, tl.where(v < 0, -large, large))


@triton.jit
def head_coefficients(dt, a, lam, a_floor, HAS_LAM: tl.constexpr, HEAVY_TAIL: tl.constexpr):
    """Δ, A and λ of one head from what the projection has of them, with dt_bias; λ stays as it is if it is fixed."""
    rate = heavy_tail(a) if HEAVY_TAIL else softplus(a)
    if HAS_LAM:
        lam = logistic(lam)
    return softplus(dt), -tl.maximum(rate, a_floor), lam


@triton.jit
def angular_rate(v):
    """ω."""
    return _PI * tanh(v)
