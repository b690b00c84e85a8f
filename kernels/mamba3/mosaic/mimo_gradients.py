"""Hopper kernel of the MIMO backward scan's gradients: chunks in parallel, one warpgroup for queries and one for keys.

Notation as in mimo_forward.py; H enters the chunk, G is the gradient of H after it. With g_r = dy ⊙ mimo_o_r ⊙ silu(z ⊙
mimo_z_r) and w_j = 2^(L_end - L_j) s_j, sums over q being over ranks:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r       dX_r = w ⊙ (B_r Gᵀ) + Σ_q (B_r C_qᵀ ⊙ Mᵀ) g_q + D g_r
    dC_r = (2^L ⊙ g_r) H + Σ_q (g_r X_qᵀ ⊙ M) B_q                dB_r = (w ⊙ X_r) G + Σ_q (X_r g_qᵀ ⊙ Mᵀ) C_q

The right column is the left one with queries and keys exchanged: the same code is either, its `own` rows being C, g and
H, or B, X and G. It finds its own scores, as waiting for the other's would cost more. Of y it makes the gradients of z,
mimo_z and mimo_o, of dX those of x and mimo_x.

A program has one chunk and walks a block of heads. Gradients of B and C, turned back, are added up over these heads, as
are dω's parts. Gradients of weights are sums over positions: products with ones of what is staged for them.

Shared memory is used without automatic barriers. Both warpgroups wait at:
  free    Both are done with what the other has written for the head before, and with what had arrived for it: it may
          change, and what the next head needs may arrive where that was, once dz or dx have left.
  ready   Rotated rows, X and g of all ranks are written.
and that of the queries at `turned`, for cos and sin, which that of the keys finds.
A warpgroup meets where it has staged something for products, and before it stages more. Before any of these every
thread publishes (a fence) what copies or products are to read. What arrives from global memory has its own barrier.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import mimo_weights as of
from .forward import Prepared
from .mimo_pieces import (
    HALF_ROWS,
    POS,
    ROWS,
    blocks,
    column_blocks,
    iotas,
    join,
    load_pair,
    positions,
    positions_layout,
    positions_of_columns,
    send_partial,
    split,
    spread,
    store_counted,
    store_pair,
    store_sum,
    unspread,
)
from .mimo_turning import by_parts, get_rates, get_rows, in_rows, rates_of_chunk, rotate, turn
from .pieces import (
    COEFFICIENTS,
    DECAY,
    OTHER,
    OWN,
    PARAMETERS,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    WG,
    N,
    P,
    S,
    cols,
    load_cols,
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

_GRID = ("batch", "block", "chunk")
SIDES = QUERIES, KEYS = range(2)
# Rows of what a side writes per head and chunk, float32 by row of one rank of every pair (mimo_pieces.py): what L_i
# scales as a query or as a key; of queries, C·B times g·x of the same position; of keys, g·x of the same rank; the
# phase's part of Δ's gradient. Sums over pairs are still to be made.
VECTORS = 4
ALONG, SAME, OVERLAP, TURN = range(VECTORS)
# Of the gradients of weights of P.
OF_O, OF_Z, OF_X = range(3)


class Gradients(NamedTuple):
    """What the kernel writes."""

    z: jax.Array  # [b, l, h, P] bfloat16, as x
    x: jax.Array
    down: jax.Array  # of C and B, [blocks, SIDES, b, chunks, 2, 32, N] float32, by rank of a pair and row
    biases: jax.Array  # of theirs, [b, chunks, h, SIDES, N, r] float32
    mimo: jax.Array  # of mimo_o, mimo_z and mimo_x, [b, chunks, h, 3, P, r] float32
    vectors: jax.Array  # [b, h, chunks, SIDES, VECTORS, 32] float32
    omega: jax.Array  # [blocks, SIDES, b, l, S] float32


class Shared(NamedTuple):
    """Shared memory of a program; axes before those of one thing are its sides, or slots for two heads (and sides)."""

    raw: jax.Array
    rot: jax.Array
    states: jax.Array  # slots, sides
    x: jax.Array  # slots, as z and dy
    z: jax.Array
    dy: jax.Array
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
    def types(ranks: int, simulated: bool) -> "Shared":
        """What to allocate."""
        span, floats = positions(ranks), functools.partial(plgpu.SMEM, dtype=jnp.float32)
        return Shared(
            blocks(2), blocks(2), tile(2, 2, P, N), *(tile(2, span, P) for _ in range(3)), tile(2, ROWS, P), blocks(2),
            tile(2 if ranks == 4 else 1, HALF_ROWS, 2 * S), tile(8, ROWS),
            floats((2, HALF_ROWS, S) if simulated else (HALF_ROWS, S)), rates_of_chunk(ranks),
            floats((2, COEFFICIENTS, span)), floats((2, S)), floats((2, ranks, of.WEIGHTS, P)),
            plgpu.Barrier(num_arrivals=ranks + 2), plgpu.Barrier(num_arrivals=8, num_barriers=2),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2), plgpu.Barrier(),
            floats((2, span, P)) if simulated and ranks == 4 else None,
        )  # fmt: skip


def gradients(
    x: jax.Array, z: jax.Array, dy: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared, weights: jax.Array,
    d: jax.Array, chunk_ssm: jax.Array, chunk_grad: jax.Array, *, block: int, interpret=None,
) -> Gradients:  # fmt: skip
    """All gradients, or what their sums over chunks, blocks of heads and pairs of ranks are.

    Args:
      x: [b, l, h, P] bfloat16, as z and dy; l is a whole number of chunks.
      z: the gate.
      dy: gradient of the output.
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      d: [h] float32.
      chunk_ssm: H before every chunk, [b, h, chunks, P, N] bfloat16.
      chunk_grad: the gradient of H after every chunk, likewise.
      block: heads of a program, a divisor of h / g.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    span = positions(ranks)
    per_group, chunks = heads // groups, length // span
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, dy_ref, c_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, ssm_ref, grad_ref,
         ones_ref, *refs) = refs  # fmt: skip
        out, shared = Gradients(*refs[: len(Gradients._fields)]), Shared(*refs[len(Gradients._fields) :])
        index, block_index, ci = (lax.axis_index(name) for name in _GRID)
        here = pl.ds(ci * span, span)

        def get(side: int, k):
            slot, head = lax.rem(k, 2), block_index * block + k
            at, value = (index, head, ci), (index, here, head)
            copies = [(grad_ref.at[at], shared.states.at[slot, KEYS]), (x_ref.at[value], shared.x.at[slot])]
            if side == QUERIES:
                copies = [
                    (ssm_ref.at[at], shared.states.at[slot, QUERIES]),
                    (z_ref.at[value], shared.z.at[slot]), (dy_ref.at[value], shared.dy.at[slot]),
                    (coefficient_ref.at[at], shared.coefficients.at[slot]), (start_ref.at[at], shared.start.at[slot]),
                    (weight_ref.at[head], shared.weights.at[slot]),
                ]  # fmt: skip
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, shared.here.at[slot])

        def run(side: int):
            source, group = (c_ref, b_ref)[side], block_index * block // per_group
            get_rows(source, index * chunks + ci, group, shared.raw.at[side], shared.raw_here, ranks, simulated)
            if side == QUERIES:
                get_rates(rate_ref, index, ci, shared.rates, shared.raw_here)
                plgpu.copy_gmem_to_smem(ones_ref, shared.ones, shared.raw_here)
            get(side, 0)
            plgpu.barrier_arrive(shared.free)
            plgpu.barrier_wait(shared.raw_here)

            def one(k, carry):
                slot, head = lax.rem(k, 2), block_index * block + k
                plgpu.barrier_wait(shared.free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, in the slot of the next
                pl.when(k + 1 < block)(lambda: get(side, k + 1))
                plgpu.barrier_wait(shared.here.at[slot])
                to = Written(
                    (out.z, out.x)[side].at[index, here, head], out.biases.at[index, ci, head, side],
                    out.mimo.at[index, ci, head], out.vectors.at[index, head, ci, side],
                )  # fmt: skip
                return _one_head(side, slot, shared, to, d_ref[head], carry, ranks, simulated)

            total = plgpu.layout_cast(jnp.zeros((ROWS, N), jnp.float32), WG)
            domega = plgpu.layout_cast(jnp.zeros((HALF_ROWS, S), jnp.float32), POS)
            total, domega = lax.fori_loop(0, block, one, (total, domega))
            plgpu.barrier_wait(shared.free)
            for k, part in enumerate(split(total, simulated)):
                out.down[block_index, side, index, ci, k] = part
            out.omega[block_index, side, index, here] = unspread(domega, ranks, simulated)
            plgpu.wait_smem_to_gmem(0)

        for side in SIDES:
            pl.when(lax.axis_index("warpgroup") == side)(functools.partial(run, side))

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = Gradients(
        z=shape(x.shape, x.dtype),
        x=shape(x.shape, x.dtype),
        down=shape((heads // block, 2, batch, chunks, 2, HALF_ROWS, N), f32),
        biases=shape((batch, chunks, heads, 2, N, ranks), f32),
        mimo=shape((batch, chunks, heads, 3, P, ranks), f32),
        vectors=shape((batch, heads, chunks, 2, VECTORS, HALF_ROWS), f32),
        omega=shape((heads // block, 2, batch, length, S), f32),
    )
    arrays = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[v for v in Shared.types(ranks, simulated) if v is not None],
        grid=(batch, heads // block, chunks), grid_names=_GRID, num_threads=2, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, in_rows(c, simulated), in_rows(b, simulated), *by_parts(prepared), weights, d, chunk_ssm, chunk_grad,
      _ones(ranks))  # fmt: skip
    return Gradients(*arrays)


class Written(NamedTuple):
    """Where what a side finds of a head goes, in global memory; see `Gradients`."""

    value: jax.Array
    biases: jax.Array
    mimo: jax.Array
    vectors: jax.Array


def _one_head(side: int, slot, shared: Shared, to: Written, skip, carry, ranks: int, simulated: bool):
    """All of a head's gradients of one side; `carry` and what is returned: sums over heads of dC or dB, and of dω."""
    total, domega = carry
    zero = opaque_zero(simulated)
    here, x_tile, z_tile, dy_tile = (v.at[slot + zero] for v in (shared.coefficients, shared.x, shared.z, shared.dy))
    own, other, state = shared.rot.at[side + zero], shared.rot.at[1 - side + zero], shared.states.at[slot + zero, side]
    weight = functools.partial(of.load_weight, shared.weights.at[slot + zero], ranks=ranks, simulated=simulated)
    row, column = iotas(zero, ranks)

    if side == KEYS:
        cos, sin = turn(here, shared.start.at[slot], shared.rates, row, column, ranks, simulated)
        stash_turns(shared.turns, cos, sin, simulated, POS)
        plgpu.barrier_arrive(shared.turned)
        x = _load(x_tile, ranks, simulated)
        values = [(x * weight(k, of.MIMO_X)).astype(jnp.bfloat16) for k in range(2)]
    else:
        values = _gated(z_tile, dy_tile, weight, ranks, simulated)
        plgpu.barrier_wait(shared.turned)
        cos, sin = unstash_turns(shared.turns, simulated, POS)
    shared.values.at[side + zero][...] = join(*values, simulated)
    biases = (of.C_BIAS, of.C_REST) if side == QUERIES else (of.B_BIAS, of.B_REST)
    rotate(shared.raw.at[side + zero], own, *biases, weight, cos, sin, simulated)
    publish(simulated)
    plgpu.barrier_arrive(shared.ready)
    plgpu.barrier_wait(shared.ready)

    of_values, narrow, scale = _through_scores(
        side, own, other, state, values, shared.values.at[1 - side + zero], here, row, column, skip, to.vectors, ranks,
        simulated,
    )  # fmt: skip
    staged = shared.staged.at[side + zero]
    if side == QUERIES:
        value, for_sums = _of_gate(of_values, _load(z_tile, ranks, simulated), _load(dy_tile, ranks, simulated), weight)
    else:
        value, for_sums = _of_x(of_values, _load(x_tile, ranks, simulated), weight)
    for columns, both in enumerate(for_sums):
        store_pair(staged, columns, *both, simulated)
    sums = (shared.sums if simulated else shared.dphase).at[side] if ranks == 4 else None
    # With 2 ranks there is no room for both, but dy is not needed any more.
    dphase_tile = dy_tile if ranks == 2 and side == QUERIES else shared.dphase.at[zero + (side if ranks == 4 else 0)]
    if ranks == 4:
        send_partial(sums, value, simulated)
    down = product(None, join(*(v * scale for v in values), simulated), state, simulated)
    down = product(down, narrow, other, simulated)
    publish(simulated)
    meet(simulated)  # staged
    found = [
        product(None, staged.at[:, :, k], shared.ones, simulated, a_t=True, b_t=True) for k in range(len(for_sums))
    ]
    value_tile = (z_tile, x_tile)[side]
    if ranks == 4:
        store_sum(value_tile, sums, value, simulated)
    else:
        value_tile[...] = value.astype(jnp.bfloat16)

    down = split(settle(down, len(found), simulated), simulated)
    cos, sin = unstash_turns(shared.turns, simulated, POS)
    step = _along_rows(here, ranks, simulated, S, STEP_HIGH) + _along_rows(here, ranks, simulated, S, STEP_LOW)
    plgpu.barrier_arrive(shared.free)
    dphase, back = 0.0, []
    for v, part in zip(load_pair(own, 0, simulated), down, strict=True):
        v = widen(v, simulated, POS)
        real, imag, rest = part[:, :S], part[:, S : 2 * S], part[:, 2 * S :]
        dphase += imag * v[:, :S] - real * v[:, S:]
        back.append(jnp.concatenate([real * cos + imag * sin, imag * cos - real * sin, rest], axis=1))
    total = total + join(*back, simulated)
    for k, v in enumerate(found):
        v = settle(v, len(found) - 1 - k, simulated)
        store_counted(to.mimo.at[k if side == QUERIES else OF_X], v, ranks, simulated)
    publish(simulated)
    meet(simulated)  # no warp's products read what was staged; the value is in its tile
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
    found = [product(None, staged.at[:, :, k], shared.ones, simulated, a_t=True, b_t=True) for k in range(2)]
    phase, _ = split(settle(phase, 2, simulated), simulated)
    phase = phase[:, :S] + phase[:, S:]
    rates = [spread(widen(load_tile(shared.rates.at[k], positions_layout(ranks)), simulated, positions_layout(ranks)),
                    simulated) for k in range(2)]  # fmt: skip
    to.vectors[TURN] = jnp.sum(phase * (rates[0] + rates[1]), axis=1) * (2 / ranks)  # every pair has the sum
    for k, v in enumerate(found):
        store_counted(to.biases.at[pl.ds(64 * k, 64)], settle(v, 1 - k, simulated), ranks, simulated)
    if ranks == 2:
        meet(simulated)  # no warp's products read `dphase_tile`, where the next but one dy may arrive
    return total, domega + step * phase


def _through_scores(
    side: int, own, other, state, values, other_values, here, row, column, skip, vectors, ranks: int, simulated: bool
):
    """y or dX by rank; weighted products of own values with others', bfloat16; what scales own values with the state.

    Writes `vectors` but for TURN.
    """
    y = product(None, own, state, simulated, b_t=True)
    scores = product(None, own, other, simulated, b_t=True)
    over = product(None, join(*values, simulated), other_values, simulated, b_t=True)
    mix, scale = _mixing(side, here, row, column, ranks)
    same = spread(jnp.where(row == column, 1.0, 0.0), simulated)
    mix, scale, narrow_scale = (
        spread(v, simulated) for v in (mix, rows(scale, P), rows(scale.astype(jnp.bfloat16), P))
    )
    along, overlap, parts = 0.0, 0.0, []
    others = split(load_tile(other_values), simulated)
    for v, other_v, part in zip(values, others, split(settle(y, 2, simulated), simulated), strict=True):
        v, other_v, part = widen(v, simulated, POS), widen(other_v, simulated, POS), part * scale
        along += _fold(part * v)
        parts.append(part + skip * other_v)
        if side == KEYS:
            overlap += _fold(v * other_v)
    y = begin(join(*parts, simulated), simulated)
    scores = settle(scores, 1, simulated)
    y = product(y, _weigh(scores, mix, simulated), other_values, simulated)
    over = settle(over, 1, simulated)
    by_position = _over_ranks(over, scores, positions(ranks), simulated)
    of_same = by_position * same
    vectors[ALONG] = jnp.sum(along + _fold((by_position - of_same) * mix), axis=1)
    if side == QUERIES:
        vectors[SAME] = jnp.sum(_fold(of_same), axis=1)
    else:
        vectors[OVERLAP] = jnp.sum(overlap, axis=1)
    narrow = _weigh(over, mix, simulated)
    return split(settle(y, 0, simulated), simulated), narrow, narrow_scale


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


def _mixing(side: int, here, row, column, ranks: int) -> tuple[jax.Array, jax.Array]:
    """M or its transpose [T, T], and what scales own values with the state [T]."""
    layout, span = positions_layout(ranks), positions(ranks)
    if side == KEYS:
        exponent = cols(load_cols(here.at[DECAY], layout), span) - rows(load_rows(here.at[OTHER], layout), span)
        apart, scale = row < column, load_rows(here.at[TO_END], layout)
    else:
        decay = load_rows(here.at[DECAY], layout)
        exponent = rows(decay, span) - cols(load_cols(here.at[OTHER], layout), span)
        apart, scale = row > column, jnp.exp2(decay)
    own = rows(load_rows(here.at[OWN], layout), span)
    return jnp.exp2(jnp.where(apart, exponent, jnp.where(row == column, own, -jnp.inf))), scale


def _fold(v: jax.Array) -> jax.Array:
    """[32, w] → [32, 8]: sums of blocks of 8 columns."""
    return functools.reduce(jnp.add, column_blocks(v))


def _weigh(v: jax.Array, mix: jax.Array, simulated: bool) -> jax.Array:
    """Products of rows with rows times what they count: bfloat16 [ROWS, ROWS]."""
    mixes, both = column_blocks(mix), []
    for part in split(v, simulated):
        found = zip(column_blocks(part), positions_of_columns(mix.shape[1]), strict=True)
        both.append(jnp.concatenate([(one * mixes[at]).astype(jnp.bfloat16) for one, at in found], axis=1))
    return join(*both, simulated)


def _over_ranks(overlaps: jax.Array, scores: jax.Array, span: int, simulated: bool) -> jax.Array:
    """Sums of overlaps ⊙ scores over both ranks of a row's pair and all of a column's: [32, T]."""
    sums = [0.0] * (span // 8)
    for part, score in zip(split(overlaps, simulated), split(scores, simulated), strict=True):
        for v, s, at in zip(column_blocks(part), column_blocks(score), positions_of_columns(span), strict=True):
            sums[at] += v * s
    return jnp.concatenate(sums, axis=1)


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


def _ones(ranks: int) -> jax.Array:
    """bfloat16 [8, ROWS]: 1 where row k, a rank, meets a row of that rank."""
    row = np.arange(ROWS)
    rank = row // 8 % 2 + (row // 32 * 2 if ranks == 4 else 0)
    return jnp.asarray(np.arange(8)[:, None] == rank, jnp.bfloat16)
