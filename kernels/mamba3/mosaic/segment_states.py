"""What segments of a sequence pass to each other in the Mosaic GPU kernels: H on the way forward, G on the way back.

A first pass finds what each segment adds to the state, [b, h, segments - 1, P, N], and its decay, [b, h, segments - 1,
N] (N times the same, as copies of less are not possible); one end needs none.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .pieces import WG, N, P


def added_shapes(batch: int, heads: int, segments: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of what the first pass writes."""
    shape = (batch, heads, segments - 1)
    return jax.ShapeDtypeStruct((*shape, P, N), jnp.float32), jax.ShapeDtypeStruct((*shape, N), jnp.float32)


def no_state() -> jax.Array:
    """Zeros, [P, N]."""
    return plgpu.layout_cast(jnp.zeros((P, N), jnp.float32), WG)


def load_state(ref) -> jax.Array:
    """[P, N] float32 of global memory."""
    return plgpu.load(ref, layout=WG, optimized=False)


def pass_through(state: jax.Array, added, decays, count, number) -> jax.Array:
    """The state after `count` segments, of which the k-th on the way is number(k).

    Args:
      state: before them, [P, N].
      added: of one head, [segments - 1, P, N] in global memory.
      decays: likewise, [segments - 1, N].
      count: int32 [].
      number: from int32 [] to int32 [].
    """

    def take(k, state):
        k = number(k)
        found = load_state(added.at[k])
        return state * decays[k, 0] + found

    return lax.fori_loop(0, count, take, state)


def store_added(added, decays, state: jax.Array, log_decay: jax.Array) -> None:
    """Writes what a segment adds, [P, N], and 2^log_decay to its places in global memory, [P, N] and [N]."""
    added[...] = state
    decays[...] = jnp.broadcast_to(jnp.exp2(log_decay), (N,))
