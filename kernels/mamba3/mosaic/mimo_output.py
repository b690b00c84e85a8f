"""The two sides of a head in the Mosaic GPU MIMO forward: one multiplies, the other rotates for it.

Notation and the rules of shared memory as in mimo_forward.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import mimo_pieces as mimo
from . import mimo_weights as of
from .mimo_mixing import expand, mixing, skips_of, to_rows, weigh
from .mimo_pieces import ROWS, column_blocks, positions, ranks_of_columns, spread
from .mimo_rotation import load_biases, own_angles, rotate_rows, store_turns
from .mimo_turning import get_rates, phases, rates_of_chunk
from .pieces import (
    COEFFICIENTS,
    DECAY,
    OTHER,
    WG,
    N,
    P,
    S,
    cos_sin,
    load_cols,
    opaque_zero,
    publish,
    rows,
    tile,
    widen,
)
from .wgmma import begin, product, settle

C_SLOT = 2  # of rotated rows, after two of B
LATE = 4  # the first coefficients, of which the side of products needs three; copies begin at multiples of 128 bytes


class Shared(NamedTuple):
    """Shared memory of a program; [heads, slots, ...] but for what both heads read."""

    raw: jax.Array  # B and C
    rates: jax.Array
    rotated: jax.Array  # B in two slots, then C
    weighed: jax.Array  # products of C and B times what they count; no slots, as x, z, y and h
    x: jax.Array
    z: jax.Array | None
    y: jax.Array  # without gate of all ranks
    h: jax.Array | None  # if it is saved
    turns: jax.Array
    late: jax.Array
    early: jax.Array
    start: jax.Array
    raw_here: jax.Array  # barriers of what arrives
    x_here: jax.Array
    z_here: jax.Array | None
    late_here: jax.Array
    early_here: jax.Array
    rates_here: jax.Array
    turned: jax.Array  # the others, see mimo_forward.py
    full: jax.Array
    empty: jax.Array

    @staticmethod
    def types(ranks: int, together: int, gated: bool, save: bool) -> "Shared":
        """What to allocate for so many heads."""
        span = positions(ranks)

        def barriers(*number: int, arrivals: int = 1):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        def floats(*shape: int):
            return plgpu.SMEM(shape, jnp.float32)

        return Shared(
            mimo.blocks(2), rates_of_chunk(ranks), mimo.blocks(together, 3), tile(together, ROWS, ROWS),
            tile(together, span, P), tile(together, span, P) if gated else None,
            tile(together, span if gated else ROWS, P), tile(together, P, N) if save else None,
            plgpu.SMEM((together, 2, span, S), jnp.int32),
            floats(together, 2, LATE, span), floats(together, 2, COEFFICIENTS, span), floats(together, 2, S),
            barriers(2, arrivals=ranks // 2), barriers(together), barriers(together) if gated else None,
            barriers(together, 2), barriers(together, 2, arrivals=2), plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=together), barriers(together, 2, arrivals=together), barriers(together, 3),
        )  # fmt: skip


class Place(NamedTuple):
    """What a warpgroup works on."""

    index: jax.Array  # of the batch
    head: jax.Array
    own: jax.Array  # number of the head in its program
    first: jax.Array  # chunk
    count: jax.Array  # of chunks
    ranks: int
    simulated: bool

    def span(self, ci: jax.Array):
        """Positions of a chunk."""
        size = positions(self.ranks)
        return pl.ds((self.first + ci) * size, size)


def multiply(
    place: Place, shared: Shared, state: jax.Array, x_ref, z_ref, coefficient_ref, mimo_ref, d_ref, y_ref, saved_ref
) -> jax.Array:
    """The products' side of a head. `state`: H before the first chunk; returns it after the last.

    Without `z_ref` and its gate, `y_ref` gets y of all ranks of a chunk as its rows.
    """
    index, head, own, first, count, ranks, simulated = place
    span = positions(ranks)

    def get_late(ci):
        to, here = shared.late.at[own, lax.rem(ci, 2)], shared.late_here.at[own, lax.rem(ci, 2)]
        plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, first + ci, pl.ds(0, LATE)], to, here)

    def get_x(ci):
        plgpu.copy_gmem_to_smem(x_ref.at[index, place.span(ci), head], shared.x.at[own], shared.x_here.at[own])

    def get_z(ci):
        plgpu.copy_gmem_to_smem(z_ref.at[index, place.span(ci), head], shared.z.at[own], shared.z_here.at[own])

    def weights(kind, zero=0):
        return of.load_of_ranks(mimo_ref.at[head + zero], kind, simulated)

    get_late(0)
    get_x(0)
    if z_ref is not None:
        get_z(0)
    skip, of_x = d_ref[head], weights(of.MIMO_X)

    def one_chunk(ci, state):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        zero = mine - own
        late, weighed = shared.late.at[mine, slot], shared.weighed.at[mine]
        b_rows, c_rows = shared.rotated.at[mine, slot], shared.rotated.at[mine, C_SLOT]
        narrow = state.astype(jnp.bfloat16)
        if saved_ref is not None:
            shared.h[mine] = narrow
        plgpu.barrier_wait(shared.full.at[own, slot])
        y = product(None, narrow, c_rows, simulated, b_t=True)
        plgpu.barrier_wait(shared.late_here.at[own, slot])
        end = late[DECAY, span - 1]
        mix = spread(mixing(False, late, *mimo.iotas(zero, ranks), ranks), simulated)
        skips = skips_of(skip, zero)
        from_start = jnp.exp2(load_cols(late.at[DECAY]))
        to_end = jnp.exp2(end - load_cols(late.at[OTHER])).astype(jnp.bfloat16)
        y = begin(settle(y, 0, simulated) * to_rows(from_start), simulated)
        scores = settle(product(None, c_rows, b_rows, simulated, b_t=True), 0, simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.empty.at[own, C_SLOT]))
        weighed[...] = weigh(scores, mix, simulated, skips)
        plgpu.barrier_wait(shared.x_here.at[own])
        x = expand(plgpu.load(shared.x.at[mine].transpose((1, 0)), layout=WG), of_x, simulated)
        if z_ref is not None:
            plgpu.barrier_wait(shared.z_here.at[own])
            z = plgpu.load(shared.z.at[mine].transpose((1, 0)), layout=WG)
        publish(simulated)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # B: this, too, makes the warps meet

        @pl.when(ci + 1 < count)
        def _():
            get_x(ci + 1)
            if z_ref is not None:
                get_z(ci + 1)
            get_late(ci + 1)

        if saved_ref is not None:
            plgpu.copy_smem_to_gmem(shared.h.at[own], saved_ref.at[index, first + ci, head])
        y = product(y, x, weighed, simulated, b_t=True)
        state = product(begin(state * jnp.exp2(end), simulated), x * to_rows(to_end), b_rows, simulated)
        y = settle(y, 1, simulated)
        if z_ref is not None:
            y = _gate(y, widen(z, simulated), weights(of.MIMO_Z, zero), weights(of.MIMO_O, zero))
        shared.y.at[mine].transpose((1, 0))[...] = y.astype(jnp.bfloat16)
        state = settle(state, 0, simulated)
        pl.when(ci + 2 < count)(lambda: plgpu.barrier_arrive(shared.empty.at[own, slot]))
        if saved_ref is None:
            plgpu.commit_smem()  # C
        else:
            publish(simulated)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # C
        to = (index, head, first + ci) if z_ref is None else (index, place.span(ci), head)
        plgpu.copy_smem_to_gmem(shared.y.at[own], y_ref.at[to])
        return state

    return lax.fori_loop(0, count, one_chunk, state)


def rotate_ahead(
    place: Place, shared: Shared, coefficient_ref, rate_ref, start_ref, weight_ref, get_raw: Callable, together: int
) -> None:
    """The side that rotates: of two heads, the first's warpgroup B of both, the second's C; of a single one, both.

    `get_raw` asks for B (0) or C (1) of a chunk.
    """
    index, head, own, first, count, ranks, simulated = place

    def get_early(ci):
        at, slot = (index, head, first + ci), (own, lax.rem(ci, 2))
        plgpu.copy_gmem_to_smem(coefficient_ref.at[at], shared.early.at[slot], shared.early_here.at[slot])
        plgpu.copy_gmem_to_smem(start_ref.at[at], shared.start.at[slot], shared.early_here.at[slot])

    def ask_for_rates(ci):
        pl.when(own == 0)(lambda: get_rates(rate_ref, index, first + ci, shared.rates, shared.rates_here))

    matrices, heads = ((own,), (0, 1)) if together == 2 else ((0, 1), (0,))
    get_early(0)
    ask_for_rates(0)
    pl.when(count > 1)(lambda: get_early(1))
    for matrix in matrices:
        get_raw(matrix, 0)
    biases = [
        [load_biases(weight_ref.at[head - own + k], jnp.int32(matrix), ranks, simulated) for k in heads]
        for matrix in matrices
    ]

    def rotate(ci, matrix, biases, turns, zero):
        to, slots = jnp.where(matrix == 0, lax.rem(ci, 2), C_SLOT), jnp.where(matrix == 0, 2, 1)
        plgpu.barrier_wait(shared.raw_here.at[matrix])
        for k in heads:
            pl.when(ci >= slots)(lambda k=k: plgpu.barrier_wait(shared.empty.at[k, to]))
        outs = [shared.rotated.at[k + zero, to] for k in heads]
        rotate_rows([shared.raw.at[matrix + zero]] * len(heads), outs, biases, turns, ranks, simulated)

    def one_chunk(ci, _):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        zero = mine - own
        plgpu.barrier_wait(shared.early_here.at[own, slot])
        plgpu.barrier_wait(shared.rates_here)
        given = shared.early.at[mine, slot], shared.start.at[mine, slot], shared.rates
        angle = own_angles(phases(*given, *mimo.iotas(zero, ranks), ranks, simulated), ranks, simulated)
        store_turns(shared.turns.at[mine, slot], *cos_sin(angle, simulated), ranks, simulated)
        plgpu.barrier_arrive(shared.turned)
        plgpu.barrier_wait(shared.turned)
        pl.when(ci + 1 < count)(lambda: ask_for_rates(ci + 1))
        turns = [shared.turns.at[k + zero, slot] for k in heads]
        for matrix, of_heads in zip(matrices, biases, strict=True):
            rotate(ci, matrix, of_heads, turns, zero)
        plgpu.commit_smem()  # D
        for k in heads:
            plgpu.barrier_arrive(shared.full.at[k, slot])

        @pl.when(ci + 1 < count)
        def _():
            for matrix in matrices:
                get_raw(matrix, ci + 1)
            pl.when(ci + 2 < count)(lambda: get_early(ci + 2))

        return 0

    lax.fori_loop(0, count, one_chunk, 0)


def _gate(y: jax.Array, z: jax.Array, of_z: list[jax.Array], of_o: list[jax.Array]) -> jax.Array:
    """Σ y silu(z mimo_z) mimo_o over ranks, [P, ROWS] → [P, T]; z: [P, T]."""
    eights, totals = column_blocks(z), [0.0] * (z.shape[1] // 8)
    for part, (rank, at) in zip(column_blocks(y), ranks_of_columns(len(of_z)), strict=True):
        half = eights[at] * rows(of_z[rank], 8)
        totals[at] += part * (half * jnp.tanh(half) + half) * rows(of_o[rank], 8)
    return jnp.concatenate(totals, axis=1)
