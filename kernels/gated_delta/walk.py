"""The state from chunk to chunk: all of the gated delta rule that is not parallel over the sequence.

    U_m = own_m + W_m S_mᵀ,  S_{m+1} = decay_m S_m + U_mᵀ K_m                     (letters as in xla.py; W = -erase)

Gradients follow the same walk from the end to the beginning with W and K exchanged:

    dU_m = own_m' + K_m dS_{m+1}ᵀ,  dS_m = decay_m dS_{m+1} + dU_mᵀ W_m + dS_m'

where own' and dS' are the cotangents of U and of S as they are used elsewhere. All else is parallel again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..products import chosen_precision

_TOGETHER = 4  # chunks in one turn of XLA's loop, each of which takes longer to start than a chunk to pass


class Chunks(NamedTuple):
    """Of every chunk; c positions, operands of products in the dtype in which they are multiplied."""

    own: jax.Array  # [m, b, h, c, p]
    write: jax.Array  # W, [m, b, h, c, n]
    read: jax.Array  # K, [m, b, h, c, n]
    decay: jax.Array  # [m, b, h]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def states(walk, chunks: Chunks, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U [m, b, h, c, p] and S entering every chunk [m, b, h, p, n], as operands, and S after the last one.

    Args:
      walk: `walk_in_jax`, or what does the same.
      chunks: what every chunk brings.
      state: S entering the first, [b, h, p, n], float32 or better.
    """
    return walk(*chunks, state, None, reverse=False)


def _states_forward(walk, chunks: Chunks, state: jax.Array):
    updates, entering, last = walk(*chunks, state, None, reverse=False)
    return (updates, entering, last), (chunks, updates, entering)


def _states_backward(walk, residuals, cotangents) -> tuple[Chunks, jax.Array]:
    chunks, updates, entering = residuals
    d_updates, d_entering, d_last = cotangents
    d_own, leaving, d_state = walk(
        d_updates, chunks.read, chunks.write, chunks.decay, d_last, d_entering, reverse=True
    )  # fmt: skip
    product = functools.partial(jnp.einsum, precision=chosen_precision())
    d_decay = jnp.sum(entering.astype(d_last.dtype) * leaving.astype(d_last.dtype), axis=(-2, -1))
    return Chunks(
        own=d_own,
        write=product("mbhcp,mbhpn->mbhcn", d_own, entering),
        read=product("mbhcp,mbhpn->mbhcn", updates, leaving),
        decay=d_decay,
    ), d_state


states.defvjp(_states_forward, _states_backward)


def walk_in_jax(
    own: jax.Array, write: jax.Array, read: jax.Array, decay: jax.Array, state: jax.Array, added: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """One walk through the chunks, from the last to the first if `reverse`; `added` to S after each chunk."""
    operand = own.dtype
    product = functools.partial(jnp.einsum, precision=chosen_precision(), preferred_element_type=state.dtype)

    def body(state: jax.Array, here: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        own, write, read, decay, added = here
        entering = state.astype(operand)
        update = (own + product("bhcn,bhpn->bhcp", write, entering)).astype(operand)
        after = decay[..., None, None] * state + product("bhcp,bhcn->bhpn", update, read)
        if added is not None:
            after = after + added
        return after, (update, entering)

    chunks = (own, write, read, decay, added)
    state, (updates, entering) = jax.lax.scan(body, state, chunks, reverse=reverse, unroll=_TOGETHER)
    return updates, entering, state
