"""What segments of a sequence pass to each other in the Mosaic GPU kernels: H on the way forward, G on the way back.

A first pass finds what each segment adds to the state, [b, h, segments - 1, P, N], and its decay, [b, h, segments - 1,
N] (N times the same, as copies of less are not possible); one end needs none. A segment may be cut into pieces for it.

What has decayed by more than 2^-48 on its way, the square of what float32 resolves, is forgotten, so that a first pass
need not look at every chunk: only at those that are near enough to a segment's end (on the way back, to its start).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .pieces import WG, N, P, uniform

_FORGOTTEN = -48.0  # log2
_TESTS = 8  # as many loads at once


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


def count_remembered(totals: list, count: int, decay, simulated: bool) -> jax.Array:
    """How many of `count` chunks, from the first on, are not forgotten; may be a few too many.

    Args:
      totals: of every head for which that is asked, log2 of the decay up to every chunk's end, in global memory.
      count: of chunks.
      decay: from one of `totals` and the number of a chunk to log2 of the decay on its way, the lower the higher.
      simulated: whether the interpreter runs this.
    """
    grain = -(-count // _TESTS)
    most = jnp.int32(0)
    for ref in totals:
        remembered = [jnp.where(decay(ref, k) > _FORGOTTEN, grain, 0) for k in range(0, count, grain)]
        most = jnp.maximum(most, sum(remembered))
    return uniform(jnp.minimum(most, count), simulated)


def count_remembered_after(totals: list, first, count: int, simulated: bool) -> jax.Array:
    """Of the `count` chunks of a segment from `first` > 0 on, or fewer: how many are not forgotten at its start, of the
    heads that `totals` are of.
    """

    def decay(totals, k):
        return totals[jnp.minimum(first + k, totals.shape[0]) - 1] - totals[first - 1]

    return count_remembered(totals, count, decay, simulated)


def count_forgotten(totals, count, most: int, end_of, simulated: bool) -> jax.Array:
    """How many of the first `count` pieces are forgotten at their end.

    Never one of which `count_remembered` left out all, however sums are rounded.

    Args:
      totals: of the head, as above.
      count: int32 [].
      most: a bound of it.
      end_of: from the number of a piece to that of its last chunk.
      simulated: as above.
    """
    end = end_of(jnp.maximum(count - 1, 0))

    def some(block, found):
        for k in range(_TESTS):
            number = block * _TESTS + k
            decay = totals[end] - totals[jnp.minimum(end_of(number), end)]
            found += jnp.where((number < count) & (decay < _FORGOTTEN + 1), 1, 0)
        return found

    return uniform(lax.fori_loop(0, -(-most // _TESTS), some, jnp.int32(0)), simulated)
