"""Hopper kernels of the SISO backward scan: G, the gradient of H, from the end of a head's sequence to its start.

Notation as in forward.py. With g = dy ⊙ silu(z), the gradient of y before the gate (without gate dy itself), per chunk
and in registers:

    G ← 2^(L_end) G + (2^L ⊙ g)ᵀ C

G after every chunk is written as it is before that step. A sequence may be cut into segments, as in the forward.

Shared memory is used without automatic barriers. The warpgroup meets at two points of a chunk:
  A  Rotated C is in `rot`, 2^L ⊙ g in `scaled`, G in `narrow`. Every warp has read the raw C, ω, dy, z, coefficients,
     so that the next raw tiles may arrive, and dy, z and coefficients of two chunks ahead. G may leave.
  C  Every warp's products with `rot` and `scaled` are done, and G has left `narrow`: they may change.
Before A every thread publishes its stores (a fence) to copies and products. What arrives has its own barrier.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    HALF,
    PARAMETERS,
    N,
    P,
    S,
    T,
    accumulate,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    resting,
    rows,
    tile,
    turn,
    turning,
    widen,
)
from .segment_states import added_shapes, count_remembered_after, load_state, no_state, pass_through, store_added


def state_gradients(
    dy: jax.Array, z: jax.Array | None, c: jax.Array, prepared: Prepared, c_bias: jax.Array,
    last_grad: jax.Array | None, *, segments: int, first: bool = True, interpret=None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """The gradient of H after every chunk, and, if asked for `first`, before the first token.

    Args:
      dy: gradient of the output, [b, l, h, P] bfloat16; l is a whole number of chunks.
      z: the gate, likewise; None = none.
      c: C, [b, l, g, N] bfloat16.
      prepared: from prepare.py.
      c_bias: [h, 1, N] float32.
      last_grad: gradient of H after the last token, [b, h, P, N] float32; None = zeros, and the gradient after the
        last chunk is written for the first head only.
      segments: of the sequence; all but the last have equally many chunks.
      first: whether the latter is wanted.
      interpret: parameters of the interpreter, if it is to run the kernels.

    Returns:
      [b, h, chunks, P, N] bfloat16, and [b, h, P, N] float32 or None.
    """
    after = ()
    if segments > 1:
        after = _walk(dy, z, c, prepared, c_bias, None, (), segments, True, True, interpret)
    return _walk(dy, z, c, prepared, c_bias, last_grad, after, segments, False, first, interpret)


def _walk(dy, z, c, prepared, c_bias, last_grad, after, segments: int, states_only: bool, wants_first: bool, interpret):
    """Walks every segment. `states_only`: but the first, from G = 0; returns what each adds to G, and its decay.

    `after` is what that returned (segment_states.py).
    """
    batch, length, heads, _ = dy.shape
    chunks, per_group = length // T, heads // c.shape[2]
    most = -(-chunks // segments)
    simulated = interpret is not None

    def body(*refs):
        dy_ref, z_ref, c_ref, coefficient_ref, rate_ref, start_ref, *refs = refs
        if states_only:
            total_ref, *refs = refs
        c_bias_ref, *refs = refs
        if last_grad is not None:
            last_ref, *refs = refs
        if after:
            added_ref, decay_ref, *refs = refs
        grads_ref, first_ref, *refs = refs
        (raw, rate, both_dy, both_z, both_coefficients, both_starts, bias, narrow_bias, rot, scaled, narrow, raw_here,
         slot_here, bias_here) = refs  # fmt: skip
        index, segment, head = (lax.axis_index(name) for name in GRID)
        if states_only:
            segment = segment + 1
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most
        if states_only:
            count = jnp.minimum(count, count_remembered_after([total_ref.at[index, head]], first, most, simulated))

        def span(back):
            return pl.ds((first + count - 1 - back) * T, T)

        def get_raw(back):
            plgpu.copy_gmem_to_smem(c_ref.at[index, span(back), head // per_group], raw, raw_here)
            plgpu.copy_gmem_to_smem(rate_ref.at[index, span(back)], rate, raw_here)

        def get_slot(back, slot):
            ci, here = first + count - 1 - back, slot_here.at[slot]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, ci], both_coefficients.at[slot], here)
            plgpu.copy_gmem_to_smem(start_ref.at[index, head, ci], both_starts.at[slot], here)
            plgpu.copy_gmem_to_smem(dy_ref.at[index, span(back), head], both_dy.at[slot], here)
            if z is not None:
                plgpu.copy_gmem_to_smem(z_ref.at[index, span(back), head], both_z.at[slot], here)

        plgpu.copy_gmem_to_smem(c_bias_ref.at[head], bias, bias_here)
        get_raw(0)
        get_slot(0, 0)
        pl.when(count > 1)(lambda: get_slot(1, 1))
        state = no_state() if last_grad is None else load_state(last_ref.at[index, head])
        if after:
            added, decays, later = added_ref.at[index, head], decay_ref.at[index, head], segments - 1 - segment
            state = pass_through(state, added, decays, later, lambda back: segments - 2 - back)
        if not states_only:
            narrow[...] = state.astype(jnp.bfloat16)
        plgpu.barrier_wait(bias_here)
        narrow_bias[...] = load_cols(bias.at[0, pl.ds(HALF, HALF)]).astype(jnp.bfloat16)
        plgpu.commit_smem()

        def chunk(back, carry):
            state, log_decay = carry
            slot = lax.rem(back, 2)
            here = both_coefficients.at[slot]
            row, column = iotas()
            plgpu.barrier_wait(slot_here.at[slot])
            plgpu.barrier_wait(raw_here)

            def without_phases():
                g = widen(load_tile(both_dy.at[slot]), simulated)
                if z is not None:
                    half = widen(load_tile(both_z.at[slot]) * jnp.bfloat16(0.5), simulated)
                    g = g * (half * jnp.tanh(half) + half)
                scaled[...] = (g * rows(jnp.exp2(load_rows(here.at[DECAY])), P)).astype(jnp.bfloat16)
                rot[:, pl.ds(HALF, HALF)] = resting(raw, narrow_bias)

            cos, sin, _ = turn(here, both_starts.at[slot], rate, row, column, without_phases, simulated)
            rot[:, pl.ds(0, HALF)] = turning(raw, bias, cos, sin, simulated)
            end = here[DECAY, T - 1]
            plgpu.commit_smem()  # A
            if not states_only:
                ci = first + count - 1 - back
                is_needed = True if last_grad is not None else (ci < chunks - 1) | (head == 0)
                pl.when(is_needed)(lambda: plgpu.copy_smem_to_gmem(narrow, grads_ref.at[index, head, ci]))
            pl.when(back + 1 < count)(lambda: get_raw(back + 1))
            pl.when(back + 2 < count)(lambda: get_slot(back + 2, slot))

            def update(accs, read):
                plgpu.wgmma(accs[0], scaled.transpose((1, 0)), rot)

            (state,) = accumulate(update, (state * jnp.exp2(end),), simulated)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # C: this, too, makes the warps meet
            if not states_only:
                narrow[...] = state.astype(jnp.bfloat16)
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (state, jnp.float32(0.0)))
        if states_only:
            at = (index, head, segment - 1)
            store_added(grads_ref.at[at], first_ref.at[at], state, log_decay)
        else:
            if wants_first:

                @pl.when(segment == 0)
                def _():
                    first_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

    out = (
        jax.ShapeDtypeStruct((batch, heads, chunks, P, N), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, heads, P, N), jnp.float32) if wants_first else None,
    )
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, segments) if states_only else out,
        scratch_types=[
            tile(T, N), tile(T, 2 * S), tile(2, T, P), None if z is None else tile(2, T, P),
            plgpu.SMEM((2, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((2, S), jnp.float32),
            plgpu.SMEM((1, N), jnp.float32), plgpu.SMEM((HALF,), jnp.bfloat16), tile(T, N), tile(T, P), tile(P, N),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=3 + (z is not None), num_barriers=2),
            plgpu.Barrier(),
        ],
        grid=(batch, segments - states_only, heads), grid_names=GRID, num_threads=1, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(dy, z, c, *(prepared if states_only else prepared[:3]), c_bias,
      *(() if last_grad is None else (last_grad,)), *after)  # fmt: skip
