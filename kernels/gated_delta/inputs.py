"""The arguments of the gated delta rule, their check, and keys of length 1."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sequence(NamedTuple):
    """What every token brings; without the length axis for a step."""

    q: jax.Array  # [b, l, h, n]
    k: jax.Array  # [b, l, h, n]
    v: jax.Array  # [b, l, h, p]
    log_decay: jax.Array  # [b, l, h], ≤ 0
    beta: jax.Array  # [b, l, h]


def check_inputs(seq: Sequence, state: jax.Array | None, segment_ids: jax.Array | None) -> None:
    """Raises ValueError for a shape that does not fit the others, TypeError for a dtype; the argument is named."""
    for name, value in (*seq._asdict().items(), ("state", state)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating point dtype.")
    lead, n, p = seq.q.shape[:-1], seq.q.shape[-1], seq.v.shape[-1]
    if 0 in lead:
        raise ValueError(f"q has shape {seq.q.shape}; expected at least one sequence, one token and one head.")
    expected = {"k": (*lead, n), "v": (*lead, p), "log_decay": lead, "beta": lead}
    for name, shape in expected.items():
        actual = getattr(seq, name).shape
        if actual != shape:
            raise ValueError(f"{name} has shape {actual}; expected {shape}, as q has shape {seq.q.shape}.")
    if state is not None and state.shape != (lead[0], lead[-1], p, n):
        raise ValueError(f"the state has shape {state.shape}; expected [b, h, p, n] = {(lead[0], lead[-1], p, n)}.")
    if segment_ids is not None:
        if segment_ids.shape != lead[:2]:
            raise ValueError(f"segment_ids has shape {segment_ids.shape}; expected [b, l] = {lead[:2]}.")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids has dtype {segment_ids.dtype}; expected integers.")


def of_unit_length(seq: Sequence, eps: float | None, wide: bool = False) -> Sequence:
    """q and k divided by their lengths, √(|.|² + eps), and q by √n; as they are if eps is None.

    Computed in float32 or better, and left in it if `wide`.
    """
    if eps is None:
        return seq
    q, k = (t.astype(jnp.promote_types(t.dtype, jnp.float32)) if wide else t for t in (seq.q, seq.k))
    return seq._replace(q=_unit(q, eps) / math.sqrt(q.shape[-1]), k=_unit(k, eps))


def _unit(v: jax.Array, eps: float) -> jax.Array:
    wide = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + eps)).astype(v.dtype)
