"""Hopper kernel of the MIMO forward scan's first pass, where a sequence has several segments: what each adds to H.

Notation as in mimo_forward.py. Shared memory is safe without automatic barriers by two points where a warpgroup meets:
A, where B is rotated in its place, and every warp has read x, ω and the coefficients, so that those of the next chunk
may arrive; C, where its products with B are done, so that the next may arrive.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared
from .mimo_pieces import blocks, iotas, positions
from .mimo_turning import by_parts, get_rates, get_rows, in_rows, rates_of_chunk, rotate, turn
from .mimo_weights import B_BIAS, B_REST, load_weight, x_weights
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    PARAMETERS,
    TO_END,
    WG,
    P,
    S,
    load_cols,
    load_rows,
    meet,
    opaque_zero,
    rows,
    tile,
)
from .segment_states import added_shapes, no_state, store_added
from .wgmma import begin, product, settle


def state_pass(
    x: jax.Array, b: jax.Array, prepared: Prepared, weights: jax.Array, *, segments: int, finer: int = 1, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """Of every `finer` part of each segment but the last: what it adds to H, and its decay (N times the same).

    Shapes [b, h, (segments - 1) finer, P, N] and [.., N]; arguments as in `mimo_forward.output_pass`, where no part may
    be empty. Every warpgroup has a head of its own; four in a program are a way to have no more than 128 registers a
    thread.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    span = positions(ranks)
    per_group, chunks = heads // groups, length // span
    most = -(-chunks // segments)
    share = -(-most // finer)
    together = math.gcd(heads, 4)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, mimo_x_ref, added_ref, decay_ref,
         all_b, all_x, all_rates, all_here, all_start, early_here, b_here) = refs  # fmt: skip
        index, place, program = (lax.axis_index(name) for name in GRID)
        own = lax.axis_index("warpgroup")
        head = program * together + own
        within = lax.rem(place, finer)
        first = (place // finer) * most + within * share
        count = jnp.minimum(share, most - within * share)

        def get_early(ci):
            at, barrier = (index, head, first + ci), early_here.at[own]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[at], all_here.at[own], barrier)
            plgpu.copy_gmem_to_smem(start_ref.at[at], all_start.at[own], barrier)
            get_rates(rate_ref, index, first + ci, all_rates.at[own], barrier)
            plgpu.copy_gmem_to_smem(x_ref.at[index, pl.ds((first + ci) * span, span), head], all_x.at[own], barrier)

        def get_b(ci):
            chunk = index * chunks + first + ci
            get_rows(b_ref, chunk, head // per_group, all_b.at[own], b_here.at[own], ranks, simulated)

        get_early(0)
        get_b(0)
        of_x = [load_rows(mimo_x_ref.at[head, rank]).astype(jnp.bfloat16) for rank in range(ranks)]

        def chunk(ci, carry):
            state, log_decay = carry
            mine = own + opaque_zero(simulated)
            here, rot = all_here.at[mine], all_b.at[mine]
            weight = functools.partial(load_weight, weight_ref.at[head + mine - own], ranks=ranks, simulated=simulated)
            plgpu.barrier_wait(early_here.at[own])
            row, column = iotas(mine - own, ranks)
            cos, sin = turn(here, all_start.at[mine], all_rates.at[mine], row, column, ranks, simulated)
            end = here[DECAY, span - 1]
            to_end = lax.broadcast_in_dim(load_cols(here.at[TO_END]).astype(jnp.bfloat16), (P, span), (1,))
            scaled = plgpu.load(all_x.at[mine].transpose((1, 0)), layout=WG) * to_end
            plgpu.barrier_wait(b_here.at[own])
            rotate(rot, rot, B_BIAS, B_REST, weight, cos, sin, simulated)
            plgpu.commit_smem()  # A
            pl.when(ci + 1 < count)(lambda: get_early(ci + 1))
            values = [
                scaled[:, k : k + 8] * rows(of_x[rank + j], 8)
                for rank in range(0, ranks, 2) for k in range(0, span, 8) for j in range(2)
            ]  # fmt: skip
            state = begin(state * jnp.exp2(end), simulated)
            state = settle(product(state, jnp.concatenate(values, axis=1), rot, simulated), 0, simulated)
            meet(simulated)  # C
            pl.when(ci + 1 < count)(lambda: get_b(ci + 1))
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (no_state(), jnp.float32(0.0)))
        at = (index, head, place)
        store_added(added_ref.at[at], decay_ref.at[at], state, log_decay)

    barriers = functools.partial(plgpu.Barrier, num_barriers=together)
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, (segments - 1) * finer + 1),
        scratch_types=[
            blocks(together), tile(together, span, P), rates_of_chunk(ranks, together),
            plgpu.SMEM((together, COEFFICIENTS, span), jnp.float32), plgpu.SMEM((together, S), jnp.float32),
            barriers(num_arrivals=4), barriers(num_arrivals=ranks // 2),
        ],
        grid=(batch, (segments - 1) * finer, heads // together), grid_names=GRID, num_threads=together,
        thread_name="warpgroup", interpret=interpret, compiler_params=PARAMETERS,
    )(x, in_rows(b, simulated), *by_parts(prepared), weights, x_weights(weights))  # fmt: skip
