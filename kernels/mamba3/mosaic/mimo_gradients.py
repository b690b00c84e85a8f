"""Hopper kernel of the MIMO backward scan's gradients: chunks in parallel, one warpgroup for queries and one for keys.

Notation as in mimo_forward.py; H enters the chunk, G is the gradient of H after it. With g_r = dy ⊙ mimo_o_r ⊙ silu(z ⊙
mimo_z_r) and w_j = 2^(L_end - L_j) s_j, sums over q being over ranks:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r       dX_r = w ⊙ (B_r Gᵀ) + Σ_q (B_r C_qᵀ ⊙ Mᵀ) g_q + D g_r
    dC_r = (2^L ⊙ g_r) H + Σ_q (g_r X_qᵀ ⊙ M) B_q                dB_r = (w ⊙ X_r) G + Σ_q (X_r g_qᵀ ⊙ Mᵀ) C_q

The right column is the left one with queries and keys exchanged: the same code is either, its `own` rows being C, g and
H, or B, X and G. It finds its own scores, as waiting for the other's would cost more. Of y it makes the gradients of z,
mimo_z and mimo_o, of dX those of x and mimo_x. Without gate g is given, as rows, and y has no gradients to make.

A program has a few chunks, one after another, and walks a block of heads in each. Gradients of B and C, turned back,
are added up over these heads, as are dω's parts. Gradients of weights are sums over positions: products with ones of
what is staged for them, which are added up over the program's chunks in global memory.

Shared memory is used without automatic barriers. Both warpgroups wait at:
  free    Both are done with what the other has written for the head before, and with what had arrived for it: it may
          change, and what the next head needs may arrive where that was, once dz or dx have left. Where a chunk begins,
          once more: both are done with the chunk before, so its B, C and ω may arrive.
  ready   Rotated rows, X and g of all ranks are written.
and that of the queries at `turned`, for cos and sin, which that of the keys finds.
A warpgroup meets where it has staged something for products, and before it stages more. Before any of these every
thread publishes (a fence) what copies or products are to read. What arrives from global memory has its own barrier.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from .forward import Prepared
from .mimo_head_gradients import KEYS, QUERIES, SIDES, VECTORS, Shared, Written, one_head
from .mimo_pieces import HALF_ROWS, POS, RANKS, ROWS, add_counted, positions, split, unspread
from .mimo_turning import by_parts, get_rates, get_rows, in_rows
from .pieces import PARAMETERS, WG, N, P, S

_GRID = ("block", "program")


class Gradients(NamedTuple):
    """What the kernel writes."""

    z: jax.Array | None  # [b, l, h, P] bfloat16, as x
    x: jax.Array
    down: jax.Array  # of C and B, [blocks, SIDES, b, chunks, 2, 32, N] float32, by rank of a pair and row
    biases: jax.Array  # of theirs, [programs, h, SIDES, 2, N / 2, RANKS] float32
    mimo: jax.Array  # of mimo_o, mimo_z and mimo_x, and a place of no use, [programs, h, 4, P, RANKS] float32
    vectors: jax.Array  # [b, h, chunks, SIDES, VECTORS, 32] float32
    omega: jax.Array  # [blocks, SIDES, b, l, S] float32


def gradients(
    x: jax.Array, z: jax.Array | None, dy: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared,
    weights: jax.Array, d: jax.Array, chunk_ssm: jax.Array, chunk_grad: jax.Array, *, block: int, count: int,
    interpret=None,
) -> Gradients:  # fmt: skip
    """All gradients, or what their sums over chunks, blocks of heads and pairs of ranks are.

    Args:
      x: [b, l, h, P] bfloat16, as z and dy; l is a whole number of chunks.
      z: the gate; None = none.
      dy: gradient of the output; without gate as rows, [b, h, chunks, ROWS, P].
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      d: [h] float32.
      chunk_ssm: H before every chunk, [b, h, chunks, P, N] bfloat16.
      chunk_grad: the gradient of H after every chunk, likewise.
      block: heads of a program, a divisor of h / g.
      count: chunks of a program, one after another.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    span = positions(ranks)
    per_group, chunks = heads // groups, length // span
    programs = -(-batch * chunks // count)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, dy_ref, c_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, ssm_ref, grad_ref,
         ones_ref, *refs) = refs  # fmt: skip
        out, shared = Gradients(*refs[: len(Gradients._fields)]), Shared(*refs[len(Gradients._fields) :])
        block_index, program = (lax.axis_index(name) for name in _GRID)
        first = program * count
        steps = block * (jnp.minimum(count, batch * chunks - first) if batch * chunks % count else count)

        def get(side: int, step):
            chunk, k = first + lax.div(step, block), lax.rem(step, block)
            index, ci = lax.div(chunk, chunks), lax.rem(chunk, chunks)
            here = pl.ds(ci * span, span)
            slot, head = lax.rem(step, 2), block_index * block + k
            at, value = (index, head, ci), (index, here, head)
            copies = [(dy_ref.at[at if z is None else value], shared.dy.at[slot])]
            if z is not None:
                copies.append((z_ref.at[value], shared.z.at[slot]))
            if side == KEYS:  # which has less else to do
                copies = [
                    (coefficient_ref.at[at], shared.coefficients.at[slot]), (start_ref.at[at], shared.start.at[slot]),
                    (x_ref.at[value], shared.x.at[slot]), (weight_ref.at[head], shared.weights.at[slot]),
                    (ssm_ref.at[at], shared.states.at[slot, QUERIES]),
                    (grad_ref.at[at], shared.states.at[slot, KEYS]),
                ]  # fmt: skip
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, shared.here.at[slot])

        def clear(side: int, k, _):
            head = block_index * block + k
            for ref in (out.biases.at[program, head, side], out.mimo.at[program, head, pl.ds(2 * side, 2)]):
                add_counted(ref, None, simulated)
            return 0

        def get_chunk(side: int, chunk):
            source, group = (c_ref, b_ref)[side], block_index * block // per_group
            get_rows(source, chunk, group, shared.raw.at[side], shared.raw_here, ranks, simulated)
            if side == QUERIES:
                get_rates(rate_ref, lax.div(chunk, chunks), lax.rem(chunk, chunks), shared.rates, shared.raw_here)
                plgpu.copy_gmem_to_smem(ones_ref, shared.ones, shared.raw_here)

        def run(side: int):
            lax.fori_loop(0, block, functools.partial(clear, side), 0)
            get(side, 0)
            plgpu.barrier_arrive(shared.free)

            def one(step, carry):
                chunk, k = first + lax.div(step, block), lax.rem(step, block)
                index, ci = lax.div(chunk, chunks), lax.rem(chunk, chunks)
                here = pl.ds(ci * span, span)
                slot, head = lax.rem(step, 2), block_index * block + k
                plgpu.barrier_wait(shared.free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, in the slot of the next
                pl.when(step + 1 < steps)(lambda: get(side, step + 1))

                @pl.when(k == 0)
                def _():
                    if count > 1:
                        plgpu.barrier_arrive(shared.free)
                        plgpu.barrier_wait(shared.free)
                    get_chunk(side, chunk)
                    plgpu.barrier_wait(shared.raw_here)

                plgpu.barrier_wait(shared.here.at[slot])
                value = (out.z, out.x)[side]
                to = Written(
                    None if value is None else value.at[index, here, head], out.biases.at[program, head, side],
                    out.mimo.at[program, head, pl.ds(2 * side, 2)], out.vectors.at[index, head, ci, side],
                )  # fmt: skip
                total, domega = one_head(side, slot, shared, to, d_ref[head], carry, ranks, simulated)

                def finish(total, domega):
                    for half, part in enumerate(split(total, simulated)):
                        out.down[block_index, side, index, ci, half] = part
                    out.omega[block_index, side, index, here] = unspread(domega, ranks, simulated)
                    return _no_sums()

                return lax.cond(k == block - 1, finish, lambda *sums: sums, total, domega)

            lax.fori_loop(0, steps, one, _no_sums())
            plgpu.barrier_wait(shared.free)
            plgpu.wait_smem_to_gmem(0)

        for side in SIDES:
            pl.when(lax.axis_index("warpgroup") == side)(functools.partial(run, side))

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = Gradients(
        z=None if z is None else shape(x.shape, x.dtype),
        x=shape(x.shape, x.dtype),
        down=shape((heads // block, 2, batch, chunks, 2, HALF_ROWS, N), f32),
        biases=shape((programs, heads, 2, 2, N // 2, RANKS), f32),
        mimo=shape((programs, heads, 4, P, RANKS), f32),
        vectors=shape((batch, heads, chunks, 2, VECTORS, HALF_ROWS), f32),
        omega=shape((heads // block, 2, batch, length, S), f32),
    )
    arrays = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=Shared.types(ranks, z is not None, simulated),
        grid=(heads // block, programs), grid_names=_GRID, num_threads=2, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, in_rows(c, simulated), in_rows(b, simulated), *by_parts(prepared), weights, d, chunk_ssm, chunk_grad,
      _ones(ranks))  # fmt: skip
    return Gradients(*arrays)


def _no_sums() -> tuple[jax.Array, jax.Array]:
    """Over heads, of rows and of dω, before the first."""
    wide = plgpu.layout_cast(jnp.zeros((ROWS, N), jnp.float32), WG)
    return wide, plgpu.layout_cast(jnp.zeros((HALF_ROWS, S), jnp.float32), POS)


def _ones(ranks: int) -> jax.Array:
    """bfloat16 [2, 8, ROWS]: 1 where row k, or in the second k - RANKS, a rank, meets a row of that rank."""
    row = np.arange(ROWS)
    rank = row // 8 % 2 + (row // 32 * 2 if ranks == 4 else 0)
    return jnp.asarray([np.arange(8)[:, None] == rank + first for first in (0, RANKS)], jnp.bfloat16)
