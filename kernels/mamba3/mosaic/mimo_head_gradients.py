"""One head's gradients in the Mosaic GPU MIMO backward, of queries or of keys.

Notation and the rules of shared memory as in mimo_gradients.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import mimo_pieces as mimo
from .mimo_mixing import fold, to_rows
from .mimo_pieces import (
    HALF_ROWS,
    POS,
    ROWS,
    column_blocks,
    join,
    positions,
    positions_layout,
    ranks_of_columns,
    split,
    spread,
    store_pair,
)
from .mimo_rotation import load_turns
from .mimo_turning import rates_of_chunk
from .mimo_weights import MIMO_O, MIMO_X, MIMO_Z, load_of_ranks
from .pieces import (
    COEFFICIENTS,
    DECAY,
    HALF,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    WG,
    N,
    P,
    S,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    meet,
    opaque_zero,
    pick,
    publish,
    read_out,
    rows,
    tile,
    widen,
)
from .wgmma import begin, product, settle

SIDES = QUERIES, KEYS = range(2)
# Rows of what is written per head and chunk, float32 by row of one rank of every pair (mimo_pieces.py): what L_i scales
# as a query, that of the same position with it; as a key, what passes through G and what goes to other positions; C·B
# times g·x of the same position; g·x of the same rank; the phase's part of Δ's gradient, of either side. Sums over
# pairs are still to be made.
VECTORS = 7
ALONG, THROUGH, WITHIN, SAME, OVERLAP, TURN = 0, 1, 2, 3, 4, (5, 6)
# And by coordinate, of H before the chunk and G: <G, H>, summed over both halves of them, and <G, J H> in two parts.
FLOWS = 2
FLOW, TURNED_FLOW = range(FLOWS)
# Of the gradients of weights of P.
OF_O, OF_Z, OF_X = range(3)
EARLY_SLOTS = 4


class Shared(NamedTuple):
    """Shared memory of a program; axes before those of one thing are slots, or sides."""

    raw: jax.Array  # sides
    rot: jax.Array  # two slots, sides
    states: jax.Array  # sides
    x: jax.Array  # two slots, as z and dy
    z: jax.Array | None
    dy: jax.Array  # without gate of all ranks
    values: jax.Array  # two slots; X and, with a gate, g of all ranks
    weighed: jax.Array  # products of B and C times what they count, rows are keys; with 4 ranks two slots
    overlaps: jax.Array  # of X and g, likewise
    ones: jax.Array
    turns: jax.Array  # two slots
    rates: jax.Array  # two slots, for chunks
    coefficients: jax.Array  # EARLY_SLOTS, as start
    start: jax.Array
    raw_here: jax.Array  # barriers of what arrives
    early_here: jax.Array
    values_here: jax.Array
    states_here: jax.Array
    ones_here: jax.Array
    full: jax.Array  # the others, see mimo_gradients.py
    empty: jax.Array
    used: jax.Array

    @staticmethod
    def types(ranks: int, gated: bool) -> "Shared":
        """What to allocate."""
        span = positions(ranks)

        def floats(*shape: int, dtype=jnp.float32):
            return plgpu.SMEM(shape, dtype)

        def barriers(arrivals: int = 1, number: int | None = None):
            return plgpu.Barrier(num_arrivals=arrivals, **({} if number is None else {"num_barriers": number}))

        return Shared(
            mimo.blocks(2), mimo.blocks(2, 2), tile(2, P, N), tile(2, span, P), tile(2, span, P) if gated else None,
            tile(2, span if gated else ROWS, P), tile(2, 1 + gated, ROWS, P),
            tile(ranks // 2, ROWS, ROWS), tile(ranks // 2, ROWS, ROWS),
            tile(2, 8, ROWS),
            floats(2, span, S, dtype=jnp.int32), rates_of_chunk(ranks, 2),
            floats(EARLY_SLOTS, COEFFICIENTS, span), floats(EARLY_SLOTS, S),
            barriers(ranks + 1), barriers(2, EARLY_SLOTS), barriers(2 + gated, 2), barriers(1, 2), barriers(),
            barriers(1, 2), barriers(2, 2), barriers(2),
        )  # fmt: skip


class Written(NamedTuple):
    """Where what a side finds of a head goes, in global memory; see `Gradients`."""

    value: jax.Array | None
    biases: jax.Array
    mimo: jax.Array
    vectors: jax.Array
    flows: jax.Array
    turned: jax.Array


class Head(NamedTuple):
    """A step's slots of shared memory; `mimo`: weights of P in global memory."""

    rows: tuple[jax.Array, jax.Array]  # rotated C and B
    values: tuple[jax.Array, jax.Array]  # g and X
    states: tuple[jax.Array, jax.Array]  # H and G
    weighed: jax.Array
    overlaps: jax.Array
    here: jax.Array
    turns: jax.Array
    rates: jax.Array
    mimo: jax.Array
    x: jax.Array
    z: jax.Array | None
    dy: jax.Array
    zero: jax.Array
    ranks: int
    simulated: bool

    def weights(self, kind: int) -> list[jax.Array]:
        """Of all ranks, [P] each."""
        return load_of_ranks(self.mimo, kind, self.simulated)

    def transposed(self, ref) -> jax.Array:
        """x, z or dy, [P, T] float32."""
        return widen(plgpu.load(ref.transpose((1, 0)), layout=WG), self.simulated)


