"""Phases and rotation of a MIMO chunk, and how B, C and ω come to where these find them.

Notation as in mimo_pieces.py.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mimo_pieces import POS, ROWS, join, positions, positions_layout, split, spread
from .pieces import STEP_HIGH, STEP_LOW, S, cols, load_cols
from .wgmma import product, settle


def rates_of_chunk(ranks: int, *shape: int) -> plgpu.SMEM:
    """ω of a chunk in its two parts, [2, T, S]."""
    transforms = (plgpu.SwizzleTransform(64),)
    return plgpu.SMEM((*shape, 2, positions(ranks), S), jnp.bfloat16, transforms=transforms)


def get_rates(ref, index, chunk, to, barrier) -> None:
    """ω of a chunk, a copy."""
    span = to.shape[-2]
    plgpu.copy_gmem_to_smem(ref.at[index, pl.ds(chunk * span, span)], to.transpose((1, 0, 2)), barrier)


def in_rows(v: jax.Array, simulated: bool) -> jax.Array:
    """B or C with the axes that copies need apart; the interpreter's copies transpose nothing."""
    batch, length, ranks, groups, _ = v.shape
    v = v.reshape(batch * length // 8, 8, ranks, 2 * groups, 64)
    if simulated:
        pairs = ranks // 2
        v = v.reshape(batch * length * ranks // ROWS, 4 // pairs, 8, pairs, 2, groups, 2, 64)
        v = v.transpose(0, 5, 3, 1, 4, 6, 2, 7)
    return v


def get_rows(ref, chunk, group, to, barrier, ranks: int, simulated: bool) -> None:
    """B or C of a chunk, counted over the batch: a copy for each pair of ranks."""
    pairs = ranks // 2
    eights = 4 // pairs
    for pair in range(pairs):
        here = to.at[pl.ds(eights * pair, eights)]
        if simulated:
            plgpu.copy_gmem_to_smem(ref.at[chunk, group, pair], here, barrier)
            continue
        source = ref.at[pl.ds(eights * chunk, eights), :, pl.ds(2 * pair, 2), pl.ds(2 * group, 2)]
        plgpu.copy_gmem_to_smem(source, here.transpose((0, 3, 1, 2, 4)), barrier)


def phases(here, start, rates, row, column, ranks: int, simulated: bool) -> jax.Array:
    """[32, S], in radians.

    One product finds both parts: its rows hold the high and the low part of Δ, its depth those of ω.
    """
    causal, zero, layout = row >= column, jnp.bfloat16(0), positions_layout(ranks)
    steps = [load_cols(here.at[k], layout).astype(jnp.bfloat16) for k in (STEP_HIGH, STEP_LOW)]
    steps = [jnp.where(causal, lax.broadcast_in_dim(v, row.shape, (1,)), zero) for v in steps]
    steps = [spread(v, simulated) for v in steps]
    steps = join(*(jnp.concatenate([v, v], axis=1) for v in steps), simulated)
    high, low = split(settle(product(None, steps, rates, simulated), 0, simulated), simulated)
    return (high + low) + cols(load_cols(start, POS), high.shape[0])
