"""Hopper kernels of the MIMO forward scan: for two heads, two warpgroups that rotate and one each that multiplies.

Notation as in forward.py, with chunks of 64 rows: all R = 2 or 4 ranks of T = 64 / R positions, ordered as
mimo_pieces.py says; L, s, γ, phase, x, z are of positions. Per chunk and rank r:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r        M, [T, T], is the same for all pairs of ranks
    H ← 2^(L_end) H + Σ_q (2^(L_end - L) s ⊙ X_q)ᵀ B_q            X_q = x ⊙ mimo_x_q

and Σ_r y_r ⊙ silu(z ⊙ mimo_z_r) ⊙ mimo_o_r is what is written. Without gate the chunk's y_r are written as its rows.

y is found transposed, [P, rows]: H and X are then the operands from registers, and only C, B and the weighed products
C Bᵀ are in shared memory; and a thread has all ranks of its positions in two rows of P, so that it reads a few weights
of ranks and sums over ranks by itself. Of the side that rotates, one warpgroup has B of both heads and one C, so that
both heads' rows are found from what was read once (mimo_rotation.py).

Shared memory is used without automatic barriers. Both heads of a program read the same raw B, C and ω. A head has two
slots of rotated B and one of C. What arrives has its own barrier; every thread arrives at the others:
  turned  Cosines and sines of both heads are there, in one of two slots; and ω is used: the next may arrive.
  full    Rotated B and C of a chunk are there, of every other chunk: its products may start.
  empty   The products with a slot of B, or with C, are done: it may change.
The warpgroup that multiplies meets at two points of a chunk:
  B   Every warp has read x, z and the coefficients: the next may arrive. The weighed products are there, and H, if it
      is saved, may leave. y of the chunk before has left.
  C   y is in its place, and H has left. The weighed products may change.
Those that rotate meet once, before `full`:
  D   Every warp has read raw B or C and the coefficients: the next may arrive.
Before `full`, B and C every thread publishes its stores (a fence) to copies and products.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..inputs import Inputs
from .forward import Prepared, by_parts, in_chunks
from .mimo_output import Place, Shared, multiply, rotate_ahead
from .mimo_pieces import ROWS, positions
from .mimo_states import state_pass
from .mimo_turning import get_rows, in_rows
from .mimo_weights import Packed, pack
from .pieces import GRID, PARAMETERS, N, P
from .segment_states import count_forgotten, load_state, no_state, pass_through

SHARES = 8  # of a segment, each of which a program of the state pass has
REGISTERS = 176, 80


def output_pass(
    x: jax.Array, z: jax.Array | None, b: jax.Array, c: jax.Array, prepared: Prepared, weights: Packed,
    d: jax.Array, ssm: jax.Array | None, before: tuple[jax.Array, jax.Array] | None, *,
    segments: int, finer: int = 1, save: bool = False, interpret=None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """y and H after the last token; if asked to save, also H before every chunk, [b, chunks, h, P, N] bfloat16.

    y is [b, l, h, P], without gate the rows [b, h, chunks, ROWS, P] of every chunk; bfloat16.

    Args:
      x: [b, l, h, P] bfloat16, as z; l is a whole number of chunks.
      z: the gate; None = none.
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of 64 / r positions.
      weights: from `mimo_weights.pack`.
      d: [h] float32.
      ssm: H before the first token, [b, h, P, N] float32; None = zeros.
      before: what `state_pass` returns, if there are several segments.
      segments: of the sequence; all but the last have equally many chunks.
      finer: parts of a segment that `state_pass` took apart.
      save: whether to return H before every chunk, as the products read it.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    per_group, chunks = heads // groups, length // positions(ranks)
    together = 2 - per_group % 2
    most = -(-chunks // segments)
    share = -(-most // finer)
    simulated = interpret is not None

    def end_of(part):
        return part // finer * most + jnp.minimum((part % finer + 1) * share, most) - 1

    def body(*refs):
        x_ref, z_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, mimo_ref, d_ref, *refs = refs
        if ssm is not None:
            ssm_ref, *refs = refs
        if segments > 1:
            total_ref, added_ref, decay_ref, *refs = refs
        y_ref, last_ref, *refs = refs
        saved_ref = None
        if save:
            saved_ref, *refs = refs
        shared = Shared(*refs)
        index, segment, program = (lax.axis_index(name) for name in GRID)
        thread = lax.axis_index("warpgroup")
        own = lax.rem(thread, together)
        head = program * together + own
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most
        place = Place(index, head, own, first, count, ranks, simulated)

        def multiplies():
            state = no_state() if ssm is None else load_state(ssm_ref.at[index, head])
            if segments > 1:
                at, number = (index, head), segment * finer
                skipped = count_forgotten(total_ref.at[at], number, (segments - 1) * finer, end_of, simulated)
                state = state * jnp.where(skipped > 0, 0.0, 1.0)
                state = pass_through(state, added_ref.at[at], decay_ref.at[at], number - skipped, lambda k: k + skipped)
            state = multiply(place, shared, state, x_ref, z_ref, coefficient_ref, mimo_ref, d_ref, y_ref, saved_ref)

            @pl.when(segment == segments - 1)
            def _():
                last_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

        def rotates():
            group = head // per_group

            def get_raw(matrix, ci):
                for k, ref in enumerate((b_ref, c_ref)):
                    at = first + ci + index * chunks, group, shared.raw.at[k], shared.raw_here.at[k]
                    pl.when(matrix == k)(lambda ref=ref, at=at: get_rows(ref, *at, ranks, simulated))

            rotate_ahead(place, shared, coefficient_ref, rate_ref, start_ref, weight_ref, get_raw, together)

        for role, (registers, change) in enumerate(zip(REGISTERS, ("increase", "decrease"), strict=True)):

            @pl.when(thread // together == role)
            def _(role=role, registers=registers, change=change):
                if together == 2:
                    plgpu.set_max_registers(registers, action=change)
                (multiplies, rotates)[role]()

    y_shape = (batch, heads, chunks, ROWS, P) if z is None else x.shape
    out = [jax.ShapeDtypeStruct(y_shape, x.dtype), jax.ShapeDtypeStruct((batch, heads, P, N), jnp.float32)]
    if save:
        out.append(jax.ShapeDtypeStruct((batch, chunks, heads, P, N), jnp.bfloat16))
    given = [() if ssm is None else (ssm,), (prepared.totals, *before) if before else ()]
    return plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=Shared.types(ranks, together, gated=z is not None, save=save),
        grid=(batch, segments, heads // together), grid_names=GRID, num_threads=2 * together, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, in_rows(b, simulated), in_rows(c, simulated), *by_parts(prepared), *weights, d,
      *sum(map(tuple, given), ()))  # fmt: skip


class Operands(NamedTuple):
    """What the main kernels read besides; l is a whole number of chunks."""

    x: jax.Array  # [b, l, h, P] bfloat16, as z
    z: jax.Array | None
    b: jax.Array  # [b, l, r, g, N] bfloat16, as c
    c: jax.Array
    weights: Packed
    d: jax.Array  # [h] float32


def operands(inputs: Inputs) -> Operands:
    """With whole chunks. Absent weights become zeros, or ones where they multiply."""
    seq, weights = inputs.seq, inputs.weights
    heads, ranks = seq.x.shape[2], seq.b.shape[2]

    def weight(v: jax.Array | None, missing: float, *shape: int) -> jax.Array:
        return jnp.full((heads, *shape), missing, jnp.float32) if v is None else v.astype(jnp.float32)

    packed = pack(
        *(weight(v, 0.0, ranks, N) for v in (weights.b_bias, weights.c_bias)),
        *(weight(v, 1.0, ranks, P) for v in (weights.mimo_x, weights.mimo_z, weights.mimo_o)),
    )
    return Operands(
        *(in_chunks(v, positions(ranks)) for v in (seq.x, seq.z, seq.b, seq.c)), packed, weight(weights.d, 0.0)
    )


def forward_in_segments(
    inputs: Inputs, prepared: Prepared, segments: int, save: bool = False, interpret=None
) -> tuple[jax.Array, ...]:
    """y [b, l, h, P], without gate in rows, and H after the last token, and with `save` H before every chunk.

    `prepared` is for chunks of 64 / r positions.
    """
    x, z, b, c, packed, d = operands(inputs)
    most = -(-x.shape[1] // positions(b.shape[2]) // segments)
    finer = -(-most // -(-most // SHARES))
    how = {"segments": segments, "finer": finer, "interpret": interpret}
    before = state_pass(x, b, prepared, packed, **how) if segments > 1 else None
    y, *states = output_pass(x, z, b, c, prepared, packed, d, inputs.ssm, before, save=save, **how)
    return y if z is None else y[:, : inputs.seq.x.shape[1]], *states
