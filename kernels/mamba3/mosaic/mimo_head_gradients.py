"""One head's gradients in the Mosaic GPU MIMO backward, of queries or of keys.

Notation and the rules of shared memory as in mimo_gradients.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from . import mimo_pieces as mimo
from . import mimo_weights as of
from .mimo_mixing import fold, mixing, over_ranks, weigh
from .mimo_pieces import HALF_ROWS, POS, ROWS, join, positions, positions_layout, split, spread, store_pair
from .mimo_turning import rates_of_chunk, rotate, turn
from .pieces import (
    COEFFICIENTS,
    DECAY,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    N,
    P,
    S,
    load_rows,
    load_tile,
    meet,
    opaque_zero,
    publish,
    rows,
    tile,
    widen,
)
from .products import stash_turns, unstash_turns
from .wgmma import begin, product, settle

SIDES = QUERIES, KEYS = range(2)
# Rows of what a side writes per head and chunk, float32 by row of one rank of every pair (mimo_pieces.py): what L_i
# scales as a query or as a key; of queries, C·B times g·x of the same position; of keys, g·x of the same rank; the
# phase's part of Δ's gradient. Sums over pairs are still to be made.
VECTORS = 4
ALONG, SAME, OVERLAP, TURN = range(VECTORS)
# Of the gradients of weights of P.
OF_O, OF_Z, OF_X = range(3)


class Shared(NamedTuple):
    """Shared memory of a program; axes before those of one thing are its sides, or slots for two heads (and sides)."""

    raw: jax.Array
    rot: jax.Array
    states: jax.Array  # slots, sides
    x: jax.Array  # slots, as z and dy
    z: jax.Array | None
    dy: jax.Array  # without gate of all ranks
    values: jax.Array  # g and X of all ranks
    staged: jax.Array  # for sums over positions
    dphase: jax.Array  # in two parts; with 4 ranks, before it, sums over one pair of two
    ones: jax.Array
    turns: jax.Array  # cos and sin
    rates: jax.Array
    coefficients: jax.Array  # slots, as start and weights
    start: jax.Array
    weights: jax.Array
    raw_here: jax.Array  # barriers of what arrives
    here: jax.Array  # slots
    free: jax.Array
    ready: jax.Array
    turned: jax.Array
    sums: jax.Array | None = None  # the interpreter's

    @staticmethod
    def types(ranks: int, gated: bool, simulated: bool) -> "Shared":
        """What to allocate."""
        span, floats = positions(ranks), functools.partial(plgpu.SMEM, dtype=jnp.float32)
        return Shared(
            mimo.blocks(2), mimo.blocks(2), tile(2, 2, P, N), tile(2, span, P), tile(2, span, P) if gated else None,
            tile(2, span if gated else ROWS, P), tile(2, ROWS, P), mimo.blocks(2),
            tile(2 if ranks == 4 else 1, HALF_ROWS, 2 * S), tile(2, 8, ROWS),
            floats((2, HALF_ROWS, S) if simulated else (HALF_ROWS, S)), rates_of_chunk(ranks),
            floats((2, COEFFICIENTS, span)), floats((2, S)), floats((2, ranks, of.WEIGHTS, P)),
            plgpu.Barrier(num_arrivals=ranks + 2), plgpu.Barrier(num_arrivals=7 + gated, num_barriers=2),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2), plgpu.Barrier(),
            floats((2, span, P)) if simulated and ranks == 4 else None,
        )  # fmt: skip


class Written(NamedTuple):
    """Where what a side finds of a head goes, in global memory; see `Gradients`."""

    value: jax.Array | None
    biases: jax.Array
    mimo: jax.Array  # of the side
    vectors: jax.Array


def one_head(side: int, slot, shared: Shared, to: Written, skip, carry, ranks: int, simulated: bool):
    """All of a head's gradients of one side; `carry` and what is returned: sums over heads of dC or dB, and of dω."""
    total, domega = carry
    zero = opaque_zero(simulated)
    here, x_tile, dy_tile = (v.at[slot + zero] for v in (shared.coefficients, shared.x, shared.dy))
    z_tile = None if shared.z is None else shared.z.at[slot + zero]
    own, other, state = shared.rot.at[side + zero], shared.rot.at[1 - side + zero], shared.states.at[slot + zero, side]
    weight = functools.partial(of.load_weight, shared.weights.at[slot + zero], ranks=ranks, simulated=simulated)
    row, column = mimo.iotas(zero, ranks)

    if side == KEYS:
        cos, sin = turn(here, shared.start.at[slot], shared.rates, row, column, ranks, simulated)
        stash_turns(shared.turns, cos, sin, simulated, POS)
        plgpu.barrier_arrive(shared.turned)
        x = _load(x_tile, ranks, simulated)
        values = [(x * weight(k, of.MIMO_X)).astype(jnp.bfloat16) for k in range(2)]
    else:
        if z_tile is None:
            values = split(load_tile(dy_tile), simulated)
        else:
            values = _gated(z_tile, dy_tile, weight, ranks, simulated)
        plgpu.barrier_wait(shared.turned)
        cos, sin = unstash_turns(shared.turns, simulated, POS)
    shared.values.at[side + zero][...] = join(*values, simulated)
    biases = (of.C_BIAS, of.C_REST) if side == QUERIES else (of.B_BIAS, of.B_REST)
    rotate(shared.raw.at[side + zero], own, *biases, weight, cos, sin, simulated)
    publish(simulated)
    plgpu.barrier_arrive(shared.ready)
    meet(simulated)
    y = product(None, own, state, simulated, b_t=True)  # needs nothing of the other side
    plgpu.barrier_wait(shared.ready)

    of_values, narrow, scale = _through_scores(
        side, own, other, y, values, shared.values.at[1 - side + zero], here, row, column, skip, to.vectors, ranks,
        simulated,
    )  # fmt: skip
    staged = shared.staged.at[side + zero]
    value_tile, value, for_sums = None, None, ()
    if side == KEYS:
        value_tile = x_tile
        value, for_sums = _of_x(of_values, _load(x_tile, ranks, simulated), weight)
    elif z_tile is not None:
        value_tile = z_tile
        value, for_sums = _of_gate(of_values, _load(z_tile, ranks, simulated), _load(dy_tile, ranks, simulated), weight)
    for columns, both in enumerate(for_sums):
        store_pair(staged, columns, *both, simulated)
    sums = (shared.sums if simulated else shared.dphase).at[side] if ranks == 4 else None
    # With 2 ranks there is no room for both, but dy is not needed any more.
    dy_place = dy_tile.at[pl.ds(0, HALF_ROWS)]
    dphase_tile = dy_place if ranks == 2 and side == QUERIES else shared.dphase.at[zero + (side if ranks == 4 else 0)]
    if ranks == 4 and value_tile is not None:
        mimo.send_partial(sums, value, simulated)
    down = product(None, join(*(v * scale for v in values), simulated), state, simulated)
    down = product(down, narrow, other, simulated)
    publish(simulated)
    meet(simulated)  # staged
    found = _over_positions(staged, len(for_sums), shared.ones, simulated)
    if ranks == 4 and value_tile is not None:
        mimo.store_sum(value_tile, sums, value, simulated)
    elif value_tile is not None:
        value_tile[...] = value.astype(jnp.bfloat16)

    down = split(settle(down, len(for_sums), simulated), simulated)
    cos, sin = unstash_turns(shared.turns, simulated, POS)
    step = _along_rows(here, ranks, simulated, S, STEP_HIGH) + _along_rows(here, ranks, simulated, S, STEP_LOW)
    plgpu.barrier_arrive(shared.free)
    dphase, back = 0.0, []
    for v, part in zip(mimo.load_pair(own, 0, simulated), down, strict=True):
        v = widen(v, simulated, POS)
        real, imag, rest = part[:, :S], part[:, S : 2 * S], part[:, 2 * S :]
        dphase += imag * v[:, :S] - real * v[:, S:]
        back.append(jnp.concatenate([real * cos + imag * sin, imag * cos - real * sin, rest], axis=1))
    total = total + join(*back, simulated)
    of_mimo = settle(found, 0, simulated) if for_sums else None
    publish(simulated)
    meet(simulated)  # no warp's products read what was staged; the value is in its tile
    if value_tile is not None:
        plgpu.copy_smem_to_gmem(value_tile, to.value)
    for columns in range(2):
        part = slice(64 * columns, 64 * columns + 64)
        store_pair(staged, columns, *(v[:, part].astype(jnp.bfloat16) for v in back), simulated)
    high = dphase.astype(jnp.bfloat16)
    low = (dphase - widen(high, simulated, POS)).astype(jnp.bfloat16)
    dphase_tile[...] = jnp.concatenate([high, low], axis=1)
    publish(simulated)
    meet(simulated)  # staged
    later = spread(jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16), simulated)
    later = jnp.concatenate([later] * (ranks // 2), axis=1)  # of the positions of every pair
    phase = product(None, join(later, later, simulated), dphase_tile, simulated)
    found = _over_positions(staged, 2, shared.ones, simulated)
    phase, _ = split(settle(phase, 2, simulated), simulated)
    phase = phase[:, :S] + phase[:, S:]
    rates = [spread(widen(load_tile(shared.rates.at[k], positions_layout(ranks)), simulated, positions_layout(ranks)),
                    simulated) for k in range(2)]  # fmt: skip
    to.vectors[TURN] = jnp.sum(phase * (rates[0] + rates[1]), axis=1) * (2 / ranks)  # every pair has the sum
    if of_mimo is not None:  # not sooner, as `publish` may wait for what leaves
        mimo.add_counted(to.mimo, of_mimo, simulated)
    mimo.add_counted(to.biases, settle(found, 0, simulated), simulated)
    if ranks == 2:
        meet(simulated)  # no warp's products read `dphase_tile`, where the next but one dy may arrive
    return total, domega + step * phase


def _through_scores(
    side: int, own, other, y, values, other_values, here, row, column, skip, vectors, ranks: int, simulated: bool
):
    """y or dX by rank; weighted products of own values with others', bfloat16; what scales own values with the state.

    `y`: the product of own rows and the state, in flight. Writes `vectors` but for TURN.
    """
    scores = product(None, own, other, simulated, b_t=True)
    over = product(None, join(*values, simulated), other_values, simulated, b_t=True)
    mix = mixing(side == KEYS, here, row, column, ranks)
    layout = positions_layout(ranks)
    scale = load_rows(here.at[TO_END], layout) if side == KEYS else jnp.exp2(load_rows(here.at[DECAY], layout))
    same = spread(jnp.where(row == column, 1.0, 0.0), simulated)
    mix, scale, narrow_scale = (
        spread(v, simulated) for v in (mix, rows(scale, P), rows(scale.astype(jnp.bfloat16), P))
    )
    along, overlap, parts = 0.0, 0.0, []
    others = split(load_tile(other_values), simulated)
    for v, other_v, part in zip(values, others, split(settle(y, 2, simulated), simulated), strict=True):
        v, other_v, part = widen(v, simulated, POS), widen(other_v, simulated, POS), part * scale
        along += fold(part * v)
        parts.append(part + skip * other_v)
        if side == KEYS:
            overlap += fold(v * other_v)
    y = begin(join(*parts, simulated), simulated)
    scores = settle(scores, 1, simulated)
    y = product(y, weigh(scores, mix, simulated), other_values, simulated)
    over = settle(over, 1, simulated)
    by_position = over_ranks(over, scores, positions(ranks), simulated)
    of_same = by_position * same
    vectors[ALONG] = jnp.sum(along + fold((by_position - of_same) * mix), axis=1)
    if side == QUERIES:
        vectors[SAME] = jnp.sum(fold(of_same), axis=1)
    else:
        vectors[OVERLAP] = jnp.sum(overlap, axis=1)
    narrow = weigh(over, mix, simulated)
    return split(settle(y, 0, simulated), simulated), narrow, narrow_scale


def _over_positions(staged, count: int, ones, simulated: bool) -> jax.Array | None:
    """Sums over positions of so many halves of what was staged, [64, 8], as `mimo_pieces.add_counted` takes them."""
    found = None
    for k in range(count):
        found = product(found, staged.at[:, :, k], ones.at[k], simulated, a_t=True, b_t=True)
    return found


def _load(ref, ranks: int, simulated: bool) -> jax.Array:
    """x, z or dy of a chunk: [32, P] float32."""
    layout = positions_layout(ranks)
    return spread(widen(load_tile(ref, layout), simulated, layout), simulated)


def _along_rows(here, ranks: int, simulated: bool, width: int, kind: int) -> jax.Array:
    """A coefficient of positions, [32, width]."""
    return spread(rows(load_rows(here.at[kind], positions_layout(ranks)), width), simulated)


def _gated(z_tile, dy_tile, weight, ranks: int, simulated: bool) -> list[jax.Array]:
    """g of both ranks of pairs, bfloat16."""
    z, dy = (_load(v, ranks, simulated) for v in (z_tile, dy_tile))
    out = []
    for k in range(2):
        half = z * weight(k, of.MIMO_Z)
        out.append((dy * weight(k, of.MIMO_O) * (half * jnp.tanh(half) + half)).astype(jnp.bfloat16))
    return out


def _of_gate(y, z: jax.Array, dy: jax.Array, weight):
    """dz's share of every pair, and what adds up to the gradients of mimo_o and mimo_z."""
    value, of_o, of_z = 0.0, [], []
    for k, y_rank in enumerate(y):
        half_weight = weight(k, of.MIMO_Z)
        half = z * half_weight
        tanh = jnp.tanh(half)
        silu, gate = half * tanh + half, 0.5 * tanh + 0.5
        v = dy * y_rank
        of_o.append((v * silu).astype(jnp.bfloat16))
        v = v * weight(k, of.MIMO_O) * ((gate + silu) - silu * gate)
        of_z.append((v * z).astype(jnp.bfloat16))
        value += v * half_weight
    return value + value, (of_o, of_z)


def _of_x(dx, x: jax.Array, weight):
    """dx's share of every pair, and what adds up to the gradient of mimo_x."""
    value, of_x = 0.0, []
    for k, v in enumerate(dx):
        of_x.append((v * x).astype(jnp.bfloat16))
        value += v * weight(k, of.MIMO_X)
    return value, (of_x,)
