"""Hopper kernel of the SISO forward scan's first pass, where a sequence has several segments: what each adds to H.

Notation as in forward.py.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared, by_parts
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    HALF,
    PARAMETERS,
    TO_END,
    N,
    P,
    S,
    T,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    meet,
    opaque_zero,
    rates_tile,
    resting,
    rows,
    tile,
    turn_apart,
    turning,
)  # fmt: skip
from .segment_states import added_shapes, count_remembered, store_added


def state_pass(
    x: jax.Array, b: jax.Array, prepared: Prepared, b_bias: jax.Array,
    *, segments: int, pieces: int, count: int, together: int, interpret=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What each piece of all segments but the last adds to H, [b, h, .., P, N], and its decay, [b, h, .., N].

    A program has `together` heads of one group, each with a warpgroup of its own; they share raw B and ω. Chunks are
    walked backward, so that H never decays: what decays is X, to the end of the piece. What is forgotten at the end of
    the segment (segment_states.py) is left out, and of pieces that are forgotten as a whole nothing is written.

    Shared memory: all that a warpgroup has for itself is safe by two points where it meets. Before the first, the
    product of the chunk before is done, so that rotated B and scaled X may change; before the second, they are there,
    and X and the coefficients have been read. Raw B and ω of a chunk may be replaced when every warpgroup has said so.

    Args:
      x: as in `output_pass`.
      b: likewise.
      prepared: likewise.
      b_bias: likewise.
      segments: of the sequence; the last, which needs none of this, has the rest of it.
      pieces: of each of the others.
      count: chunks of a piece.
      together: divides the heads of a group.
      interpret: as in `output_pass`.
    """
    batch, _, heads, _ = x.shape
    per_group = heads // b.shape[2]
    simulated = interpret is not None

    def body(*refs):
        (x_ref, b_ref, coefficient_ref, rate_ref, start_ref, total_ref, b_bias_ref, added_ref, decay_ref, raw, rates,
         all_x, all_rot, all_scaled, all_coefficients, all_starts, all_bias, all_narrow, raw_here, raw_read, x_here,
         coefficients_here, bias_here) = refs  # fmt: skip
        index, piece, block = (lax.axis_index(name) for name in GRID)
        mine = lax.axis_index("warpgroup")
        head = block * together + mine
        both_x, both_coefficients, both_starts = all_x.at[mine], all_coefficients.at[mine], all_starts.at[mine]

        def chunk_of(step):
            return (piece + 1) * count - 1 - step

        def get_raw(step, slot):
            span = pl.ds(chunk_of(step) * T, T)
            plgpu.copy_gmem_to_smem(b_ref.at[index, span, head // per_group], raw.at[slot], raw_here.at[slot])
            for part in range(2):
                plgpu.copy_gmem_to_smem(rate_ref.at[index, span, part], rates.at[slot, part], raw_here.at[slot])

        def get_x(step, slot):
            ci, here = chunk_of(step), coefficients_here.at[mine, slot]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, ci], both_coefficients.at[slot], here)
            plgpu.copy_gmem_to_smem(start_ref.at[index, head, ci], both_starts.at[slot], here)
            plgpu.copy_gmem_to_smem(x_ref.at[index, pl.ds(ci * T, T), head], both_x.at[slot], x_here.at[mine, slot])

        plgpu.copy_gmem_to_smem(b_bias_ref.at[head], all_bias.at[mine], bias_here.at[mine])
        end = (piece // pieces + 1) * pieces * count - 1  # of the segment
        heads_here = [total_ref.at[index, block * together + k] for k in range(together)]
        steps = count_remembered(heads_here, count, lambda ref, step: ref[end] - ref[chunk_of(step)], simulated)
        for step in range(min(count, 2)):

            @pl.when(step < steps)
            def _(step=step):
                pl.when(mine == 0)(functools.partial(get_raw, step, step))
                get_x(step, step)

        plgpu.barrier_wait(bias_here.at[mine])
        all_narrow[mine] = load_cols(all_bias.at[mine, 0, pl.ds(HALF, HALF)]).astype(jnp.bfloat16)
        plgpu.commit_smem()

        def walk(acc):
            def chunk(step, log_decay):
                slot = lax.rem(step, 2)
                # Addresses must not look constant, or there are too few registers (forward.py).
                own = mine + opaque_zero(simulated)
                rot, scaled, bias, narrow = (v.at[own] for v in (all_rot, all_scaled, all_bias, all_narrow))
                here, start, x = (v.at[own, slot] for v in (all_coefficients, all_starts, all_x))
                row, column = iotas()
                plgpu.barrier_wait(coefficients_here.at[mine, slot])
                plgpu.barrier_wait(raw_here.at[slot])
                cos, sin, _ = turn_apart(
                    here, start, rates.at[slot], row, column, lambda: None, simulated, tight=together > 2
                )
                plgpu.barrier_wait(x_here.at[mine, slot])
                to_end = (load_rows(here.at[TO_END]) * jnp.exp2(log_decay)).astype(jnp.bfloat16)
                meet(simulated)
                scaled[...] = load_tile(x) * rows(to_end, P)
                rot[:, pl.ds(HALF, HALF)] = resting(raw.at[slot], narrow)
                rot[:, pl.ds(0, HALF)] = turning(raw.at[slot], bias, cos, sin, simulated)
                log_decay = log_decay + here[DECAY, T - 1]
                plgpu.commit_smem()

                @pl.when(step + 2 < steps)
                def _():
                    get_x(step + 2, slot)
                    plgpu.barrier_arrive(raw_read.at[slot])

                    @pl.when(mine == 0)
                    def _():
                        plgpu.barrier_wait(raw_read.at[slot])
                        get_raw(step + 2, slot)

                plgpu.wgmma(acc, scaled.transpose((1, 0)), rot)
                return log_decay

            log_decay = lax.fori_loop(0, steps, chunk, jnp.float32(0.0))
            return acc[...], log_decay

        state, log_decay = pl.run_scoped(walk, plgpu.ACC((P, N), jnp.float32))
        at = (index, head, piece)
        pl.when(steps > 0)(lambda: store_added(added_ref.at[at], decay_ref.at[at], state, log_decay))

    k = together
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, (segments - 1) * pieces + 1),
        scratch_types=[
            tile(2, T, N), rates_tile(2), tile(k, 2, T, P), tile(k, T, N), tile(k, T, P),
            plgpu.SMEM((k, 2, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((k, 2, S), jnp.float32),
            plgpu.SMEM((k, 1, N), jnp.float32), plgpu.SMEM((k, HALF), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=3, num_barriers=2), plgpu.Barrier(num_arrivals=k, num_barriers=2),
            plgpu.Barrier(num_barriers=(k, 2)), plgpu.Barrier(num_arrivals=2, num_barriers=(k, 2)),
            plgpu.Barrier(num_barriers=k),
        ],
        grid=(batch, (segments - 1) * pieces, heads // together), grid_names=GRID, num_threads=together,
        thread_name="warpgroup", interpret=interpret, compiler_params=PARAMETERS,
    )(x, b, *by_parts(prepared), prepared.totals, b_bias)  # fmt: skip
