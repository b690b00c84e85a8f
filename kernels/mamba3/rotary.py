"""The complex part of the transition: phases and the rotation of B and C.

Layout of the n coordinates: first the s real parts, then the s imaginary parts, then n - 2s that do not rotate. A phase
is kept as a float in [0, 2π). 2π is not a float: reducing by its rounded value would shift every wrap by up to 1.7e-7
rad, always the same way, so the reduction subtracts it in two parts, in the order that rounds last the sum that is not
on the grid of floats near 2π (or else every wrap in one direction would round alike).
"""

import math

import jax
import jax.numpy as jnp

TWO_PI = 2 * math.pi
_TWO_PI_HIGH = 6.28125  # 201/32: k * _TWO_PI_HIGH is exact in float32 for |k| < 2**16
_TWO_PI_LOW = TWO_PI - _TWO_PI_HIGH


def wrap_angle(angle: jax.Array) -> jax.Array:
    """Reduces radians to [0, 2π); the derivative is that of the identity."""
    turns = jax.lax.stop_gradient(jnp.floor(angle / TWO_PI))
    high, low = turns * _TWO_PI_HIGH, turns * _TWO_PI_LOW
    wrapped = jnp.where(turns < 0, (angle - low) - high, (angle - high) - low)
    # Rounding can leave a result just outside; the correction is a constant, so gradients pass.
    fix = jnp.where(wrapped < 0, TWO_PI, 0.0) - jnp.where(wrapped >= TWO_PI, TWO_PI, 0.0)
    fixed = wrapped + jax.lax.stop_gradient(fix).astype(angle.dtype)
    # A tiny negative number plus 2π rounds to 2π itself.
    return jnp.where(fixed >= TWO_PI, fixed - jax.lax.stop_gradient(fixed), fixed)


def rotate(v: jax.Array, angle: jax.Array) -> jax.Array:
    """Turns coordinate pairs (i, s + i) of v [..., n] by +angle [..., s] (broadcast over the leading axes)."""
    s = angle.shape[-1]
    if s == 0:
        return v
    real, imag, rest = v[..., :s], v[..., s : 2 * s], v[..., 2 * s :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos, rest], axis=-1)
