"""Hopper kernels of the MIMO backward scan: G, the gradient of H, from the end of a head's sequence to its start.

Notation as in mimo_forward.py and mimo_gradients.py. Per chunk, in registers, with sums over pairs of ranks:

    G ← 2^(L_end) G + Σ_q (2^L ⊙ g_q)ᵀ C_q

G after every chunk is written as it is before that step. A sequence may be cut into segments, as in the forward.

The heads of a program read the same raw C and ω, which have two slots; the first head's warpgroup asks for them. Shared
memory is safe without automatic barriers by `free`, at which every thread arrives when it has rotated a slot of raw C,
and by two points where a warpgroup meets: A, where cosines and sines are there and G may leave, every warp has read dy,
z and the coefficients, so that those of the next chunk may arrive, and its products of the chunk before are done; B,
where C is rotated, cosines and sines may change, and G has left. What arrives has its own barrier.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared, by_parts
from .mimo_mixing import gated, to_rows
from .mimo_pieces import ROWS, blocks, iotas, positions
from .mimo_rotation import load_biases, own_angles, rotate_rows, store_turns
from .mimo_turning import get_rates, get_rows, in_rows, phases, rates_of_chunk
from .mimo_weights import MIMO_O, MIMO_Z, Packed, load_of_ranks
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    PARAMETERS,
    WG,
    N,
    P,
    S,
    cos_sin,
    load_cols,
    meet,
    opaque_zero,
    publish,
    tile,
    widen,
)
from .segment_states import added_shapes, count_remembered_after, load_state, no_state, pass_through, store_added
from .wgmma import begin, product, settle


def choose_together(per_group: int) -> int:
    """Heads of a program, of so many in a group."""
    return math.gcd(per_group, 4)


def state_gradients(
    dy: jax.Array, z: jax.Array | None, c: jax.Array, prepared: Prepared, weights: Packed,
    last_grad: jax.Array | None, *, segments: int, interpret=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The gradient of H after every chunk, and before the first token.

    Args:
      dy: gradient of the output, [b, l, h, P] bfloat16 or, without gate, as rows [b, h, chunks, ROWS, P]; l is a whole
        number of chunks.
      z: the gate, [b, l, h, P]; None = none.
      c: C, [b, l, r, g, N] bfloat16.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      last_grad: gradient of H after the last token, [b, h, P, N] float32; None = zeros.
      segments: of the sequence; all but the last have equally many chunks.
      interpret: parameters of the interpreter, if it is to run the kernels.

    Returns:
      [b, chunks, h, P, N] bfloat16 and [b, h, P, N] float32.
    """
    given = (dy, z, c, prepared, weights)
    after = _walk(*given, None, (), segments, True, interpret) if segments > 1 else ()
    return _walk(*given, last_grad, after, segments, False, interpret)


