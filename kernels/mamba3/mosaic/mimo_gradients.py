"""Hopper kernel of the MIMO backward scan's gradients: chunks in parallel; a side of queries, one of keys, one of rows.

Notation as in mimo_forward.py; H enters the chunk, G is the gradient of H after it. With g_r = dy ⊙ mimo_o_r ⊙ silu(z ⊙
mimo_z_r) and w_j = 2^(L_end - L_j) s_j, sums over q being over ranks:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r       dX_r = w ⊙ (B_r Gᵀ) + Σ_q (B_r C_qᵀ ⊙ Mᵀ) g_q + D g_r
    dC_r = (2^L ⊙ g_r) H + Σ_q (g_r X_qᵀ ⊙ M) B_q                dB_r = (w ⊙ X_r) G + Σ_q (X_r g_qᵀ ⊙ Mᵀ) C_q

The warpgroup of queries has the left column, that of keys the right one. The third works a head ahead of them: it makes
rotated C and B, X and g of all ranks, and products of rows with rows, times M and with D on the diagonal, which both
others read (mimo_ahead.py). y and dX are found transposed, [P, rows], as in the forward: a thread has all ranks of its
positions in two rows of P. Of y the gradients of z, mimo_z and mimo_o are made, of dX those of x and mimo_x. Without
gate g is given, as rows, and y has no gradients to make.

What passes a chunk's end is <G, H'> by coordinate, with H' after the chunk. It is found without H': of <G, H> and of
the part of dB that comes through G.

A program takes its share of all heads of all chunks, chunk after chunk, and of a chunk group after group
(mimo_shares.py). Gradients of B and C, turned back, are added up over a group's heads, as are dω's parts, as far as the
program has them. Gradients of weights are sums over positions, which are added up over the program's chunks in global
memory.

Shared memory is used without automatic barriers. Rows, X, g and their products have two slots, for two heads (at 2
ranks the products have one). What arrives has its own barrier; every thread arrives at the others:
  full   What the third warpgroup makes of a head is there, in one of the slots.
  empty  Both sides are done with a slot, and dz and dx have left, if a later head waits for it.
  used   Both sides have found dC and dB: rows, products, H and G may change, dz and dx may leave.
A warpgroup meets where it has staged something for its own products. Before any of these every thread publishes (a
fence) what copies or products are to read.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from .forward import Prepared, by_parts
from .mimo_ahead import Asks, make_rows
from .mimo_head_gradients import (
    EARLY_SLOTS,
    FLOWS,
    KEYS,
    OF_O,
    OF_X,
    OF_Z,
    QUERIES,
    SIDES,
    VECTORS,
    Shared,
    Written,
    finish,
    head_of,
    keys,
    not_before,
    queries,
)
from .mimo_pieces import HALF_ROWS, POS, RANKS, ROWS, add_counted, add_of_ranks, positions, split, unspread
from .mimo_shares import Shares
from .mimo_turning import get_rates, get_rows, in_rows
from .mimo_weights import Packed
from .pieces import PARAMETERS, WG, N, P, S

_GRID = ("program",)
# Of a thread of queries, of keys, of their rows: together no more than three times the 168 that a program begins with.
REGISTERS = 200, 208, 96
OF_SIDES = (OF_O, OF_Z), (OF_X,)  # gradients of weights of P


class Gradients(NamedTuple):
    """What the kernel writes."""

    z: jax.Array | None  # [b, l, h, P] bfloat16, as x
    x: jax.Array
    down: jax.Array  # of C and B, [b · chunks · g + programs, SIDES, 2, 32, N] float32, by rank of a pair and row
    biases: jax.Array  # of theirs, [programs, h, SIDES, 2, N / 2, RANKS] float32, of heads that a program has
    mimo: jax.Array  # of mimo_o, mimo_z and mimo_x, [programs, h, 3, P, RANKS] float32, likewise
    vectors: jax.Array  # [b · chunks · h, VECTORS, 32] float32, as the programs come to them
    flows: jax.Array  # [b · chunks · h, FLOWS, N / 2] float32, likewise
    turned: jax.Array  # what the chunk's keys add to <G, J H> after it, [b · chunks · h, S] float32, likewise
    omega: jax.Array  # as down, [.., SIDES, T, S] float32


def gradients(
    x: jax.Array, z: jax.Array | None, dy: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared,
    weights: Packed, d: jax.Array, chunk_ssm: jax.Array, chunk_grad: jax.Array, *, shares: Shares, interpret=None,
) -> Gradients:  # fmt: skip
    """All gradients, or what their sums over chunks, groups, programs and pairs of ranks are.

    A group of a chunk whose heads several programs have has its sums in as many places: of the program with the first
    head in the chunk's own, of the others behind those of all chunks.

    Args:
      x: [b, l, h, P] bfloat16, as z and dy; l is a whole number of chunks.
      z: the gate; None = none.
      dy: gradient of the output; without gate as rows, [b, h, chunks, ROWS, P].
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      d: [h] float32.
      chunk_ssm: H before every chunk, [b, chunks, h, P, N] bfloat16.
      chunk_grad: the gradient of H after every chunk, likewise.
      shares: which heads of which chunks a program has.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    span = positions(ranks)
    chunks = length // span
    simulated = interpret is not None

    def mimo_gradients(*refs):
        (x_ref, z_ref, dy_ref, c_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, mimo_ref, d_ref,
         ssm_ref, grad_ref, ones_ref, *refs) = refs  # fmt: skip
        out, shared = Gradients(*refs[: len(Gradients._fields)]), Shared(*refs[len(Gradients._fields) :])
        program = lax.axis_index("program")
        first, end = shares.of(program)
        at = shares.place

        def ask_early(step):
            index, ci, head, _ = at(step)
            slot = lax.rem(step, EARLY_SLOTS)
            here = shared.early_here.at[slot]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, ci], shared.coefficients.at[slot], here)
            plgpu.copy_gmem_to_smem(start_ref.at[index, head, ci], shared.start.at[slot], here)

        def ask_values(step):
            index, ci, head, _ = at(step)
            slot, value = lax.rem(step, 2), (index, pl.ds(ci * span, span), head)
            here = shared.values_here.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[value], shared.x.at[slot], here)
            source = dy_ref.at[(index, head, ci) if z is None else value]
            plgpu.copy_gmem_to_smem(source, shared.dy.at[slot], here)
            if z is not None:
                plgpu.copy_gmem_to_smem(z_ref.at[value], shared.z.at[slot], here)

        def ask_rows(step):
            index, ci, head, of = at(step)
            chunk, group = index * chunks + ci, lax.div(head, shares.per_group)
            for side, source in ((QUERIES, c_ref), (KEYS, b_ref)):
                get_rows(source, chunk, group, shared.raw.at[side], shared.raw_here, ranks, simulated)
            get_rates(rate_ref, index, ci, shared.rates.at[of.slot], shared.raw_here)

        def clear(side: int, step, _):
            head = at(step).head
            add_counted(out.biases.at[program, head, side], None, simulated)
            for kind in OF_SIDES[side]:
                add_of_ranks(out.mimo.at[program, head, kind], None, simulated)
            return 0

        def run(side: int):
            def ask_state(step):
                source = (ssm_ref, grad_ref)[side]
                index, ci, head, _ = at(step)
                plgpu.copy_gmem_to_smem(source.at[index, ci, head], shared.states.at[side], shared.states_here.at[side])

            ask_state(first)
            lax.fori_loop(first, jnp.minimum(first + heads, end), functools.partial(clear, side), 0)
            if side == QUERIES:
                plgpu.copy_gmem_to_smem(ones_ref, shared.ones, shared.ones_here)
            plgpu.barrier_wait(shared.ones_here)
            later = not_before(ranks, simulated)

            def one(step, carry):
                index, ci, number, of = at(step)
                here, slot = pl.ds(ci * span, span), lax.rem(step, 2)
                value = (out.z, out.x)[side]
                to = Written(
                    None if value is None else value.at[index, here, number], out.biases.at[program, number, side],
                    out.mimo.at[program, number], out.vectors.at[step], out.flows.at[step], out.turned.at[step],
                )  # fmt: skip
                head = head_of(shared, step, of.slot, mimo_ref, number, ranks, simulated)
                for of_side in (QUERIES, KEYS)[: side + 1]:
                    plgpu.barrier_wait(shared.states_here.at[of_side])
                plgpu.barrier_wait(shared.full.at[slot])
                if side == QUERIES:
                    down, through = queries(head, to), None
                else:
                    down, through = keys(head, to)

                def leave():
                    if to.value is not None:
                        plgpu.copy_smem_to_gmem((shared.z, shared.x)[side].at[slot], to.value)
                    pl.when(step + 1 < end)(lambda: ask_state(step + 1))

                total, domega = finish(side, shared, head, to, later, down, through, carry, leave)
                ahead_of = 2 if ranks == 4 else 1  # steps, which wait for this
                pl.when(step + ahead_of < end)(lambda: plgpu.barrier_arrive(shared.empty.at[slot]))

                def write(total, domega):
                    is_whole = step - of.member >= first  # as far as the heads before go
                    place = jnp.where(is_whole, of.number, batch * chunks * groups + program)
                    for half, part in enumerate(split(total, simulated)):
                        out.down[place, side, half] = part
                    out.omega[place, side] = unspread(domega, ranks, simulated)
                    return _no_sums()

                last = (of.member == shares.per_group - 1) | (step == end - 1)
                return lax.cond(last, write, lambda *sums: sums, total, domega)

            lax.fori_loop(first, end, one, _no_sums())
            plgpu.wait_smem_to_gmem(0)

        def ahead():
            asks = Asks(ask_early, ask_values, ask_rows)
            given = weight_ref, mimo_ref, d_ref
            make_rows(shared, first, end, shares.per_group, at, asks, *given, out.vectors, ranks, simulated)

        roles = (*(functools.partial(run, side) for side in SIDES), ahead)
        for role, (registers, work) in enumerate(zip(REGISTERS, roles, strict=True)):

            @pl.when(lax.axis_index("warpgroup") == role)
            def _(role=role, registers=registers, work=work):
                plgpu.set_max_registers(registers, action="decrease" if role == len(SIDES) else "increase")
                work()

    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    programs = shares.programs
    places = batch * chunks * groups + programs
    out = Gradients(
        z=None if z is None else shape(x.shape, x.dtype),
        x=shape(x.shape, x.dtype),
        down=shape((places, 2, 2, HALF_ROWS, N), f32),
        biases=shape((programs, heads, 2, 2, N // 2, RANKS), f32),
        mimo=shape((programs, heads, 3, P, RANKS), f32),
        vectors=shape((batch * chunks * heads, VECTORS, HALF_ROWS), f32),
        flows=shape((batch * chunks * heads, FLOWS, N // 2), f32),
        turned=shape((batch * chunks * heads, S), f32),
        omega=shape((places, 2, span, S), f32),
    )
    arrays = plgpu.kernel(
        mimo_gradients,
        out_type=tuple(out),
        scratch_types=Shared.types(ranks, z is not None),
        grid=(programs,), grid_names=_GRID, num_threads=3, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, in_rows(c, simulated), in_rows(b, simulated), *by_parts(prepared), *weights, d, chunk_ssm, chunk_grad,
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
