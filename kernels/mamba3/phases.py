"""Sums over many positions in float32 that do not lose what matters: phases in turns, and log decays."""

import math

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST


def reduce_turns(turns: jax.Array) -> jax.Array:
    """Reduces to [-½, ½], exactly; the derivative is that of the identity."""
    return turns - jax.lax.stop_gradient(jnp.round(turns))


def sum_turns(turns: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked sums of turns in [-½, ½] over axis -2, in [-½, ½]; the exact part is reduced before it can round."""
    coarse, fine = running_sums(turns, 0.5, mask)
    return reduce_turns(reduce_turns(coarse) + fine)


def running_sums(v: jax.Array, bound: float, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the j with mask[i, j] of v [b, h, m, j, f], |v| ≤ bound, as an exact part and a small one.

    The first part adds multiples of a power of two coarse enough that no sum rounds, so that differences of sums are
    exact too; the second adds what the first left out, under one such unit per term.
    """
    terms = v.shape[-2]
    unit = 2.0 ** (math.ceil(math.log2(bound * terms)) - jnp.finfo(v.dtype).nmant)
    coarse = jax.lax.stop_gradient(jnp.round(v / unit) * unit)
    spec = "ij,bhmjf->bhmif" if mask.ndim == 2 else "bmij,bhmjf->bhmif"
    mask = mask.astype(v.dtype)
    return tuple(jnp.einsum(spec, mask, part, precision=_EXACT) for part in (coarse, v - coarse))
