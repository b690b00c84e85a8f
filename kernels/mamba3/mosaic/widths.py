"""Smaller states in those of the Mosaic GPU kernels, which have N coordinates, of which S pairs turn.

Angles that are not there turn by 0, so that their pairs may hold what does not turn; what is left over is 0. A state of
N coordinates with S angles or none (Mamba-2) stays as it is.
"""

import jax
import jax.numpy as jnp

from ..inputs import Inputs
from .pieces import N, S


def widened(inputs: Inputs) -> Inputs:
    """With N coordinates in B, C, their biases and H, and S angles."""
    seq, weights = inputs.seq, inputs.weights
    s = seq.omega.shape[-1]
    return inputs._replace(
        seq=seq._replace(omega=_padded(seq.omega, S), b=_to_kernels(seq.b, s), c=_to_kernels(seq.c, s)),
        weights=weights._replace(b_bias=_to_kernels(weights.b_bias, s), c_bias=_to_kernels(weights.c_bias, s)),
        ssm=_to_kernels(inputs.ssm, s),
        phase=None if inputs.phase is None else _padded(inputs.phase, S),
    )


def narrowed(v: jax.Array, n: int, s: int) -> jax.Array:
    """What the kernels found with N coordinates, [..., N] → [..., n]."""
    if n == N and s in (0, S):
        return v
    rest = jnp.concatenate([v[..., s:S], v[..., S + s : 2 * S], v[..., 2 * S :]], axis=-1)
    return jnp.concatenate([v[..., :s], v[..., S : S + s], rest[..., : n - 2 * s]], axis=-1)


def _to_kernels(v: jax.Array | None, s: int) -> jax.Array | None:
    """The converse of `narrowed`."""
    if v is None or (v.shape[-1] == N and s in (0, S)):
        return v
    rest, free = _padded(v[..., 2 * s :], N - 2 * s), S - s
    parts = [v[..., :s], rest[..., :free], v[..., s : 2 * s], rest[..., free : 2 * free], rest[..., 2 * free :]]
    return jnp.concatenate(parts, axis=-1)


def _padded(v: jax.Array, width: int) -> jax.Array:
    return jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, width - v.shape[-1]),))