def _walk(dy, z, c, prepared, weights, last_grad, after, segments: int, states_only: bool, interpret):
    """Walks every segment. `states_only`: but the first, from G = 0; returns what each adds to G, and its decay.

    `after` is what that returned (segment_states.py). Every warpgroup has a head of its own.
    """
    batch, length, ranks, groups, _ = c.shape
    heads = weights.mimo.shape[0]
    span = positions(ranks)
    per_group, chunks = heads // groups, length // span
    most = -(-chunks // segments)
    together = choose_together(per_group)
    simulated = interpret is not None

    def body(*refs):
        dy_ref, z_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, mimo_ref, *refs = refs
        if states_only:
            total_ref, *refs = refs
        if last_grad is not None:
            last_ref, *refs = refs
        if after:
            added_ref, decay_ref, *refs = refs
        (grads_ref, first_ref, raw, all_rates, all_rotated, all_dy, all_z, all_turns, all_here, all_start, all_narrow,
         early_here, raw_here, free) = refs  # fmt: skip
        index, segment, program = (lax.axis_index(name) for name in GRID)
        own = lax.axis_index("warpgroup")
        head = program * together + own
        if states_only:
            segment = segment + 1
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most
        if states_only:  # no less than any head of the program needs, as all walk the same chunks
            totals = [total_ref.at[index, program * together + k] for k in range(together)]
            count = jnp.minimum(count, count_remembered_after(totals, first, most, simulated))

        def get_early(back):
            ci = first + count - 1 - back
            at, here, barrier = (index, head, ci), pl.ds(ci * span, span), early_here.at[own]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[at], all_here.at[own], barrier)
            plgpu.copy_gmem_to_smem(start_ref.at[at], all_start.at[own], barrier)
            plgpu.copy_gmem_to_smem(dy_ref.at[at if z is None else (index, here, head)], all_dy.at[own], barrier)
            if z is not None:
                plgpu.copy_gmem_to_smem(z_ref.at[index, here, head], all_z.at[own], barrier)

        def get_c(back):
            ci, slot = first + count - 1 - back, lax.rem(back, 2)
            chunk, barrier = index * chunks + ci, raw_here.at[slot]
            get_rows(c_ref, chunk, head // per_group, raw.at[slot], barrier, ranks, simulated)
            get_rates(rate_ref, index, ci, all_rates.at[slot], barrier)

        get_early(0)

        @pl.when(own == 0)
        def _():
            get_c(0)
            pl.when(count > 1)(lambda: get_c(1))

        state = no_state() if last_grad is None else load_state(last_ref.at[index, head])
        if after:
            added, decays, later = added_ref.at[index, head], decay_ref.at[index, head], segments - 1 - segment
            state = pass_through(state, added, decays, later, lambda back: segments - 2 - back)
        bias = load_biases(weight_ref.at[head], jnp.int32(1), ranks, simulated)

        def chunk(back, carry):
            state, log_decay = carry
            slot = lax.rem(back, 2)
            mine = own + opaque_zero(simulated)
            here, rotated, turns = all_here.at[mine], all_rotated.at[mine], all_turns.at[mine]
            if not states_only:
                all_narrow[mine] = state.astype(jnp.bfloat16)
            plgpu.barrier_wait(raw_here.at[slot])
            plgpu.barrier_wait(early_here.at[own])
            angle = phases(here, all_start.at[mine], all_rates.at[slot], *iotas(mine - own, ranks), ranks, simulated)
            store_turns(turns, *cos_sin(own_angles(angle, ranks, simulated), simulated), ranks, simulated)
            end = here[DECAY, span - 1]
            g = _of_rows(all_dy.at[mine], None if z is None else all_z.at[mine], mimo_ref.at[head + mine - own], ranks,
                         simulated)  # fmt: skip
            scaled = (g * to_rows(jnp.exp2(load_cols(here.at[DECAY])))).astype(jnp.bfloat16)
            publish(simulated)
            meet(simulated)  # A

            @pl.when(back + 1 < count)
            def _():
                get_early(back + 1)

                @pl.when((own == 0) & (back > 0))
                def _():
                    plgpu.barrier_wait(free.at[lax.rem(back + 1, 2)])
                    get_c(back + 1)

            if not states_only:
                ci = first + count - 1 - back
                plgpu.copy_smem_to_gmem(all_narrow.at[own], grads_ref.at[index, ci, head])
            rotate_rows([raw.at[slot + mine - own]], [rotated], [bias], [turns], ranks, simulated)
            pl.when(back + 2 < count)(lambda: plgpu.barrier_arrive(free.at[slot]))
            publish(simulated)
            if states_only:
                meet(simulated)  # B
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # B: this, too, makes the warps meet
            state = begin(state * jnp.exp2(end), simulated)
            return settle(product(state, scaled, rotated, simulated), 0, simulated), log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (state, jnp.float32(0.0)))
        if states_only:
            at = (index, head, segment - 1)
            store_added(grads_ref.at[at], first_ref.at[at], state, log_decay)
        else:

            @pl.when(segment == 0)
            def _():
                first_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = shape((batch, chunks, heads, P, N), jnp.bfloat16), shape((batch, heads, P, N), f32)
    given = [(prepared.totals,) if states_only else (), () if last_grad is None else (last_grad,), after]
    values = tile(together, span if z is not None else ROWS, P)
    barriers = functools.partial(plgpu.Barrier, num_barriers=together)
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, segments) if states_only else out,
        scratch_types=[
            blocks(2), rates_of_chunk(ranks, 2), blocks(together), values, None if z is None else values,
            plgpu.SMEM((together, span, S), jnp.int32), plgpu.SMEM((together, COEFFICIENTS, span), f32),
            plgpu.SMEM((together, S), f32), None if states_only else tile(together, P, N),
            barriers(num_arrivals=3 + (z is not None)), plgpu.Barrier(num_arrivals=ranks // 2 + 1, num_barriers=2),
            plgpu.Barrier(num_arrivals=together, num_barriers=2),
        ],
        grid=(batch, segments - states_only, heads // together), grid_names=GRID, num_threads=together,
        thread_name="warpgroup", interpret=interpret, compiler_params=PARAMETERS,
    )(dy, z, in_rows(c, simulated), *by_parts(prepared), *weights, *sum(map(tuple, given), ()))  # fmt: skip


def _of_rows(dy, z, mimo, ranks: int, simulated: bool) -> jax.Array:
    """g of all ranks, transposed: [P, ROWS] float32."""
    dy = widen(plgpu.load(dy.transpose((1, 0)), layout=WG), simulated)
    if z is None:
        return dy
    z = widen(plgpu.load(z.transpose((1, 0)), layout=WG), simulated)
    return gated(z, dy, *(load_of_ranks(mimo, kind, simulated) for kind in (MIMO_Z, MIMO_O)))
