"""The two sides of a head in the Mosaic GPU MIMO forward: one multiplies, the other rotates for it.

Notation and the rules of shared memory as in mimo_forward.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import mimo_pieces as mimo
from . import mimo_weights as of
from .mimo_mixing import mixing, skips_of, to_end_of, weigh
from .mimo_pieces import POS, ROWS, join, positions, positions_layout, split, spread
from .mimo_turning import rates_of_chunk, rotate, turn
from .pieces import COEFFICIENTS, DECAY, OTHER, N, P, S, load_cols, load_rows, load_tile, opaque_zero, rows, tile, widen
from .wgmma import begin, product, settle

LATE = 4  # the first coefficients, of which the side of products needs three; copies begin at multiples of 128 bytes


class Shared(NamedTuple):
    """Shared memory of a program; [heads, slots, ...] but for what both heads read."""

    raw_b: jax.Array
    raw_c: jax.Array
    rates: jax.Array
    b: jax.Array  # rotated
    c: jax.Array  # rotated, no slots
    h: jax.Array  # no slots
    x_rows: jax.Array  # of all ranks
    x: jax.Array  # no slots, as z and y
    z: jax.Array | None
    y: jax.Array  # without gate of all ranks
    late: jax.Array
    early: jax.Array
    start: jax.Array
    b_here: jax.Array  # barriers of what arrives
    c_here: jax.Array
    x_here: jax.Array
    z_here: jax.Array | None
    late_here: jax.Array
    early_here: jax.Array
    full: jax.Array  # the others, see mimo_forward.py
    b_empty: jax.Array
    c_empty: jax.Array
    b_free: jax.Array
    c_free: jax.Array
    sums: jax.Array | None = None  # over one pair of two

    @staticmethod
    def types(ranks: int, together: int, gated: bool) -> "Shared":
        """What to allocate for so many heads."""
        span = positions(ranks)

        def barriers(*number: int, arrivals: int = 1):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        def floats(*shape: int):
            return plgpu.SMEM(shape, jnp.float32)

        return Shared(
            mimo.blocks(1), mimo.blocks(1), rates_of_chunk(ranks, 1), mimo.blocks(together, 2), mimo.blocks(together),
            tile(together, P, N), tile(together, 2, ROWS, P), tile(together, span, P),
            tile(together, span, P) if gated else None, tile(together, span if gated else ROWS, P),
            floats(together, 2, LATE, span), floats(together, 2, COEFFICIENTS, span), floats(together, 2, S),
            plgpu.Barrier(num_arrivals=ranks // 2 + 1), plgpu.Barrier(num_arrivals=ranks // 2), barriers(together),
            barriers(together) if gated else None, barriers(together, 2), barriers(together, 2, arrivals=2),
            barriers(together), barriers(together, 2), barriers(together), plgpu.Barrier(num_arrivals=together),
            plgpu.Barrier(num_arrivals=together), floats(together, span, P) if gated and ranks == 4 else None,
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
    place: Place, shared: Shared, state: jax.Array, z_ref, coefficient_ref, weight_ref, d_ref, y_ref, saved_ref
) -> jax.Array:
    """The products' side of a head. `state`: H before the first chunk; returns it after the last.

    Without `z_ref` and its gate, `y_ref` gets y of all ranks of a chunk as its rows.
    """
    index, head, own, first, count, ranks, simulated = place
    span, layout = positions(ranks), positions_layout(ranks)

    def get_late(ci):
        to, here = shared.late.at[own, lax.rem(ci, 2)], shared.late_here.at[own, lax.rem(ci, 2)]
        plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, first + ci, pl.ds(0, LATE)], to, here)

    def get_z(ci):
        plgpu.copy_gmem_to_smem(z_ref.at[index, place.span(ci), head], shared.z.at[own], shared.z_here.at[own])

    get_late(0)
    if z_ref is not None:
        get_z(0)
    shared.h[own] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()
    skip = d_ref[head]

    def one_chunk(ci, state):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        narrow_h, late = shared.h.at[mine], shared.late.at[mine, slot]
        c_rows, b_rows, x_rows = shared.c.at[mine], shared.b.at[mine, slot], shared.x_rows.at[mine, slot]
        weight = functools.partial(of.load_weight, weight_ref.at[head + mine - own], ranks=ranks, simulated=simulated)
        plgpu.barrier_wait(shared.late_here.at[own, slot])
        plgpu.barrier_wait(shared.full.at[own])
        if saved_ref is not None:
            plgpu.copy_smem_to_gmem(shared.h.at[own], saved_ref.at[index, head, first + ci])
        scores = product(None, c_rows, b_rows, simulated, b_t=True)
        y = product(None, c_rows, narrow_h, simulated, b_t=True)
        decay = load_rows(late.at[DECAY], layout)
        end = late[DECAY, span - 1]
        row, column = mimo.iotas(mine - own, ranks)
        mix = spread(mixing(False, late, row, column, ranks), simulated)
        skips = skips_of(skip, mine - own)
        from_start = spread(rows(jnp.exp2(decay), P), simulated)
        to_end = jnp.exp2(end - load_cols(late.at[OTHER])).astype(jnp.bfloat16)
        scores = weigh(settle(scores, 1, simulated), mix, simulated, skips)
        y = split(settle(y, 0, simulated), simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.c_empty.at[own]))
        y = product(begin(join(*(v * from_start for v in y), simulated), simulated), scores, x_rows, simulated)
        state = product(begin(state * jnp.exp2(end), simulated), to_end_of(x_rows, to_end), b_rows, simulated)
        total = settle(y, 1, simulated)
        if z_ref is not None:
            plgpu.barrier_wait(shared.z_here.at[own])
            z_rows = spread(load_tile(shared.z.at[mine], layout), simulated)
            total = _gate(total, z_rows, weight, simulated)
        if shared.sums is not None:
            mimo.send_partial(shared.sums.at[mine], total, simulated)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # B: this, too, makes the warps meet

        @pl.when(ci + 1 < count)
        def _():
            if z_ref is not None:
                get_z(ci + 1)
            get_late(ci + 1)

        if shared.sums is not None:
            mimo.store_sum(shared.y.at[mine], shared.sums.at[mine], total, simulated)
        else:
            shared.y[mine] = total.astype(jnp.bfloat16)
        state = settle(state, 0, simulated)
        pl.when(ci + 2 < count)(lambda: plgpu.barrier_arrive(shared.b_empty.at[own, slot]))
        shared.h[mine] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()  # C
        to = (index, head, first + ci) if z_ref is None else (index, place.span(ci), head)
        plgpu.copy_smem_to_gmem(shared.y.at[own], y_ref.at[to])
        return state

    return lax.fori_loop(0, count, one_chunk, state)


def rotate_ahead(
    place: Place, shared: Shared, x_ref, coefficient_ref, start_ref, weight_ref, get_b: Callable, get_c: Callable,
    together: int,
) -> None:  # fmt: skip
    """The side of a head that rotates; that of a program's first asks for B and C, `get_b` and `get_c` of a chunk."""
    index, head, own, first, count, ranks, simulated = place
    layout = positions_layout(ranks)

    def get_x(ci):
        plgpu.copy_gmem_to_smem(x_ref.at[index, place.span(ci), head], shared.x.at[own], shared.x_here.at[own])

    def get_early(ci):
        at, slot = (index, head, first + ci), (own, lax.rem(ci, 2))
        plgpu.copy_gmem_to_smem(coefficient_ref.at[at], shared.early.at[slot], shared.early_here.at[slot])
        plgpu.copy_gmem_to_smem(start_ref.at[at], shared.start.at[slot], shared.early_here.at[slot])

    get_early(0)
    get_x(0)
    pl.when(count > 1)(lambda: get_early(1))

    @pl.when(own == 0)
    def _():
        get_b(0)
        get_c(0)

    def one_chunk(ci, _):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        zero = mine - own
        weight = functools.partial(of.load_weight, weight_ref.at[head + zero], ranks=ranks, simulated=simulated)
        plgpu.barrier_wait(shared.early_here.at[own, slot])
        plgpu.barrier_wait(shared.b_here)
        row, column = mimo.iotas(zero, ranks)
        phases = shared.early.at[mine, slot], shared.start.at[mine, slot], shared.rates.at[zero]

        def expand():
            pl.when(ci >= 2)(lambda: plgpu.barrier_wait(shared.b_empty.at[own, slot]))
            plgpu.barrier_wait(shared.x_here.at[own])
            _expand(shared.x.at[mine], shared.x_rows.at[mine, slot], weight, layout, simulated)

        cos, sin = turn(*phases, row, column, ranks, simulated, expand)
        rotate(shared.raw_b.at[zero], shared.b.at[mine, slot], of.B_BIAS, of.B_REST, weight, cos, sin, simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.b_free))

        @pl.when((own == 0) & (ci + 1 < count))
        def _():
            plgpu.barrier_wait(shared.b_free)
            get_b(ci + 1)

        plgpu.barrier_wait(shared.c_here)
        pl.when(ci >= 1)(lambda: plgpu.barrier_wait(shared.c_empty.at[own]))
        rotate(shared.raw_c.at[zero], shared.c.at[mine], of.C_BIAS, of.C_REST, weight, cos, sin, simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.c_free))
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.full.at[own])

        @pl.when(ci + 1 < count)
        def _():
            get_x(ci + 1)
            pl.when(ci + 2 < count)(lambda: get_early(ci + 2))

        @pl.when((own == 0) & (ci + 1 < count))
        def _():
            plgpu.barrier_wait(shared.c_free)
            get_c(ci + 1)

        return 0

    lax.fori_loop(0, count, one_chunk, 0)


def _expand(x_here, x_rows, weight, layout, simulated: bool) -> None:
    """x of every rank."""
    wide = spread(widen(load_tile(x_here, layout), simulated, layout), simulated)
    x_rows[...] = join(*((wide * weight(k, of.MIMO_X)).astype(jnp.bfloat16) for k in range(2)), simulated)


def _gate(y: jax.Array, z: jax.Array, weight, simulated: bool) -> jax.Array:
    """Σ y silu(z) mimo_o over a pair of ranks: [32, P]."""
    z, total = widen(z, simulated, POS), None
    for k, y_rank in enumerate(split(y, simulated)):
        half = z * weight(k, of.MIMO_Z)  # of z
        out = y_rank * (half * jnp.tanh(half) + half) * weight(k, of.MIMO_O)
        total = out if total is None else total + out
    return total
