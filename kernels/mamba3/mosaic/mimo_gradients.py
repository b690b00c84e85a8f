"""Hopper kernel of the MIMO backward scan's gradients: chunks in parallel, a warpgroup to each pair of ranks.

Notation as in mimo_forward.py; H enters the chunk, G is the gradient of H after it. With g_r = dy ⊙ mimo_o_r ⊙ silu(z ⊙
mimo_z_r) and w_j = 2^(L_end - L_j) s_j, sums over q being over pairs of ranks:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r       dX_r = w ⊙ (B_r Gᵀ) + Σ_q (B_r C_qᵀ ⊙ Mᵀ) g_q + D g_r
    dC_r = (2^L ⊙ g_r) H + Σ_q (g_r X_qᵀ ⊙ M) B_q                dB_r = (w ⊙ X_r) G + Σ_q (X_r g_qᵀ ⊙ Mᵀ) C_q

The right column is the left one with queries and keys exchanged: one kernel finds either, in two launches. `Own` is C,
g and H on the left, B, X and G on the right; `other` is B and X, or C and g. Of y it makes the gradients of z, mimo_z
and mimo_o, of dX those of x and mimo_x. Doing both in one launch would need the sums of dB and dC over heads, 64
registers of a thread each, beside 64 of a gradient in the making and scores and weights: more than there are.

A program has one chunk and walks a block of heads. Gradients of B and C, turned back, are added up over these heads, as
are dω's parts. Gradients of weights are sums over positions: products with ones of what is put in place of rotated own
rows.

Shared memory is used without automatic barriers. The warpgroups wait for one another at:
  free    All are done with the head before: other rows, cos and sin may change, and what the next head needs may arrive
          where that one's was.
  ready   Rotated other rows, X or g of all ranks, cos and sin are written.
  summed  The second pair's share of dz or dx is in place of x or z, of which there is no more need.
Rotated own rows are a warpgroup's own: it meets before they change and after. Before one of these every thread
publishes (a fence) what copies or products are to read. What arrives from global memory has its own barrier.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import mimo_pieces as mimo
from . import wgmma
from .forward import Prepared
from .mimo_forward import _by_parts, _get_pair, _in_blocks, _iotas, _turn
from .mimo_pieces import POS, ROWS, T, blocks, cols, join, load_pair, product, split, store_pair
from .pieces import (
    COEFFICIENTS,
    DECAY,
    OTHER,
    OWN,
    PARAMETERS,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    N,
    P,
    S,
    load_cols,
    load_rows,
    load_tile,
    meet,
    opaque_zero,
    publish,
    rows,
    stash,
    tile,
    unstash,
    widen,
)  # fmt: skip
from .wgmma import settle

_GRID = ("batch", "block", "chunk")
# Rows of what is written per position, head and pair of ranks, float32 [T] each: what L_i scales as a query (or as a
# key); C·B times g·x of the same position; g·x of the same rank; the phase's part of Δ's gradient.
VECTORS = 4
ALONG, SAME, OVERLAP, TURN = range(VECTORS)


class Side(NamedTuple):
    """What one launch writes."""

    value: jax.Array  # gradient of z or x, [b, l, h, P] bfloat16
    down: jax.Array  # of C or B, [blocks, b, l, r, N] float32
    biases: jax.Array  # of its bias, [b, chunks, h, r, N] float32
    mimo: jax.Array  # of mimo_o and mimo_z side by side, or of mimo_x, likewise
    vectors: jax.Array  # [b, h, chunks, pairs, VECTORS, T] float32
    omega: jax.Array  # [blocks, pairs, b, l, S] float32


def gradients(
    of_b: bool, x: jax.Array, z: jax.Array, dy: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared,
    weights: jax.Array, d: jax.Array, states: jax.Array, *, block: int, interpret=None,
) -> Side:  # fmt: skip
    """Gradients of B and x (`of_b`), or of C and z, and what else needs the same products.

    Args:
      of_b: as above.
      x: [b, l, h, P] bfloat16, as z and dy; l is a whole number of chunks.
      z: the gate.
      dy: gradient of the output.
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of T positions.
      weights: from `mimo_pieces.pack`.
      d: [h] float32.
      states: the gradient of H after every chunk, or H before every chunk: [b, h, chunks, P, N] bfloat16.
      block: heads of a program, a divisor of h / g.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    pairs, per_group, chunks = ranks // 2, heads // groups, length // T
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, dy_ref, own_ref, other_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, state_ref,
         ones_ref, value_ref, down_ref, bias_ref, mimo_ref, vector_ref, domega_ref,
         raw, rot, states, both_x, both_z, both_dy, all_rows, sums, ones, turns, rates, both_coefficients, both_starts,
         raw_here, here, free, ready, summed) = refs  # fmt: skip
        index, block_index, ci = (lax.axis_index(name) for name in _GRID)
        pair = lax.axis_index("warpgroup")
        span = pl.ds(ci * T, T)

        def get(k):
            slot, head = lax.rem(k, 2), block_index * block + k
            at = (index, head, ci)
            for source, target in (
                (coefficient_ref.at[at], both_coefficients), (start_ref.at[at], both_starts),
                (x_ref.at[index, span, head], both_x), (z_ref.at[index, span, head], both_z),
                (dy_ref.at[index, span, head], both_dy), (state_ref.at[at], states),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source, target.at[slot], here.at[slot])

        @pl.when(pair == 0)
        def _():
            for which, ref in enumerate((own_ref, other_ref)):
                for k in range(pairs):
                    group = block_index * block // per_group
                    _get_pair(ref, index * chunks + ci, k, group, raw.at[which, k], raw_here, simulated)
            plgpu.copy_gmem_to_smem(rate_ref.at[index, span], rates.transpose((1, 0, 2)), raw_here)
            plgpu.copy_gmem_to_smem(ones_ref, ones, raw_here)
            get(0)

        plgpu.barrier_arrive(free)
        plgpu.barrier_wait(raw_here)

        def one(k, carry):
            total, domega = carry
            slot, head = lax.rem(k, 2), block_index * block + k
            zero = opaque_zero(simulated)
            coefficients, x_tile, z_tile, dy_tile = (
                v.at[slot + zero] for v in (both_coefficients, both_x, both_z, both_dy)
            )
            own, state = rot.at[0, pair + zero], states.at[slot + zero]
            weight = functools.partial(
                mimo.load_weight, weight_ref.at[head + zero, pl.ds(2 * pair, 2)], simulated=simulated
            )
            vectors = vector_ref.at[index, head, ci, pair]
            row, column = _iotas(zero)
            plgpu.barrier_wait(free)

            @pl.when(pair == 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, in the slot of the next
                pl.when(k + 1 < block)(lambda: get(k + 1))

            plgpu.barrier_wait(here.at[slot])
            cos, sin = _turn(coefficients, both_starts.at[slot], rates, row, column, simulated)
            biases = (mimo.B_BIAS, mimo.B_REST), (mimo.C_BIAS, mimo.C_REST)
            for which, (bias, rest_bias) in enumerate(biases if of_b else biases[::-1]):
                source, target = raw.at[which, pair], rot.at[which, pair + zero]
                _rotate(source, target, bias, rest_bias, weight, cos, sin, simulated)
            pl.when(pair == 0)(lambda: stash(turns, join(cos, sin, simulated), simulated))
            values, others, overlap = _expand(of_b, x_tile, z_tile, dy_tile, weight, simulated)
            all_rows.at[pair + zero][...] = join(*others, simulated)
            if not of_b:
                vectors[OVERLAP] = jnp.sum(overlap, axis=1)
            publish(simulated)
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

            mine = join(*values, simulated)

            # Half of the other rows of a pair at a time: scores of more would not fit into registers.
            steps = [
                (half, rot.at[1, q, pl.ds(2 * half, 2)], all_rows.at[q, pl.ds(T * half, T)])
                for q in range(pairs) for half in range(2)
            ]  # fmt: skip

            def begin(k):
                _, other, value = steps[k]
                return (product(None, own, other, simulated, transposed=True),
                        product(None, mine, value, simulated, transposed=True))  # fmt: skip

            y, (scores, over) = product(None, own, state, simulated, transposed=True), begin(0)
            mix, scale, gamma = _mixing(of_b, coefficients, row, column)
            skip, along, by_position, parts = d_ref[head], 0.0, [0.0, 0.0], []
            others = split(load_tile(all_rows.at[pair + zero]), simulated)
            for v, other, part in zip(values, others, split(settle(y, 2, simulated), simulated), strict=True):
                part = part * rows(scale, P)
                along += _fold(part * widen(v, simulated, POS))
                parts.append(part + skip * widen(other, simulated, POS))
            y = wgmma.begin(join(*parts, simulated), simulated)
            narrow = []
            for k, (half, _, value) in enumerate(steps):
                scores = settle(scores, 1, simulated)
                y = product(y, _weigh(scores, half, mix, simulated), value, simulated)
                over = settle(over, 1, simulated)
                narrow.append(_weigh(over, half, mix, simulated))
                by_position[half] += _over_ranks(over, scores, simulated)
                if k + 1 < len(steps):
                    scores, over = begin(k + 1)
            by_position = jnp.concatenate(by_position, axis=1)
            on_diagonal = jnp.sum(_fold(jnp.where(row == column, by_position, 0.0)), axis=1)
            vectors[ALONG] = jnp.sum(along + _fold(by_position * mix), axis=1) - gamma * on_diagonal
            if not of_b:
                vectors[SAME] = on_diagonal

            of_values = split(settle(y, 0, simulated), simulated)
            if of_b:
                value, staged = _of_x(of_values, x_tile, weight, simulated)
            else:
                value, staged = _of_gate(of_values, z_tile, dy_tile, weight, simulated)
            turned = load_pair(own, 0, simulated)
            meet(simulated)  # no warp's products read own rows any more
            for columns, both in enumerate(staged):
                store_pair(own, columns, *both, simulated)
            by_scale = [(widen(v, simulated, POS) * rows(scale, P)).astype(jnp.bfloat16) for v in values]
            down = product(None, join(*by_scale, simulated), state, simulated)
            for dscores, (_, other, _) in zip(narrow, steps, strict=True):
                down = product(down, dscores, other, simulated)
            publish(simulated)
            meet(simulated)
            found = [mimo.sum_positions(own, half, ones, simulated) for half in range(len(staged))]
            _finish_value(value, pair, pairs, summed, *((z_tile, x_tile) if of_b else (x_tile, z_tile)),
                          value_ref.at[index, span, head], simulated)  # fmt: skip

            down = split(settle(down, len(staged), simulated), simulated)
            cos, sin = split(unstash(turns, simulated), simulated)
            step = load_rows(coefficients.at[STEP_HIGH], POS) + load_rows(coefficients.at[STEP_LOW], POS)
            plgpu.barrier_arrive(free)
            dphase, back = 0.0, []
            for v, part in zip(turned, down, strict=True):
                v = widen(v, simulated, POS)
                real, imag, rest = part[:, :S], part[:, S : 2 * S], part[:, 2 * S :]
                dphase += imag * v[:, :S] - real * v[:, S:]
                back.append(jnp.concatenate([real * cos + imag * sin, imag * cos - real * sin, rest], axis=1))
            total = total + join(*back, simulated)
            _store_sums(found, mimo_ref.at[index, ci, head], pair, simulated)
            meet(simulated)  # no warp's products read what was staged
            for columns in range(2):
                part = slice(64 * columns, 64 * columns + 64)
                store_pair(own, columns, *(v[:, part].astype(jnp.bfloat16) for v in back), simulated)
            high = dphase.astype(jnp.bfloat16)
            low = (dphase - widen(high, simulated, POS)).astype(jnp.bfloat16)
            sums.at[pair + zero][...] = jnp.concatenate([high, low], axis=1)
            publish(simulated)
            meet(simulated)
            later = jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16)
            phase = product(None, join(later, later, simulated), sums.at[pair + zero], simulated)
            found = [mimo.sum_positions(own, half, ones, simulated) for half in range(2)]
            phase, _ = split(settle(phase, 2, simulated), simulated)
            phase = phase[:, :S] + phase[:, S:]
            omega = [widen(load_tile(rates.at[k + zero], POS), simulated, POS) for k in range(2)]
            vectors[TURN] = jnp.sum(phase * (omega[0] + omega[1]), axis=1)
            _store_sums(found, bias_ref.at[index, ci, head], pair, simulated)
            meet(simulated)  # no warp's products read what was staged
            return total, domega + rows(step, S) * phase

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, N), jnp.float32), plgpu.Layout.WGMMA)
        total, domega = lax.fori_loop(0, block, one, (zeros, plgpu.layout_cast(jnp.zeros((T, S), jnp.float32), POS)))
        plgpu.barrier_wait(free)
        for k, part in enumerate(split(total, simulated)):
            down_ref[block_index, index, span, 2 * pair + k] = part
        domega_ref[block_index, pair, index, span] = domega
        pl.when(pair == 0)(lambda: plgpu.wait_smem_to_gmem(0))

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    own, other = (b, c) if of_b else (c, b)
    out = Side(
        value=shape(x.shape, x.dtype),
        down=shape((heads // block, batch, length, ranks, N), f32),
        biases=shape((batch, chunks, heads, ranks, N), f32),
        mimo=shape((batch, chunks, heads, ranks, P if of_b else N), f32),
        vectors=shape((batch, heads, chunks, pairs, VECTORS, T), f32),
        omega=shape((heads // block, pairs, batch, length, S), f32),
    )
    arrays = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            blocks(2, pairs), blocks(2, pairs), tile(2, P, N), tile(2, T, P), tile(2, T, P), tile(2, T, P),
            tile(pairs, ROWS, P), tile(pairs, T, 2 * S), tile(8, ROWS), plgpu.SMEM((ROWS, S), f32),
            plgpu.SMEM((2, T, S), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(64),)),
            plgpu.SMEM((2, COEFFICIENTS, T), f32), plgpu.SMEM((2, S), f32),
            plgpu.Barrier(num_arrivals=2 * pairs + 2), plgpu.Barrier(num_arrivals=6, num_barriers=2),
            plgpu.Barrier(num_arrivals=pairs), plgpu.Barrier(num_arrivals=pairs), plgpu.Barrier(),
        ],
        grid=(batch, heads // block, chunks), grid_names=_GRID, num_threads=pairs, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, _in_blocks(own, simulated), _in_blocks(other, simulated), *_by_parts(prepared), weights, d,
      states, _ones())  # fmt: skip
    return Side(*arrays)


def _rotate(source, target, bias: int, rest_bias: int, weight, cos, sin, simulated: bool) -> None:
    """A pair of ranks of B or C with bias, rotated."""
    turned = []
    for rank, v in enumerate(load_pair(source, 0, simulated)):
        v = widen(v, simulated, POS) + cols(weight(rank, bias))
        real, imag = v[:, :S], v[:, S:]
        parts = [real * cos - imag * sin, real * sin + imag * cos]
        turned.append(jnp.concatenate([part.astype(jnp.bfloat16) for part in parts], axis=1))
    store_pair(target, 0, *turned, simulated)
    rest = enumerate(load_pair(source, 1, simulated))
    store_pair(target, 1, *(v + cols(weight(rank, rest_bias)) for rank, v in rest), simulated)


def _expand(of_b: bool, x_tile, z_tile, dy_tile, weight, simulated: bool):
    """X and g of a pair of ranks, bfloat16, own first, and g·x by columns mod 8 (not `of_b`)."""
    x, z, dy = (widen(load_tile(v, POS), simulated, POS) for v in (x_tile, z_tile, dy_tile))
    xs, gs, overlap = [], [], 0.0
    for rank in range(2):
        half = z * cols(weight(rank, mimo.MIMO_Z))
        g = dy * cols(weight(rank, mimo.MIMO_O)) * (half * jnp.tanh(half) + half)
        x_rank = x * cols(weight(rank, mimo.MIMO_X))
        if not of_b:
            overlap += _fold(g * x_rank)
        xs.append(x_rank.astype(jnp.bfloat16))
        gs.append(g.astype(jnp.bfloat16))
    return (xs, gs, None) if of_b else (gs, xs, overlap)


def _mixing(of_b: bool, here, row, column):
    """M or its transpose [T, T], what scales own values with the state [T], γ [T]."""
    if of_b:
        exponent = cols(load_cols(here.at[DECAY], POS)) - rows(load_rows(here.at[OTHER], POS), T)
        apart, scale = row < column, load_rows(here.at[TO_END], POS)
    else:
        decay = load_rows(here.at[DECAY], POS)
        exponent = rows(decay, T) - cols(load_cols(here.at[OTHER], POS))
        apart, scale = row > column, jnp.exp2(decay)
    same, own = row == column, load_rows(here.at[OWN], POS)
    mix = jnp.exp2(jnp.where(apart, exponent, jnp.where(same, rows(own, T), -jnp.inf)))
    return mix, scale, jnp.exp2(own)


def _fold(v: jax.Array) -> jax.Array:
    """[T, w] → [T, 8]: sums of blocks of 8 columns."""
    return functools.reduce(jnp.add, [v[:, k : k + 8] for k in range(0, v.shape[1], 8)])


def _by_blocks(v: jax.Array) -> list[jax.Array]:
    """[T, T], along columns two ranks of half the positions, in the order of a pair → parts [T, 8]."""
    return [v[:, k : k + 8] for k in range(0, T, 8)]


def _weigh(v: jax.Array, half: int, mix: jax.Array, simulated: bool) -> jax.Array:
    """Products of a pair of ranks with half of another times what they count: bfloat16 [ROWS, T]."""
    both = []
    for part in split(v, simulated):
        mixes = _by_blocks(mix)[2 * half : 2 * half + 2]
        out = [(one * mixes[k // 2]).astype(jnp.bfloat16) for k, one in enumerate(_by_blocks(part))]
        both.append(jnp.concatenate(out, axis=1))
    return join(*both, simulated)


def _over_ranks(overlaps: jax.Array, scores: jax.Array, simulated: bool) -> jax.Array:
    """Sums of overlaps ⊙ scores over ranks: [T, T / 2]."""
    sums = [0.0, 0.0]
    for part, score in zip(split(overlaps, simulated), split(scores, simulated), strict=True):
        for k, (v, s) in enumerate(zip(_by_blocks(part), _by_blocks(score), strict=True)):
            sums[k // 2] += v * s
    return jnp.concatenate(sums, axis=1)


def _of_gate(y, z_tile, dy_tile, weight, simulated: bool):
    """dz's share, and what adds up to the gradients of mimo_o and mimo_z."""
    z, dy = (widen(load_tile(v, POS), simulated, POS) for v in (z_tile, dy_tile))
    value, of_o, of_z = 0.0, [], []
    for rank, y_rank in enumerate(y):
        half_weight = cols(weight(rank, mimo.MIMO_Z))
        half = z * half_weight
        tanh = jnp.tanh(half)
        silu, gate = half * tanh + half, 0.5 * tanh + 0.5
        v = dy * y_rank
        of_o.append((v * silu).astype(jnp.bfloat16))
        v = v * cols(weight(rank, mimo.MIMO_O)) * ((gate + silu) - silu * gate)
        of_z.append((v * z).astype(jnp.bfloat16))
        value += v * half_weight
    return value + value, (of_o, of_z)


def _of_x(dx, x_tile, weight, simulated: bool):
    """dx's share, and what adds up to the gradient of mimo_x."""
    x = widen(load_tile(x_tile, POS), simulated, POS)
    value, of_x = 0.0, []
    for rank, v in enumerate(dx):
        of_x.append((v * x).astype(jnp.bfloat16))
        value += v * cols(weight(rank, mimo.MIMO_X))
    return value, (of_x,)


def _finish_value(value, pair, pairs: int, summed, share, out_tile, out, simulated: bool) -> None:
    """Adds up the shares of pairs and writes their sum, from the first warpgroup.

    `out_tile` has been read by all; `share`, before `ready`.
    """

    def write(value):
        out_tile[...] = value.astype(jnp.bfloat16)
        publish(simulated)
        meet(simulated)
        plgpu.copy_smem_to_gmem(out_tile, out)

    if pairs == 1:
        write(value)
        return

    @pl.when(pair == 1)
    def _():
        share[...] = value.astype(jnp.bfloat16)
        publish(simulated)
        plgpu.barrier_arrive(summed)

    @pl.when(pair == 0)
    def _():
        plgpu.barrier_wait(summed)
        write(value + widen(load_tile(share, POS), simulated, POS))


def _ones() -> jax.Array:
    """bfloat16 [8, ROWS]: 1 where row k, 0 or 1, meets a row of rank k of two."""
    return jnp.asarray(np.arange(8)[:, None] == np.arange(ROWS) // 8 % 2, jnp.bfloat16)


def _store_sums(found, out, pair, simulated: bool) -> None:
    """Writes sums over positions of two ranks, in halves of columns as `sum_positions` finds them, to [ranks, N]."""
    column = plgpu.broadcasted_iota(jnp.int32, (64, 8), 1, layout=plgpu.Layout.WGMMA)
    for half, v in enumerate(found):
        v = settle(v, len(found) - 1 - half, simulated)
        for rank in range(2):
            out[2 * pair + rank, pl.ds(64 * half, 64)] = jnp.sum(jnp.where(column == rank, v, 0.0), axis=1)
