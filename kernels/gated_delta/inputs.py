"""The arguments of the gated delta rule, and their check."""

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
    expected = {"k": (*lead, n), "v": (*lead, p), "log_decay": lead, "beta": lead}
    for name, shape in expected.items():
        actual = getattr(seq, name).shape
        if actual != shape:
            raise ValueError(f"{name} has shape {actual}; expected {shape}, as q has shape {seq.q.shape}.")
    if state is not None and state.shape != (lead[0], lead[-1], p, n):
        raise ValueError(f"the state has shape {state.shape}; expected [b, h, p, n] = {(lead[0], lead[-1], p, n)}.")
    if segment_ids is not None and segment_ids.shape != lead[:2]:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}; expected [b, l] = {lead[:2]}.")
