"""Hopper kernels of the SISO forward scan: one warpgroup walks the chunks of one head, two of them share an SM.

Notation: chunks of T positions; L the running sum of Δ A log₂e in a chunk; s_j = γ_j + (1 - λ_{j+1}) Δ_{j+1}; B and C
with bias, rotated to the phase of their position. Per chunk, with H [P, N] in registers (float32):

    y = 2^L ⊙ (C Hᵀ) + (C Bᵀ ⊙ M) X + D X      M_ij = 2^(L_i - L_j) s_j below the diagonal, γ_i on it
    H ← 2^(L_end) H + (2^(L_end - L) s ⊙ X)ᵀ B

and y ⊙ silu(z) is what is written, or y where there is no gate. A sequence may be cut into segments: `state_pass`
(states.py) finds what each adds to H, and `output_pass` begins every segment with the sum of those before.

Products run on by themselves: a chunk issues C Bᵀ and C Hᵀ together, finds M meanwhile, waits for the first alone, and
then issues both products that follow from it.

Shared memory is used without automatic barriers. The warpgroup meets at three points of a chunk:
  A  Rotated B is in `rot`, scaled X in `scaled`, and H in `narrow_h` since the chunk before. Every warp has read the
     raw B, C and ω, and y of the chunk before has left `gate`: the next raw tiles and this chunk's z may arrive (or,
     without gate, y may take its place).
     If H is saved, it has left `narrow_h`.
  B  Every warp's products with `narrow_h` are done: it may change.
  C  Every warp's products with `rot`, `scaled` and X are done: they may change, and X and the coefficients of two
     chunks ahead may arrive, as those of this chunk have been read. The new H is in `narrow_h`, and y in `gate`, where
     each warp writes only rows whose z it alone has read.
Before A and C every thread publishes its stores (a fence) to copies and products. What arrives has its own barrier.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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
    accumulate,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    meet,
    mixing,
    opaque_zero,
    publish,
    rates_tile,
    resting,
    rows,
    tile,
    turn_apart,
    turning,
    widen,
)  # fmt: skip
from .segment_states import count_forgotten, load_state, no_state, pass_through


class Prepared(NamedTuple):
    """What the kernels need of every chunk."""

    coefficients: jax.Array  # [b, h, chunks, COEFFICIENTS, T] float32
    rates: jax.Array  # ω in its high and low parts, [b, l, 2S] bfloat16
    starts: jax.Array  # phase before the chunk, [b, h, chunks, S] float32, radians
    totals: jax.Array  # log2 of the decay from the sequence's start to the chunk's end, [b, h, chunks] float32


class Operands(NamedTuple):
    """What the main kernels read besides; l is a whole number of chunks."""

    x: jax.Array  # [b, l, h, P] bfloat16, as z
    z: jax.Array | None
    b: jax.Array  # [b, l, g, N] bfloat16, as c
    c: jax.Array
    b_bias: jax.Array  # [h, 1, N] float32, as c_bias
    c_bias: jax.Array
    d: jax.Array  # [h] float32


class Shared(NamedTuple):
    """Shared memory of a program."""

    wide: jax.Array  # raw B and C, rotated B, H
    small: jax.Array  # X of two chunks, z and y, scaled X
    rates: jax.Array
    coefficients: jax.Array  # of two chunks, as starts
    starts: jax.Array
    bias_b: jax.Array
    bias_c: jax.Array
    narrow_b: jax.Array  # the biases of what does not turn
    narrow_c: jax.Array
    raw_here: jax.Array  # barriers of what arrives
    x_here: jax.Array
    z_here: jax.Array
    coefficients_here: jax.Array
    bias_here: jax.Array

    @staticmethod
    def types() -> "Shared":
        """What to allocate."""
        return Shared(
            tile(4, T, N), tile(4, T, P), rates_tile(1),
            plgpu.SMEM((2, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((2, S), jnp.float32),
            plgpu.SMEM((1, N), jnp.float32), plgpu.SMEM((1, N), jnp.float32),
            plgpu.SMEM((HALF,), jnp.bfloat16), plgpu.SMEM((HALF,), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_barriers=2), plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=2), plgpu.Barrier(num_arrivals=2),
        )  # fmt: skip


class Copies(NamedTuple):
    """To and from global memory, each called with a chunk of the segment and what its name lacks."""

    save: Callable | None  # H before the chunk, from a place
    get_z: Callable | None
    get_next_raw: Callable
    put_y: Callable  # from a place
    get_later_x: Callable  # that of two chunks ahead, into a slot


def in_chunks(v: jax.Array | None, positions: int = T) -> jax.Array | None:
    """[b, l, ...] with zeros up to a whole number of chunks."""
    if v is None:
        return None
    padding = -v.shape[1] % positions
    return jnp.pad(v, ((0, 0), (0, padding)) + ((0, 0),) * (v.ndim - 2)) if padding else v


def output_pass(
    x: jax.Array, z: jax.Array | None, b: jax.Array, c: jax.Array, prepared: Prepared,
    b_bias: jax.Array, c_bias: jax.Array, d: jax.Array, ssm: jax.Array | None,
    before: tuple[jax.Array, jax.Array] | None,
    *, count: int, pieces: int = 0, last: bool = True, save: bool = False, interpret=None,
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    """y and H after the last token; if asked to save, also H before every chunk, [b, h, chunks, P, N] bfloat16.

    Without `ssm` the first chunk's is 0, and written for the first head only.

    Args:
      x: [b, l, h, P] bfloat16, as z; l is a whole number of chunks.
      z: the gate; None = y as it is.
      b: B, [b, l, g, N] bfloat16.
      c: C likewise.
      prepared: from prepare.py.
      b_bias: [h, 1, N] float32.
      c_bias: likewise.
      d: [h] float32.
      ssm: H before the first token, [b, h, P, N] float32; None = zeros.
      before: what `state_pass` returns, if there are several segments.
      count: chunks of a segment; the last has what is left.
      pieces: into which `state_pass` cuts a segment.
      last: whether to return H after the last token; None instead if not.
      save: whether to return H before every chunk, as the products read it.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    chunks, per_group = length // T, heads // b.shape[2]
    segments = -(-chunks // count)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, b_bias_ref, c_bias_ref, d_ref,
         *refs) = refs  # fmt: skip
        if ssm is not None:
            ssm_ref, *refs = refs
        if segments > 1:
            total_ref, added_ref, decay_ref, *refs = refs
        y_ref, last_ref, *refs = refs
        if save:
            saved_ref, *refs = refs
        shared = Shared(*refs)
        index, segment, head = (lax.axis_index(name) for name in GRID)
        first = segment * count
        mine = jnp.minimum(count, chunks - first) if chunks % count else count

        def span(ci):
            return pl.ds((first + ci) * T, T)

        def get_raw(ci):
            group = head // per_group
            plgpu.copy_gmem_to_smem(b_ref.at[index, span(ci), group], shared.wide.at[0], shared.raw_here)
            plgpu.copy_gmem_to_smem(c_ref.at[index, span(ci), group], shared.wide.at[1], shared.raw_here)
            for part in range(2):
                plgpu.copy_gmem_to_smem(rate_ref.at[index, span(ci), part], shared.rates.at[0, part], shared.raw_here)

        def get_x(ci, slot):
            here = shared.coefficients_here.at[slot]
            plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, first + ci], shared.coefficients.at[slot], here)
            plgpu.copy_gmem_to_smem(start_ref.at[index, head, first + ci], shared.starts.at[slot], here)
            plgpu.copy_gmem_to_smem(x_ref.at[index, span(ci), head], shared.small.at[slot], shared.x_here.at[slot])

        def get_z(ci):
            plgpu.copy_gmem_to_smem(z_ref.at[index, span(ci), head], shared.small.at[2], shared.z_here)

        def save_state(ci, narrow_h):
            is_saved = True if ssm is not None else (first + ci > 0) | (head == 0)
            pl.when(is_saved)(lambda: plgpu.copy_smem_to_gmem(narrow_h, saved_ref.at[index, head, first + ci]))

        copies = Copies(
            save=save_state if save else None,
            get_z=None if z is None else get_z,
            get_next_raw=lambda ci: pl.when(ci + 1 < mine)(lambda: get_raw(ci + 1)),
            put_y=lambda ci, y: plgpu.copy_smem_to_gmem(y, y_ref.at[index, span(ci), head]),
            get_later_x=lambda ci, slot: pl.when(ci + 2 < mine)(lambda: get_x(ci + 2, slot)),
        )
        plgpu.copy_gmem_to_smem(b_bias_ref.at[head], shared.bias_b, shared.bias_here)
        plgpu.copy_gmem_to_smem(c_bias_ref.at[head], shared.bias_c, shared.bias_here)
        get_raw(0)
        get_x(0, 0)
        pl.when(mine > 1)(lambda: get_x(1, 1))

        state = no_state() if ssm is None else load_state(ssm_ref.at[index, head])
        if segments > 1:
            at, number = (index, head), segment * pieces
            skipped = count_forgotten(
                total_ref.at[at], number, (segments - 1) * pieces, lambda k: (k + 1) * (count // pieces) - 1, simulated
            )
            state = state * jnp.where(skipped > 0, 0.0, 1.0)
            state = pass_through(state, added_ref.at[at], decay_ref.at[at], number - skipped, lambda k: k + skipped)
        shared.wide[3] = state.astype(jnp.bfloat16)
        plgpu.barrier_wait(shared.bias_here)
        for bias, narrow in ((shared.bias_b, shared.narrow_b), (shared.bias_c, shared.narrow_c)):
            narrow[...] = load_cols(bias.at[0, pl.ds(HALF, HALF)]).astype(jnp.bfloat16)
        plgpu.commit_smem()
        skip = d_ref[head]

        state = lax.fori_loop(0, mine, functools.partial(_one_chunk, shared, copies, skip, simulated), state)

        if last:

            @pl.when(segment == segments - 1)
            def _():
                last_ref[index, head] = state

        plgpu.wait_smem_to_gmem(0)

    last_type = jax.ShapeDtypeStruct((batch, heads, P, N), jnp.float32) if last else None
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype), last_type]
    if save:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, chunks, P, N), x.dtype))
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=Shared.types(),
        grid=(batch, segments, heads), grid_names=GRID, num_threads=1, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, b, c, *by_parts(prepared), b_bias, c_bias, d,
      *(() if ssm is None else (ssm,)), *((prepared.totals, *before) if before else ()))  # fmt: skip


