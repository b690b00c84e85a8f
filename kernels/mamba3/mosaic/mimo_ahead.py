"""The warpgroup of the Mosaic GPU MIMO gradients that makes a head's rows: rotated B and C, X and g of all ranks.

Notation and the rules of shared memory as in mimo_gradients.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mimo_head_gradients import EARLY_SLOTS, KEYS, OVERLAP, QUERIES, SAME, SIDES, WITHIN, Shared
from .mimo_mixing import expand, fold, gated, mixing, of_same_rows, over_ranks, skips_of, weigh
from .mimo_pieces import column_blocks, iotas, positions, spread, store_diagonal
from .mimo_rotation import load_biases, own_angles, rotate_rows, store_turns
from .mimo_turning import phases
from .mimo_weights import MIMO_O, MIMO_X, MIMO_Z, load_of_ranks, touch
from .pieces import WG, cos_sin, meet, opaque_zero, publish, widen
from .wgmma import product, settle


class Asks(NamedTuple):
    """What lets things of a step arrive."""

    early: Callable
    values: Callable
    rows: Callable  # raw, of its chunk and group


def make_rows(
    shared: Shared, first, end, per_group: int, at: Callable, asks: Asks, weight_ref, mimo_ref, d_ref, vectors_ref,
    ranks: int, simulated: bool,
) -> None:  # fmt: skip
    """Walks steps from `first` to `end`, a head ahead of those who need the rows. `at`: see mimo_shares.py."""
    asks.rows(first)
    asks.early(first)
    asks.values(first)

    @pl.when(first + 1 < end)
    def _():
        asks.early(first + 1)
        asks.values(first + 1)

    def one(step, _):
        zero = opaque_zero(simulated)
        _, _, head, of = at(step)
        slot, early = lax.rem(step, 2), lax.rem(step, EARLY_SLOTS)

        @pl.when(step + 1 < end)
        def _():
            for ref in (weight_ref, mimo_ref):
                touch(ref.at[at(step + 1).head], simulated)

        @pl.when(step >= first + 2)
        def _():
            if ranks == 4:
                plgpu.barrier_wait(shared.empty.at[slot])
            asks.values(step)

        if per_group == 1:  # not sooner: those who need the rows read ω, too
            pl.when(step > first)(lambda: asks.rows(step))
        pl.when((of.member == 0) | (step == first))(lambda: plgpu.barrier_wait(shared.raw_here))
        plgpu.barrier_wait(shared.early_here.at[early])
        given = shared.coefficients.at[early + zero], shared.start.at[early], shared.rates.at[of.slot]
        angle = own_angles(phases(*given, *iotas(zero, ranks), ranks, simulated), ranks, simulated)
        store_turns(shared.turns.at[slot + zero], *cos_sin(angle, simulated), ranks, simulated)
        meet(simulated, len(SIDES))
        sides, packed = (QUERIES, KEYS), weight_ref.at[head + zero]
        biases = [load_biases(packed, jnp.int32(1 - side), ranks, simulated, words=4) for side in sides]
        rotated = [shared.rot.at[slot + zero, side] for side in sides]
        raw, turns = [shared.raw.at[side + zero] for side in sides], shared.turns.at[slot + zero]
        rotate_rows(raw, rotated, biases, [turns, turns], ranks, simulated)
        weights = [load_of_ranks(mimo_ref.at[head + zero], kind, simulated) for kind in (MIMO_X, MIMO_Z, MIMO_O)]
        plgpu.barrier_wait(shared.values_here.at[slot])

        def load(ref):
            return plgpu.load(ref.at[slot + zero].transpose((1, 0)), layout=WG)

        shared.values.at[slot + zero, 0].transpose((1, 0))[...] = expand(load(shared.x), weights[0], simulated)
        if shared.z is not None:
            g = gated(*(widen(load(v), simulated) for v in (shared.z, shared.dy)), *weights[1:])
            shared.values.at[slot + zero, 1].transpose((1, 0))[...] = g.astype(jnp.bfloat16)
        publish(simulated)
        meet(simulated, len(SIDES))  # rows, X and g are there
        g_tile = shared.dy.at[slot + zero] if shared.z is None else shared.values.at[slot + zero, 1]
        weighed, overlaps = (v.at[(slot if ranks == 4 else 0) + zero] for v in (shared.weighed, shared.overlaps))
        scores = product(None, rotated[KEYS], rotated[QUERIES], simulated, b_t=True)
        over = product(None, shared.values.at[slot + zero, 0], g_tile, simulated, b_t=True)
        row, column = iotas(zero, ranks)
        mix = mixing(True, shared.coefficients.at[early + zero], row, column, ranks)
        apart, mix = (spread(v, simulated) for v in (jnp.where(row == column, 0.0, mix), mix))
        if ranks == 2:
            pl.when(step > first)(lambda: plgpu.barrier_wait(shared.empty.at[1 - slot]))
        scores = settle(scores, 1, simulated)
        weighed[...] = weigh(scores, mix, simulated, skips_of(d_ref[head], zero))
        over = settle(over, 0, simulated)
        by_position = over_ranks(over, scores, positions(ranks), simulated)
        overlaps[...] = weigh(over, mix, simulated)
        publish(simulated)
        plgpu.barrier_arrive(shared.full.at[slot])
        vectors = vectors_ref.at[step]
        store_diagonal(vectors.at[SAME], column_blocks(by_position), simulated)
        store_diagonal(vectors.at[OVERLAP], of_same_rows(over, simulated), simulated)
        vectors[WITHIN] = jnp.sum(fold(by_position * apart), axis=1)
        pl.when(step + 2 < end)(lambda: asks.early(step + 2))
        if per_group > 1:
            pl.when((of.member == per_group - 1) & (step + 1 < end))(lambda: asks.rows(step + 1))
        return 0

    lax.fori_loop(first, end, one, 0)
