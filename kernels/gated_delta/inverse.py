"""The inverse of triangular systems with a diagonal of ones, as matrix products.

    (I + A)^-1,  A strictly lower triangular, from the inverses of its diagonal blocks:

    [P 0; R Q]^-1 = [P^-1 0; -Q^-1 R P^-1 Q^-1]

so that no power of a large A occurs: those grow like binomial coefficients where keys repeat.
"""

import functools

import jax
import jax.numpy as jnp

_SMALL = 4  # the fourth power of blocks of this size is 0


@jax.custom_vjp
def unit_triangular_inverse(a: jax.Array) -> jax.Array:
    """(I + a)^-1 of strictly lower triangular a, [..., c, c]; what a has elsewhere must be 0."""
    size = a.shape[-1]
    whole = 1 << (size - 1).bit_length()
    padded = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, whole - size)] * 2)
    return _inverse(padded)[..., :size, :size]


def _forward(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_triangular_inverse(a)
    return inverse, inverse


def _backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_product(_product(transposed, cotangent), transposed), -1),)


unit_triangular_inverse.defvjp(_forward, _backward)


def _inverse(a: jax.Array) -> jax.Array:
    size = a.shape[-1]
    if size <= _SMALL:
        one = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
        return _product(one - a, one + _product(a, a))
    half = size // 2
    top, bottom = _inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    corner = -_product(_product(bottom, a[..., half:, :half]), top)
    return jnp.concatenate(
        [
            jnp.concatenate([top, jnp.zeros_like(corner)], axis=-1),
            jnp.concatenate([corner, bottom], axis=-1),
        ],
        axis=-2,
    )


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
