"""Hopper kernels of the MIMO backward scan: G, the gradient of H, from the end of a head's sequence to its start.

Notation as in mimo_forward.py and mimo_gradients.py. Per chunk, in registers, with sums over pairs of ranks:

    G ← 2^(L_end) G + Σ_q (2^L ⊙ g_q)ᵀ C_q

G after every chunk is written as it is before that step, and with it what a step of the decay or of a phase does to all
that comes later: <G, H> by coordinate, and the parts of <G, J H>, where H follows the chunk. A sequence may be cut into
segments, as in the forward.

Shared memory is used without automatic barriers. The warpgroup meets at two points of a chunk:
  A  Rotated C is in place of the raw one, 2^L ⊙ g in `scaled`, G in `narrow`. Every warp has read ω, dy, z and the
     coefficients: those of the next chunk may arrive. G may leave.
  C  Every warp's products with C, `scaled`, G and H are done, and G has left: they may change, the next C and H arrive.
Before A every thread publishes its stores (a fence) to copies and products. What arrives has its own barrier.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import mimo_weights as of
from .forward import Prepared
from .mimo_pieces import POS, ROWS, blocks, iotas, join, positions, positions_layout, split, spread
from .mimo_turning import by_parts, get_rates, get_rows, in_rows, rates_of_chunk, rotate, turn
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    HALF,
    PARAMETERS,
    WG,
    N,
    P,
    S,
    load_rows,
    load_tile,
    opaque_zero,
    pick,
    rows,
    tile,
    widen,
)
from .pieces import iotas as square_iotas
from .segment_states import added_shapes, count_remembered_after, load_state, no_state, pass_through, store_added
from .wgmma import begin, product, settle

# Rows of what is written per chunk, float32 [N / 2] each: <G, H> by coordinate, summed over both halves of them; and
# <G, J H> in two parts, by coordinate of G.
FLOWS = 2
FLOW, TURNED_FLOW = range(FLOWS)


def state_gradients(
    dy: jax.Array, z: jax.Array | None, c: jax.Array, prepared: Prepared, weights: jax.Array, chunk_ssm: jax.Array,
    last_grad: jax.Array | None, *, segments: int, interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient of H after every chunk, its flows there but for the last, and the gradient before the first token.

    Args:
      dy: gradient of the output, [b, l, h, P] bfloat16 or, without gate, as rows [b, h, chunks, ROWS, P]; l is a whole
        number of chunks.
      z: the gate, [b, l, h, P]; None = none.
      c: C, [b, l, r, g, N] bfloat16.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      chunk_ssm: H before every chunk, [b, h, chunks, P, N] bfloat16.
      last_grad: gradient of H after the last token, [b, h, P, N] float32; None = zeros.
      segments: of the sequence; all but the last have equally many chunks.
      interpret: parameters of the interpreter, if it is to run the kernels.

    Returns:
      [b, h, chunks, P, N] bfloat16, [b, h, chunks, FLOWS, N / 2] and [b, h, P, N] float32.
    """
    given = (dy, z, c, prepared, weights, chunk_ssm)
    after = _walk(*given, None, (), segments, True, interpret) if segments > 1 else ()
    return _walk(*given, last_grad, after, segments, False, interpret)


