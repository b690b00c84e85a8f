"""What one position of a MIMO chunk counts for another: weights of their products, and sums of these.

Notation as in mimo_forward.py and mimo_gradients.py.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mimo_pieces import (
    HALF_ROWS,
    POS,
    column_blocks,
    join,
    positions,
    positions_layout,
    positions_of_columns,
    ranks_of_columns,
    split,
)
from .pieces import DECAY, OTHER, OWN, P, cols, load_cols, load_rows, rows, widen


def mixing(of_keys: bool, here, row: jax.Array, column: jax.Array, ranks: int) -> jax.Array:
    """M, or its transpose if rows are keys, [T, T]: 2^(L_i - L_j) s_j where key j is before query i, γ_i where i = j.

    `here`: coefficients of the chunk, of which the first three are read.
    """
    layout, span = positions_layout(ranks), positions(ranks)
    if of_keys:
        exponent = cols(load_cols(here.at[DECAY], layout), span) - rows(load_rows(here.at[OTHER], layout), span)
    else:
        exponent = rows(load_rows(here.at[DECAY], layout), span) - cols(load_cols(here.at[OTHER], layout), span)
    own = rows(load_rows(here.at[OWN], layout), span)
    apart = row < column if of_keys else row > column
    return jnp.exp2(jnp.where(apart, exponent, jnp.where(row == column, own, -jnp.inf)))


def skips_of(skip: jax.Array, zero: jax.Array) -> jax.Array:
    """[32, 32]: D on the diagonal, which is where rank and position are the same."""
    row = plgpu.broadcasted_iota(jnp.int32, (HALF_ROWS,) * 2, 0, layout=POS) + zero
    column = plgpu.broadcasted_iota(jnp.int32, (HALF_ROWS,) * 2, 1, layout=POS)
    return jnp.where(row == column, skip, 0.0)


def weigh(v: jax.Array, mix: jax.Array, simulated: bool, skips: jax.Array | None = None) -> jax.Array:
    """Products of rows with rows times what they count: bfloat16 [ROWS, ROWS]; with `skips`, plus those."""
    mixes, both = column_blocks(mix), []
    for rank, part in enumerate(split(v, simulated)):
        out = []
        for k, (one, at) in enumerate(zip(column_blocks(part), positions_of_columns(mix.shape[1]), strict=True)):
            one = one * mixes[at]
            if skips is not None and k % 2 == rank:
                one = one + column_blocks(skips)[k // 2]
            out.append(one.astype(jnp.bfloat16))
        both.append(jnp.concatenate(out, axis=1))
    return join(*both, simulated)


def to_rows(v: jax.Array) -> jax.Array:
    """Of a chunk's positions, along columns → of its rows, [P, ROWS]."""
    eights = column_blocks(lax.broadcast_in_dim(v, (P, v.shape[0]), (1,)))
    return jnp.concatenate([eights[k] for k in positions_of_columns(v.shape[0])], axis=1)


def over_ranks(overlaps: jax.Array, scores: jax.Array, span: int, simulated: bool) -> jax.Array:
    """Sums of overlaps ⊙ scores over both ranks of a row's pair and all of a column's: [32, T]."""
    sums = [0.0] * (span // 8)
    for part, score in zip(split(overlaps, simulated), split(scores, simulated), strict=True):
        for v, s, at in zip(column_blocks(part), column_blocks(score), positions_of_columns(span), strict=True):
            sums[at] += v * s
    return jnp.concatenate(sums, axis=1)


def fold(v: jax.Array) -> jax.Array:
    """[32, w] → [32, 8]: sums of blocks of 8 columns."""
    return functools.reduce(jnp.add, column_blocks(v))


def expand(x: jax.Array, of_x: list[jax.Array], simulated: bool) -> jax.Array:
    """X of all ranks, transposed: [P, ROWS]."""
    eights = column_blocks(widen(x, simulated))
    parts = [(eights[at] * rows(of_x[rank], 8)).astype(jnp.bfloat16) for rank, at in ranks_of_columns(len(of_x))]
    return jnp.concatenate(parts, axis=1)


def gated(z: jax.Array, dy: jax.Array, of_z: list[jax.Array], of_o: list[jax.Array]) -> jax.Array:
    """g of all ranks, transposed: [P, ROWS] float32. z, dy: [P, T]."""
    zs, dys, parts = column_blocks(z), column_blocks(dy), []
    for rank, at in ranks_of_columns(len(of_z)):
        half = zs[at] * rows(of_z[rank], 8)
        parts.append(dys[at] * rows(of_o[rank], 8) * (half * jnp.tanh(half) + half))
    return jnp.concatenate(parts, axis=1)


def of_same_rows(over: jax.Array, simulated: bool) -> list[jax.Array]:
    """Products of rows with rows, added up over both ranks of a pair, [32, 8] of every eight positions and pairs.

    On the diagonal are those of rows with themselves; the rest is of different ranks.
    """
    first, second = (column_blocks(part) for part in split(over, simulated))
    return [a + b for a, b in zip(first[::2], second[1::2], strict=True)]