def head_of(shared: Shared, step, of_rows, mimo_ref, number, ranks: int, simulated: bool) -> Head:
    """What both sides read of a step's head. `of_rows`: the slot of what a chunk's heads share."""
    zero = opaque_zero(simulated)
    slot, early, of_chunk = (zero + v for v in (lax.rem(step, 2), lax.rem(step, EARLY_SLOTS), of_rows))
    g = shared.dy.at[slot] if shared.z is None else shared.values.at[slot, 1]
    return Head(
        (shared.rot.at[slot, QUERIES], shared.rot.at[slot, KEYS]), (g, shared.values.at[slot, 0]),
        (shared.states.at[QUERIES + zero], shared.states.at[KEYS + zero]),
        *(v.at[slot if ranks == 4 else zero] for v in (shared.weighed, shared.overlaps)),
        shared.coefficients.at[early], shared.turns.at[slot], shared.rates.at[of_chunk], mimo_ref.at[number + zero],
        shared.x.at[slot], None if shared.z is None else shared.z.at[slot], shared.dy.at[slot], zero, ranks, simulated,
    )  # fmt: skip


def queries(head: Head, to: Written) -> jax.Array:
    """dC, [ROWS, N] as rotated; dz is left in z's place, and the gradients of mimo_o and mimo_z in `to`."""
    simulated, (c_rows, b_rows), (g, x), (state, _) = head.simulated, head.rows, head.values, head.states
    if head.z is not None:
        y = product(None, state, c_rows, simulated, b_t=True)
        of_z, of_o = head.weights(MIMO_Z), head.weights(MIMO_O)
        from_start = to_rows(jnp.exp2(load_cols(head.here.at[DECAY])))
        z, dy = head.transposed(head.z), head.transposed(head.dy)
        y = begin(settle(y, 0, simulated) * from_start, simulated)
        y = settle(product(y, x, head.weighed, simulated, a_t=True), 0, simulated)
        dz, sums = _of_gate(y, z, dy, of_z, of_o)
        head.z.transpose((1, 0))[...] = dz.astype(jnp.bfloat16)
        for kind, v in zip((OF_O, OF_Z), sums, strict=True):
            mimo.add_of_ranks(to.mimo.at[kind], v, simulated)
    from_start = jnp.exp2(load_rows(head.here.at[DECAY], positions_layout(head.ranks)))
    down = product(None, _scaled(g, from_start, simulated), state, simulated)
    return settle(product(down, head.overlaps, b_rows, simulated, a_t=True), 0, simulated)


class Through(NamedTuple):
    """What `keys` has found of the part of dB through G."""

    dphase: jax.Array  # by position, pair of ranks and phase
    turning: list[jax.Array]  # the half of B that rotates, by rank of a pair, float32


