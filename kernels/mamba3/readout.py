"""The ranks of the values: x per rank, and from the state's read-out to the layer's output."""

import jax
import jax.numpy as jnp

from .inputs import Sequence, Weights


def readout(
    y: jax.Array,
    x: jax.Array,
    z: jax.Array | None,
    d: jax.Array | None,
    mimo_z: jax.Array | None,
    mimo_o: jax.Array | None,
    norm_weight: jax.Array | None,
    norm_eps: float,
) -> jax.Array:
    """Skip, pre-gate norm, gate, sum over ranks.

    Args:
      y: H C per rank, [..., r, p], float32 or float64; so is the computation.
      x: input per rank, x ⊙ mimo_x, [..., r, p].
      z: gate before mimo_z, [..., p], or None.
      d: skip weight, broadcastable to y.
      mimo_z: gate per rank, broadcastable to y; None = 1.
      mimo_o: output per rank, broadcastable to y; None = 1.
      norm_weight: weight of the RMSNorm over p before the gate, broadcastable to y; None = no norm.
      norm_eps: epsilon of that norm.

    Returns:
      [..., p], in y's dtype.
    """
    if d is not None:
        y = y + d * x
    if norm_weight is not None:
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm_eps) * norm_weight
    if z is not None:
        gate = z[..., None, :].astype(y.dtype)
        y = y * jax.nn.silu(gate if mimo_z is None else gate * mimo_z)
    if mimo_o is not None:
        y = y * mimo_o
    return y.sum(axis=-2)


def per_rank(x: jax.Array, mimo_x: jax.Array | None, rank: int) -> jax.Array:
    """[b, h, ..., 1, p] → [b, h, ..., r, p]."""
    if mimo_x is None:
        return jnp.repeat(x, rank, axis=-2)
    heads, _, p = mimo_x.shape
    return x * mimo_x.astype(x.dtype).reshape(1, heads, *(1,) * (x.ndim - 4), rank, p)


def without_readout(seq: Sequence, weights: Weights) -> tuple[Sequence, Weights]:
    """What kernels need that leave y of every rank, with skip, to triton/readout.py."""
    return seq._replace(z=None), weights._replace(mimo_z=None, mimo_o=None, norm_weight=None)
