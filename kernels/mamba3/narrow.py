"""Matrix products of operands narrower than float32, and what rounding may not do to the phases' gradients.

Notation: v [..., n] turns with the phase φ when its coordinate pairs (rotary.py) do; J v = d v / dφ. B and C turn with
their position's phase, H with the phase where it stands.

Only differences of phases reach the output: turning everything by one angle changes nothing. So the phase of C_i gets
from each product C_i·B_j what the phase of B_j gets, with the other sign, and the gradient of a token's ω, which sums
those of all later phases, is what is left when they cancel. If each side multiplies its own rounding of B, C or H,
every pair leaves a remainder, and the sum is a random walk through the rest of the document.

The remainders vanish where rounding is differentiated as if it were done in the frame that turns: round(v) = v + ε with
d ε / dφ = J ε, not 0. `rotate_rounded` (B and C), `round_forward` (H) and `round_backward` (the cotangent of H) do that
with v in float32; the operands' cotangents also stay in float32 until they have met J, and only what is kept for the
backward is narrow. With operands as wide as v all four are the plain operations.
"""

import functools

import jax
import jax.numpy as jnp

from .rotary import rotate


def rotate_rounded(v: jax.Array, angle: jax.Array, operand: jnp.dtype) -> jax.Array:
    """`rotate`, then rounds to `operand`.

    Args:
      v: [..., r, n].
      angle: [..., 1, s], one for all r rows.
      operand: dtype of the products' operands.

    Returns:
      [..., r, n], in v's dtype.
    """
    return rotate(v, angle) if operand == v.dtype else _rotate_rounded(operand, v, angle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate_rounded(operand: jnp.dtype, v: jax.Array, angle: jax.Array) -> jax.Array:
    return _round(rotate(v, angle), operand)


def _rotate_rounded_forward(operand: jnp.dtype, v: jax.Array, angle: jax.Array):
    rounded = _rotate_rounded(operand, v, angle)
    return rounded, (rounded.astype(operand), angle)


def _rotate_rounded_backward(operand: jnp.dtype, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    rounded, angle = residuals
    return rotate(cotangent, -angle), _angle_cotangent(cotangent, rounded, angle)


_rotate_rounded.defvjp(_rotate_rounded_forward, _rotate_rounded_backward)


def round_forward(v: jax.Array, angle: jax.Array, operand: jnp.dtype) -> jax.Array:
    """Rounds v, which has turned by `angle`; arguments as in `rotate_rounded`."""
    return v if operand == v.dtype else _round_forward(operand, v, angle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_forward(operand: jnp.dtype, v: jax.Array, angle: jax.Array) -> jax.Array:
    return _round(v, operand)


def _round_forward_forward(operand: jnp.dtype, v: jax.Array, angle: jax.Array):
    rounded = _round(v, operand)
    return rounded, ((rounded - v).astype(operand), angle)


def _round_forward_backward(operand: jnp.dtype, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    error, angle = residuals
    return cotangent, _angle_cotangent(cotangent, error, angle)


_round_forward.defvjp(_round_forward_forward, _round_forward_backward)


def round_backward(v: jax.Array, angle: jax.Array, operand: jnp.dtype) -> jax.Array:
    """Rounds the cotangent of v, which has turned by `angle`; arguments as in `rotate_rounded`."""
    return v if operand == v.dtype else _round_backward(operand, v, angle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_backward(operand: jnp.dtype, v: jax.Array, angle: jax.Array) -> jax.Array:
    return v


def _round_backward_forward(operand: jnp.dtype, v: jax.Array, angle: jax.Array):
    return v, (v.astype(operand), angle)


def _round_backward_backward(operand: jnp.dtype, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    v, angle = residuals
    rounded = _round(cotangent, operand)
    return rounded, _angle_cotangent(cotangent - rounded, v, angle)


_round_backward.defvjp(_round_backward_forward, _round_backward_backward)


def _angle_cotangent(cotangent: jax.Array, v: jax.Array, angle: jax.Array) -> jax.Array:
    """<cotangent, J v> of every pair, summed over rows: [..., 1, s]."""
    s = angle.shape[-1]
    real, imag = v[..., :s].astype(angle.dtype), v[..., s : 2 * s].astype(angle.dtype)
    return (cotangent[..., s : 2 * s] * real - cotangent[..., :s] * imag).sum(axis=-2, keepdims=True)


def _round(v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(v, info.nexp, info.nmant)  # XLA may drop a cast there and back
