"""Hopper kernel of the MIMO forward scan's first pass, where a sequence has several segments: what each adds to H.

Notation as in mimo_forward.py. The heads of a program read the same raw B, which has two slots; the first head's
warpgroup asks for it. Shared memory is safe without automatic barriers by `b_free`, at which every thread arrives when
it has rotated a slot of raw B, and by two points where a warpgroup meets: A, where cosines and sines are there, and
every warp has read x, ω and the coefficients, so that those of the next chunk may arrive, and its products of the chunk
before are done; B, where B is rotated, and cosines and sines may change.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared, by_parts
from .mimo_pieces import blocks, iotas, positions
from .mimo_rotation import load_biases, own_angles, rotate_rows, store_turns
from .mimo_turning import get_rates, get_rows, in_rows, phases, rates_of_chunk
from .mimo_weights import MIMO_X, Packed, load_of_ranks
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    PARAMETERS,
    TO_END,
    WG,
    P,
    S,
    cos_sin,
    load_cols,
    meet,
    opaque_zero,
    rows,
    tile,
)
from .segment_states import added_shapes, count_remembered, no_state, store_added
from .wgmma import begin, product, settle


def state_pass(
    x: jax.Array, b: jax.Array, prepared: Prepared, weights: Packed, *, segments: int,
    finer: int = 1, interpret=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of every `finer` part of each segment but the last: what it adds to H, and its decay (N times the same).

    What is forgotten at a segment's end (segment_states.py) is left out, and of parts that are forgotten as a whole
    nothing is written.

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
    together = math.gcd(per_group, 4)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, b_ref, coefficient_ref, rate_ref, start_ref, total_ref, weight_ref, mimo_ref, added_ref, decay_ref,
         raw, all_rotated, all_x, all_rates, all_turns, all_here, all_start,
         early_here, b_here, b_free) = refs  # fmt: skip
        index, place, program = (lax.axis_index(name) for name in GRID)
        own = lax.axis_index("warpgroup")
        head = program * together + own
        within = lax.rem(place, finer)
        first = (place // finer) * most + within * share
        count = jnp.minimum(share, most - within * share)
        heads_here = [total_ref.at[index, program * together + k] for k in range(together)]
        end, last = (place // finer + 1) * most - 1, first + count - 1
        remembered = count_remembered(
            heads_here, share, lambda ref, k: ref[end] - ref[jnp.maximum(last - k, 0)], simulated
        )
        remembered = jnp.minimum(count, remembered)
        first, count = first + count - remembered, remembered

        def get_early(ci):
            at, barrier = (index, head, first + ci), early_here.at[own]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[at], all_here.at[own], barrier)
            plgpu.copy_gmem_to_smem(start_ref.at[at], all_start.at[own], barrier)
            get_rates(rate_ref, index, first + ci, all_rates.at[own], barrier)
            plgpu.copy_gmem_to_smem(x_ref.at[index, pl.ds((first + ci) * span, span), head], all_x.at[own], barrier)

        def get_b(ci):
            chunk, slot = index * chunks + first + ci, lax.rem(ci, 2)
            get_rows(b_ref, chunk, head // per_group, raw.at[slot], b_here.at[slot], ranks, simulated)

        pl.when(count > 0)(lambda: get_early(0))

        @pl.when(own == 0)
        def _():
            pl.when(count > 0)(lambda: get_b(0))
            pl.when(count > 1)(lambda: get_b(1))

        of_x = [v.astype(jnp.bfloat16) for v in load_of_ranks(mimo_ref.at[head], MIMO_X, simulated)]
        bias = load_biases(weight_ref.at[head], jnp.int32(0), ranks, simulated)

        def chunk(ci, carry):
            state, log_decay = carry
            slot = lax.rem(ci, 2)
            mine = own + opaque_zero(simulated)
            here, rotated, turns = all_here.at[mine], all_rotated.at[mine], all_turns.at[mine]
            plgpu.barrier_wait(early_here.at[own])
            row, column = iotas(mine - own, ranks)
            angle = phases(here, all_start.at[mine], all_rates.at[mine], row, column, ranks, simulated)
            store_turns(turns, *cos_sin(own_angles(angle, ranks, simulated), simulated), ranks, simulated)
            end = here[DECAY, span - 1]
            to_end = lax.broadcast_in_dim(load_cols(here.at[TO_END]).astype(jnp.bfloat16), (P, span), (1,))
            scaled = plgpu.load(all_x.at[mine].transpose((1, 0)), layout=WG) * to_end
            meet(simulated)  # A

            @pl.when(ci + 1 < count)
            def _():
                get_early(ci + 1)

                @pl.when((own == 0) & (ci > 0))
                def _():
                    plgpu.barrier_wait(b_free.at[lax.rem(ci + 1, 2)])
                    get_b(ci + 1)

            plgpu.barrier_wait(b_here.at[slot])
            rotate_rows([raw.at[slot + mine - own]], [rotated], [bias], [turns], ranks, simulated)
            pl.when(ci + 2 < count)(lambda: plgpu.barrier_arrive(b_free.at[slot]))
            plgpu.commit_smem()  # B
            values = [
                scaled[:, k : k + 8] * rows(of_x[rank + j], 8)
                for rank in range(0, ranks, 2) for k in range(0, span, 8) for j in range(2)
            ]  # fmt: skip
            state = begin(state * jnp.exp2(end), simulated)
            state = settle(product(state, jnp.concatenate(values, axis=1), rotated, simulated), 0, simulated)
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (no_state(), jnp.float32(0.0)))
        at = (index, head, place)
        pl.when(count > 0)(lambda: store_added(added_ref.at[at], decay_ref.at[at], state, log_decay))

    barriers = functools.partial(plgpu.Barrier, num_barriers=together)
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, (segments - 1) * finer + 1),
        scratch_types=[
            blocks(2), blocks(together), tile(together, span, P), rates_of_chunk(ranks, together),
            plgpu.SMEM((together, span, S), jnp.int32), plgpu.SMEM((together, COEFFICIENTS, span), jnp.float32),
            plgpu.SMEM((together, S), jnp.float32), barriers(num_arrivals=4),
            plgpu.Barrier(num_arrivals=ranks // 2, num_barriers=2),
            plgpu.Barrier(num_arrivals=together, num_barriers=2),
        ],
        grid=(batch, (segments - 1) * finer, heads // together), grid_names=GRID, num_threads=together,
        thread_name="warpgroup", interpret=interpret, compiler_params=PARAMETERS,
    )(x, in_rows(b, simulated), *by_parts(prepared), prepared.totals, *weights)  # fmt: skip