def keys(head: Head, to: Written) -> tuple[jax.Array, Through]:
    """dB likewise, and more of its part through G; dx is left in x's place, the gradient of mimo_x in `to`."""
    simulated, (c_rows, b_rows), (g, x), (state, grad) = head.simulated, head.rows, head.values, head.states
    dx = product(None, grad, b_rows, simulated, b_t=True)
    flows = [
        product(None, grad.at[:, half], state.at[:, half], simulated, a_t=True)
        for half in (pl.ds(0, HALF), pl.ds(HALF, HALF))
    ]
    of_x, x_wide = head.weights(MIMO_X), head.transposed(head.x)
    dx = begin(settle(dx, 2, simulated) * to_rows(load_cols(head.here.at[TO_END])), simulated)
    _write_flows(*(settle(v, 0, simulated) for v in flows), to.flows, simulated)
    dx = product(dx, g, head.weighed, simulated, a_t=True, b_t=True)
    to_end = load_rows(head.here.at[TO_END], positions_layout(head.ranks))
    down = product(None, _scaled(x, to_end, simulated), grad, simulated)
    value, sums = _of_x(settle(dx, 1, simulated), x_wide, of_x)
    head.x.transpose((1, 0))[...] = value.astype(jnp.bfloat16)
    mimo.add_of_ranks(to.mimo.at[OF_X], sums, simulated)
    down = settle(down, 0, simulated)
    turning = _load_half(b_rows, 0, simulated)
    along, dphase, _ = _turning(b_rows, down, turning, simulated)
    to.vectors[THROUGH] = jnp.sum(along, axis=1)
    down = settle(product(begin(down, simulated), head.overlaps, c_rows, simulated), 0, simulated)
    return down, Through(dphase, turning)


def not_before(ranks: int, simulated: bool) -> jax.Array:
    """1 where the column's position is not before the row's, else 0: bfloat16, [32, positions]. `finish` takes it."""
    row, column = mimo.iotas(opaque_zero(simulated), ranks)
    return spread(jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16), simulated)