def _walk(dy, z, c, prepared, weights, chunk_ssm, last_grad, after, segments: int, states_only: bool, interpret):
    """Walks every segment. `states_only`: but the first, from G = 0; returns what each adds to G, and its decay.

    `after` is what that returned (segment_states.py).
    """
    batch, length, ranks, groups, _ = c.shape
    heads = weights.shape[0]
    span, layout = positions(ranks), positions_layout(ranks)
    per_group, chunks = heads // groups, length // span
    most = -(-chunks // segments)
    simulated = interpret is not None

    def body(*refs):
        dy_ref, z_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, *refs = refs
        if states_only:
            total_ref, *refs = refs
        else:
            ssm_ref, *refs = refs
        if last_grad is not None:
            last_ref, *refs = refs
        if after:
            added_ref, decay_ref, *refs = refs
        if states_only:
            added_out, decay_out, *refs = refs
        else:
            grads_ref, flow_ref, first_ref, *refs = refs
        (all_c, all_dy, all_z, all_scaled, all_rates, all_here, all_start, all_narrow, all_following,
         early_here, c_here, following_here) = refs  # fmt: skip
        index, segment, head = (lax.axis_index(name) for name in GRID)
        if states_only:
            segment = segment + 1
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most
        if states_only:
            count = jnp.minimum(count, count_remembered_after(total_ref.at[index, head], first, most, simulated))

        def get_early(back):
            ci = first + count - 1 - back
            at, here = (index, head, ci), pl.ds(ci * span, span)
            plgpu.copy_gmem_to_smem(coefficient_ref.at[at], all_here.at[0], early_here)
            plgpu.copy_gmem_to_smem(start_ref.at[at], all_start.at[0], early_here)
            get_rates(rate_ref, index, ci, all_rates.at[0], early_here)
            if z is None:
                plgpu.copy_gmem_to_smem(dy_ref.at[at], all_dy.at[0], early_here)
            else:
                plgpu.copy_gmem_to_smem(dy_ref.at[index, here, head], all_dy.at[0], early_here)
                plgpu.copy_gmem_to_smem(z_ref.at[index, here, head], all_z.at[0], early_here)

        def get_c(back):
            ci = index * chunks + first + count - 1 - back
            get_rows(c_ref, ci, head // per_group, all_c.at[0], c_here, ranks, simulated)
            if not states_only:
                # The last chunk has none following: what comes of it is not used.
                after = jnp.minimum(first + count - back, chunks - 1)
                plgpu.copy_gmem_to_smem(ssm_ref.at[index, head, after], all_following.at[0], following_here)

        get_early(0)
        get_c(0)
        state = no_state() if last_grad is None else load_state(last_ref.at[index, head])
        if after:
            added, decays, later = added_ref.at[index, head], decay_ref.at[index, head], segments - 1 - segment
            state = pass_through(state, added, decays, later, lambda back: segments - 2 - back)
        all_narrow[0] = state.astype(jnp.bfloat16)

        def chunk(back, carry):
            state, log_decay = carry
            zero = opaque_zero(simulated)
            rows_c, scaled, here, start, narrow = (
                v.at[zero] for v in (all_c, all_scaled, all_here, all_start, all_narrow)
            )
            weight = functools.partial(of.load_weight, weight_ref.at[head + zero], ranks=ranks, simulated=simulated)
            plgpu.barrier_wait(early_here)
            row, column = iotas(zero, ranks)
            cos, sin = turn(here, start, all_rates.at[0], row, column, ranks, simulated)
            end = here[DECAY, span - 1]
            from_start = spread(rows(jnp.exp2(load_rows(here.at[DECAY], layout)), P), simulated)
            if z is None:
                both = [widen(g, simulated, POS) for g in split(load_tile(all_dy.at[zero]), simulated)]
            else:
                z_wide, dy_wide = (spread(widen(load_tile(v.at[zero], layout), simulated, layout), simulated)
                                   for v in (all_z, all_dy))  # fmt: skip
                both = []
                for rank in range(2):
                    half = z_wide * weight(rank, of.MIMO_Z)
                    both.append(dy_wide * weight(rank, of.MIMO_O) * (half * jnp.tanh(half) + half))
            scaled[...] = join(*((g * from_start).astype(jnp.bfloat16) for g in both), simulated)
            plgpu.barrier_wait(c_here)
            rotate(rows_c, rows_c, of.C_BIAS, of.C_REST, weight, cos, sin, simulated)
            plgpu.commit_smem()  # A
            pl.when(back + 1 < count)(lambda: get_early(back + 1))
            if not states_only:
                ci = first + count - 1 - back
                plgpu.copy_smem_to_gmem(all_narrow.at[0], grads_ref.at[index, head, ci])
                plgpu.barrier_wait(following_here)
                _flows(narrow, all_following.at[zero], flow_ref.at[index, head, ci], simulated)
            state = begin(state * jnp.exp2(end), simulated)
            by_column = plgpu.load(scaled.transpose((1, 0)), layout=WG)
            state = settle(product(state, by_column, rows_c, simulated), 0, simulated)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # C: this, too, makes the warps meet
            all_narrow[0] = state.astype(jnp.bfloat16)
            pl.when(back + 1 < count)(lambda: get_c(back + 1))
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (state, jnp.float32(0.0)))
        if states_only:
            at = (index, head, segment - 1)
            store_added(added_out.at[at], decay_out.at[at], state, log_decay)
        else:

            @pl.when(segment == 0)
            def _():
                first_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = (
        shape((batch, heads, chunks, P, N), jnp.bfloat16), shape((batch, heads, chunks, FLOWS, HALF), f32),
        shape((batch, heads, P, N), f32),
    )  # fmt: skip
    given = [(prepared.totals if states_only else chunk_ssm,), () if last_grad is None else (last_grad,), after]
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, segments) if states_only else out,
        scratch_types=[
            blocks(1), *((tile(1, ROWS, P), None) if z is None else (tile(1, span, P), tile(1, span, P))),
            tile(1, ROWS, P), rates_of_chunk(ranks, 1),
            plgpu.SMEM((1, COEFFICIENTS, span), f32), plgpu.SMEM((1, S), f32), tile(1, P, N), tile(1, P, N),
            plgpu.Barrier(num_arrivals=4 + (z is not None)), plgpu.Barrier(num_arrivals=ranks // 2), plgpu.Barrier(),
        ],
        grid=(batch, segments - states_only, heads), grid_names=GRID, num_threads=1, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(dy, z, in_rows(c, simulated), *by_parts(prepared), weights, *sum(map(tuple, given), ()))  # fmt: skip


def _flows(grad, ssm, out, simulated: bool) -> None:
    """What FLOWS says, of G and H [P, N] in shared memory: diagonals of products over P."""
    row, column = square_iotas()

    def add(turned, rest):
        for acc, first in ((turned, 0), (rest, HALF)):
            half = pl.ds(first, HALF)
            plgpu.wgmma(acc, grad.at[:, half].transpose((1, 0)), ssm.at[:, half])
        turned, rest = (plgpu.wgmma_accumulator_load(acc, wait_n=0) for acc in (turned, rest))
        out[FLOW] = pick(turned, row, column, 0, simulated) + pick(rest, row, column, 0, simulated)
        out[TURNED_FLOW] = pick(turned, row, column, S, simulated)

    square = plgpu.ACC((HALF, HALF), jnp.float32)
    pl.run_scoped(add, square, square)