def _one_chunk(
    shared: Shared, copies: Copies, skip: jax.Array, simulated: bool, ci: jax.Array, state: jax.Array
) -> jax.Array:
    """y of a segment's chunk, and H after it."""
    slot = lax.rem(ci, 2)
    # Addresses of products must not look constant: the compiler would find all before the loop and keep them
    # in registers, of which there are too few.
    zero = opaque_zero(simulated)
    rot, narrow_h = shared.wide.at[2 + zero], shared.wide.at[3 + zero]
    scaled, gate = shared.small.at[3 + zero], shared.small.at[2 + zero]
    if copies.save is not None:
        copies.save(ci, narrow_h)
    raw_b, raw_c = shared.wide.at[0], shared.wide.at[1]
    here, x_tile = shared.coefficients.at[slot], shared.small.at[slot]
    row, column = iotas()
    plgpu.barrier_wait(shared.coefficients_here.at[slot])
    plgpu.barrier_wait(shared.raw_here)
    plgpu.barrier_wait(shared.x_here.at[slot])

    def without_phases():
        to_end = load_rows(here.at[TO_END]).astype(jnp.bfloat16)
        scaled[...] = load_tile(x_tile) * rows(to_end, P)
        rot[:, pl.ds(HALF, HALF)] = resting(raw_b, shared.narrow_b)
        return resting(raw_c, shared.narrow_c)

    cos, sin, c_rest = turn_apart(
        here, shared.starts.at[slot], shared.rates.at[zero], row, column, without_phases, simulated
    )
    rot[:, pl.ds(0, HALF)] = turning(raw_b, shared.bias_b, cos, sin, simulated)
    c_turned = turning(raw_c, shared.bias_c, cos, sin, simulated)
    publish(simulated)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # A: this, too, makes the warps meet
    if copies.get_z is not None:
        copies.get_z(ci)
    copies.get_next_raw(ci)

    def products(scores, from_state, from_chunk):
        plgpu.wgmma(scores, c_turned, rot.at[:, pl.ds(0, HALF)].transpose((1, 0)))
        plgpu.wgmma(scores, c_rest, rot.at[:, pl.ds(HALF, HALF)].transpose((1, 0)))
        plgpu.wgmma(from_state, c_turned, narrow_h.at[:, pl.ds(0, HALF)].transpose((1, 0)))
        plgpu.wgmma(from_state, c_rest, narrow_h.at[:, pl.ds(HALF, HALF)].transpose((1, 0)))
        decay = load_rows(here.at[DECAY])
        mix = mixing(here, row, column, decay, simulated)
        weights = (plgpu.wgmma_accumulator_load(scores, wait_n=2) * mix).astype(jnp.bfloat16)
        end_decay = jnp.exp2(here[DECAY, T - 1])

        def rest(accs, read):
            plgpu.wgmma(from_chunk, weights, x_tile)
            plgpu.wgmma(accs[0], scaled.transpose((1, 0)), rot)
            skipped = skip * widen(load_tile(x_tile), simulated)
            y = plgpu.wgmma_accumulator_load(from_chunk, wait_n=1) + skipped
            y = y + plgpu.wgmma_accumulator_load(from_state, wait_n=1) * rows(jnp.exp2(decay), P)
            meet(simulated)  # B
            if copies.get_z is not None:
                plgpu.barrier_wait(shared.z_here)
                half = widen(load_tile(gate) * jnp.bfloat16(0.5), simulated)
                y = y * (half * jnp.tanh(half) + half)  # y silu(z)
            gate[...] = y.astype(jnp.bfloat16)

        (new_state,) = accumulate(rest, (state * end_decay,), simulated)
        return new_state

    acc = plgpu.ACC((T, P), jnp.float32)
    state = pl.run_scoped(products, plgpu.ACC((T, T), jnp.float32), acc, acc)
    narrow_h[...] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()  # C
    copies.put_y(ci, gate)
    copies.get_later_x(ci, slot)
    return state


def by_parts(prepared: Prepared) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What belongs to a chunk alone, the rates' parts apart: [b, l, 2, S]."""
    coefficients, rates, starts, _ = prepared
    return coefficients, rates.reshape(*rates.shape[:2], 2, S), starts