def finish(
    side: int, shared: Shared, head: Head, to: Written, later: jax.Array, down: jax.Array, through: Through | None,
    carry, leave: Callable,
):  # fmt: skip
    """Turns dC or dB back, into the sums over heads that `carry` holds (also of dω). `leave`: once both are found."""
    ranks, simulated, own = head.ranks, head.simulated, head.rows[side]
    total, domega = carry
    publish(simulated)  # dz or dx
    plgpu.barrier_arrive(shared.used)
    layout = positions_layout(ranks)
    turning = _load_half(own, 0, simulated) if side == QUERIES else through.turning
    along, dphase, parts = _turning(own, down, turning, simulated, side == QUERIES)
    cos, sin = load_turns(head.turns, ranks, simulated)
    back = [
        jnp.concatenate([real * cos + imag * sin, imag * cos - real * sin, rest], axis=1) for real, imag, rest in parts
    ]
    total = total + join(*back, simulated)
    if side == QUERIES:
        to.vectors[ALONG] = jnp.sum(along, axis=1)
    plgpu.barrier_wait(shared.used)
    leave()
    for columns in range(2):
        part = slice(64 * columns, 64 * columns + 64)
        store_pair(own, columns, *(v[:, part].astype(jnp.bfloat16) for v in back), simulated)
    dphase_tile = (head.weighed.at[pl.ds(0, HALF_ROWS)], head.overlaps)[side]
    if side == KEYS:
        _store_parts(head.overlaps.at[pl.ds(HALF_ROWS, HALF_ROWS)], through.dphase, simulated)
    _store_parts(dphase_tile.at[pl.ds(0, HALF_ROWS)], dphase, simulated)
    publish(simulated)
    meet(simulated, side)  # staged
    later = jnp.concatenate([later] * (ranks // 2), axis=1)  # of the positions of every pair
    if side == KEYS:  # and, of what passes through G, of all positions
        zeros, ones = (jnp.full_like(later, v) for v in (0, 1))
        sums = jnp.concatenate([later, zeros], axis=1), jnp.concatenate([zeros, ones], axis=1)
    else:
        sums = later, later
    phase = product(None, join(*sums, simulated), dphase_tile, simulated)
    found = None
    for k in range(2):
        found = product(found, own.at[:, :, k], shared.ones.at[k], simulated, a_t=True, b_t=True)
    step = _along_rows(head, STEP_HIGH) + _along_rows(head, STEP_LOW)
    rates = [spread(widen(load_tile(head.rates.at[k], layout), simulated, layout), simulated) for k in range(2)]
    phase, passed = (v[:, :S] + v[:, S:] for v in split(settle(phase, 2, simulated), simulated))
    if side == KEYS:
        mimo.store_row(to.turned, passed, simulated)
    to.vectors[TURN[side]] = jnp.sum(phase * (rates[0] + rates[1]), axis=1) * (2 / ranks)  # every pair has the sum
    mimo.add_counted(to.biases, settle(found, 0, simulated), simulated)
    read_out(simulated, side)
    return total, domega + step * phase


def _load_half(own, columns: int, simulated: bool) -> list[jax.Array]:
    """64 columns of rows, float32 by rank of a pair."""
    return [widen(v, simulated, POS) for v in mimo.load_pair(own, columns, simulated)]


def _turning(own, down: jax.Array, turning: list[jax.Array], simulated: bool, whole: bool = True):
    """Rows times their gradients, as sums over columns, and by phase, [32, S]; and parts of the gradients by rank.

    The first, found if `whole`, is still to be added up along rows. The parts: real, imaginary, the rest. `turning`: as
    `Through` has it.
    """
    dphase, along, parts = 0.0, 0.0, []
    rests = _load_half(own, 1, simulated) if whole else (None, None)
    for part, v, rest in zip(split(down, simulated), turning, rests, strict=True):
        real, imag = part[:, :S], part[:, S : 2 * S]
        dphase += imag * v[:, :S] - real * v[:, S:]
        if whole:
            along += fold(part[:, : 2 * S] * v) + fold(part[:, 2 * S :] * rest)
        parts.append((real, imag, part[:, 2 * S :]))
    return along, dphase, parts


def _store_parts(ref, v: jax.Array, simulated: bool) -> None:
    """[32, S] in two bfloat16 parts, side by side."""
    high = v.astype(jnp.bfloat16)
    low = (v - widen(high, simulated, POS)).astype(jnp.bfloat16)
    ref[...] = jnp.concatenate([high, low], axis=1)


def _write_flows(turned: jax.Array, rest: jax.Array, out, simulated: bool) -> None:
    """What FLOWS says: diagonals of products of G and H over P, [N / 2, N / 2] each."""
    row, column = iotas()
    out[FLOW] = pick(turned, row, column, 0, simulated) + pick(rest, row, column, 0, simulated)
    out[TURNED_FLOW] = pick(turned, row, column, S, simulated)


def _scaled(ref, scale: jax.Array, simulated: bool) -> jax.Array:
    """X or g [ROWS, P], times what their positions are scaled by."""
    scale = spread(rows(scale.astype(jnp.bfloat16), P), simulated)
    return join(*(part * scale for part in split(load_tile(ref), simulated)), simulated)


def _along_rows(head: Head, kind: int) -> jax.Array:
    """A coefficient of positions, [32, S]."""
    return spread(rows(load_rows(head.here.at[kind], positions_layout(head.ranks)), S), head.simulated)


def _of_gate(y: jax.Array, z: jax.Array, dy: jax.Array, of_z: list[jax.Array], of_o: list[jax.Array]):
    """dz [P, T], and what adds up, along rows, to the gradients of mimo_o and mimo_z by rank, [P, 8] each.

    y: [P, ROWS]; z, dy: [P, T].
    """
    zs, dys, ranks = column_blocks(z), column_blocks(dy), len(of_z)
    dz, by_o, by_z = [0.0] * len(zs), [0.0] * ranks, [0.0] * ranks
    both = [2 * z_weight * o_weight for z_weight, o_weight in zip(of_z, of_o, strict=True)]
    for part, (rank, at) in zip(column_blocks(y), ranks_of_columns(ranks), strict=True):
        half = zs[at] * rows(of_z[rank], 8)
        tanh = jnp.tanh(half)
        silu, gate = half * tanh + half, 0.5 * tanh + 0.5
        v = dys[at] * part
        by_o[rank] += v * silu
        v = v * (gate + (silu - silu * gate))
        by_z[rank] += v * zs[at]
        dz[at] += v * rows(both[rank], 8)
    by_z = [v * rows(weight, 8) for v, weight in zip(by_z, of_o, strict=True)]
    return jnp.concatenate(dz, axis=1), (by_o, by_z)


def _of_x(dx: jax.Array, x: jax.Array, of_x: list[jax.Array]):
    """The gradient of x [P, T], and of mimo_x likewise. dx: [P, ROWS]; x: [P, T]."""
    xs, ranks = column_blocks(x), len(of_x)
    value, by_x = [0.0] * len(xs), [0.0] * ranks
    for part, (rank, at) in zip(column_blocks(dx), ranks_of_columns(ranks), strict=True):
        by_x[rank] += part * xs[at]
        value[at] += part * rows(of_x[rank], 8)
    return jnp.concatenate(value, axis=1), by_x
