"""The recurrence token by token."""

import jax
import jax.numpy as jnp

from ..documents import continues_document
from .inputs import Sequence

_EXACT = jax.lax.Precision.HIGHEST


def scan(seq: Sequence, state: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """o [b, l, h, p] and S after the last token."""
    everywhere = jnp.ones(seq.log_decay.shape[:2], bool)
    continues = everywhere if segment_ids is None else continues_document(segment_ids)

    def body(state, inputs):
        token, same = inputs
        o, state = step(token, jnp.where(same[:, None, None, None], state, 0))
        return state, o

    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (seq, continues))
    state, o = jax.lax.scan(body, state, inputs)
    return jnp.moveaxis(o, 0, 1), state


def step(token: Sequence, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token, arrays without the length axis; S is kept in float32 or better."""
    acc = state.dtype
    q, k, v, log_decay, beta = (t.astype(acc) for t in token)
    state = jnp.exp(log_decay)[..., None, None] * state
    known = jnp.einsum("bhpn,bhn->bhp", state, k, precision=_EXACT)
    update = beta[..., None] * (v - known)
    state = state + update[..., :, None] * k[..., None, :]
    return jnp.einsum("bhpn,bhn->bhp", state, q, precision=_EXACT).astype(token.v.dtype), state
