"""Hopper kernels of the MIMO forward scan: for each of two heads, a warpgroup that rotates and one that multiplies.

Notation as in forward.py, with chunks of 64 rows: all R = 2 or 4 ranks of T = 64 / R positions, ordered as
mimo_pieces.py says; L, s, γ, phase, x, z are of positions. Per chunk and rank r:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r        M, [T, T], is the same for all pairs of ranks
    H ← 2^(L_end) H + Σ_q (2^(L_end - L) s ⊙ X_q)ᵀ B_q            X_q = x ⊙ mimo_x_q

and Σ_r y_r ⊙ silu(z ⊙ mimo_z_r) ⊙ mimo_o_r is what is written. With 4 ranks two warps have the same positions and half
of the sum over ranks each, which meet in shared memory.

Shared memory is used without automatic barriers. Both heads of a program read the same raw B, C and ω. A head has two
slots of rotated B and of X, and one of C. What arrives has its own barrier; every thread arrives at the others:
  full            Rotated B and C and X of a chunk are there: its products may start.
  c_empty         The products with C are done: it may change. b_empty: likewise for a slot of B and X.
  b_free, c_free  Both heads have rotated raw B (and used ω), or C: the next may arrive.
The warpgroup that multiplies meets at two points of a chunk:
  B   Every warp has read z and the coefficients: the next may arrive. Its products with `narrow_h` are done, and H has
      left if it is saved, and y of the chunk before: they may change. Sums for other warps are there.
  C   The new H is in `narrow_h` and y in its place, and every warp has read the sums of others: they may change.
The one that rotates meets once, before `full`: every warp has read x and the coefficients, so the next may arrive.
Before `full` and C every thread publishes its stores (a fence) to copies and products.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..inputs import Inputs
from . import mimo_weights as of
from .forward import Prepared, in_chunks
from .mimo_pieces import (
    HALF_ROWS,
    POS,
    ROWS,
    blocks,
    column_blocks,
    iotas,
    join,
    positions,
    positions_layout,
    positions_of_columns,
    send_partial,
    split,
    spread,
    store_sum,
)
from .mimo_states import state_pass
from .mimo_turning import by_parts, get_rates, get_rows, in_rows, rates_of_chunk, rotate, turn
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    OTHER,
    OWN,
    PARAMETERS,
    WG,
    N,
    P,
    S,
    cols,
    load_cols,
    load_rows,
    load_tile,
    opaque_zero,
    rows,
    tile,
    widen,
)
from .segment_states import load_state, no_state, pass_through
from .wgmma import begin, product, settle

LATE = 4  # the first coefficients, of which the side of products needs three; copies begin at multiples of 128 bytes
SHARES = 5  # of a segment, each of which a program of the state pass has
REGISTERS = 168, 88  # of a thread that multiplies, and of one that rotates


class Shared(NamedTuple):
    """Shared memory of a program; [heads, slots, ...] but for what both heads read."""

    raw_b: jax.Array
    raw_c: jax.Array
    rates: jax.Array
    b: jax.Array  # rotated
    c: jax.Array  # rotated, no slots
    h: jax.Array  # no slots
    x_rows: jax.Array  # of all ranks
    x: jax.Array  # no slots, as z and y
    z: jax.Array
    y: jax.Array
    late: jax.Array
    early: jax.Array
    start: jax.Array
    b_here: jax.Array  # barriers of what arrives
    c_here: jax.Array
    x_here: jax.Array
    z_here: jax.Array
    late_here: jax.Array
    early_here: jax.Array
    full: jax.Array  # the others, see above
    b_empty: jax.Array
    c_empty: jax.Array
    b_free: jax.Array
    c_free: jax.Array
    sums: jax.Array | None = None  # over one pair of two

    @staticmethod
    def types(ranks: int, together: int) -> "Shared":
        """What to allocate for so many heads."""
        span = positions(ranks)

        def barriers(*number: int, arrivals: int = 1):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        def floats(*shape: int):
            return plgpu.SMEM(shape, jnp.float32)

        return Shared(
            blocks(1), blocks(1), rates_of_chunk(ranks, 1), blocks(together, 2), blocks(together), tile(together, P, N),
            tile(together, 2, ROWS, P), *(tile(together, span, P) for _ in "xzy"),
            floats(together, 2, LATE, span), floats(together, 2, COEFFICIENTS, span), floats(together, 2, S),
            plgpu.Barrier(num_arrivals=ranks // 2 + 1), plgpu.Barrier(num_arrivals=ranks // 2), barriers(together),
            barriers(together), barriers(together, 2), barriers(together, 2, arrivals=2), barriers(together),
            barriers(together, 2), barriers(together), plgpu.Barrier(num_arrivals=together),
            plgpu.Barrier(num_arrivals=together), *([floats(together, span, P)] if ranks == 4 else []),
        )  # fmt: skip


class Place(NamedTuple):
    """What a warpgroup works on."""

    index: jax.Array  # of the batch
    head: jax.Array
    own: jax.Array  # number of the head in its program
    first: jax.Array  # chunk
    count: jax.Array  # of chunks
    ranks: int
    simulated: bool

    def span(self, ci: jax.Array):
        """Positions of a chunk."""
        size = positions(self.ranks)
        return pl.ds((self.first + ci) * size, size)


def output_pass(
    x: jax.Array, z: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared, weights: jax.Array, d: jax.Array,
    ssm: jax.Array | None, before: tuple[jax.Array, jax.Array] | None, *, segments: int, finer: int = 1,
    save: bool = False, interpret=None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """y and H after the last token; if asked to save, also H before every chunk, [b, h, chunks, P, N] bfloat16.

    Args:
      x: [b, l, h, P] bfloat16, as z; l is a whole number of chunks.
      z: the gate.
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
    simulated = interpret is not None

    def body(*refs):
        x_ref, z_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, *refs = refs
        if ssm is not None:
            ssm_ref, *refs = refs
        if segments > 1:
            added_ref, decay_ref, *refs = refs
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
                at = (index, head)
                state = pass_through(state, added_ref.at[at], decay_ref.at[at], segment * finer, lambda k: k)
            state = _multiply(place, shared, state, z_ref, coefficient_ref, weight_ref, d_ref, y_ref, saved_ref)

            @pl.when(segment == segments - 1)
            def _():
                last_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

        def rotates():
            group = head // per_group

            def get_b(ci):
                get_rates(rate_ref, index, first + ci, shared.rates.at[0], shared.b_here)
                here = shared.raw_b.at[0]
                get_rows(b_ref, index * chunks + first + ci, group, here, shared.b_here, ranks, simulated)

            def get_c(ci):
                here = shared.raw_c.at[0]
                get_rows(c_ref, index * chunks + first + ci, group, here, shared.c_here, ranks, simulated)

            _rotate_ahead(place, shared, x_ref, coefficient_ref, start_ref, weight_ref, get_b, get_c, together)

        for role, (registers, change) in enumerate(zip(REGISTERS, ("increase", "decrease"), strict=True)):

            @pl.when(thread // together == role)
            def _(role=role, registers=registers, change=change):
                if together == 2:
                    plgpu.set_max_registers(registers, action=change)
                (multiplies, rotates)[role]()

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((batch, heads, P, N), jnp.float32)]
    if save:
        out.append(jax.ShapeDtypeStruct((batch, heads, chunks, P, N), jnp.bfloat16))
    given = [() if ssm is None else (ssm,), before or ()]
    return plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[v for v in Shared.types(ranks, together) if v is not None],
        grid=(batch, segments, heads // together), grid_names=GRID, num_threads=2 * together, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, in_rows(b, simulated), in_rows(c, simulated), *by_parts(prepared), weights, d,
      *sum(map(tuple, given), ()))  # fmt: skip


def _multiply(
    place: Place, shared: Shared, state: jax.Array, z_ref, coefficient_ref, weight_ref, d_ref, y_ref, saved_ref
) -> jax.Array:
    """The products' side of a head. `state`: H before the first chunk; returns it after the last."""
    index, head, own, first, count, ranks, simulated = place
    span, layout = positions(ranks), positions_layout(ranks)

    def get_late(ci):
        to, here = shared.late.at[own, lax.rem(ci, 2)], shared.late_here.at[own, lax.rem(ci, 2)]
        plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, first + ci, pl.ds(0, LATE)], to, here)

    def get_z(ci):
        plgpu.copy_gmem_to_smem(z_ref.at[index, place.span(ci), head], shared.z.at[own], shared.z_here.at[own])

    get_late(0)
    get_z(0)
    shared.h[own] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()
    skip = d_ref[head]

    def one_chunk(ci, state):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        narrow_h, late = shared.h.at[mine], shared.late.at[mine, slot]
        c_rows, b_rows, x_rows = shared.c.at[mine], shared.b.at[mine, slot], shared.x_rows.at[mine, slot]
        weight = functools.partial(of.load_weight, weight_ref.at[head + mine - own], ranks=ranks, simulated=simulated)
        plgpu.barrier_wait(shared.late_here.at[own, slot])
        plgpu.barrier_wait(shared.full.at[own])
        if saved_ref is not None:
            plgpu.copy_smem_to_gmem(shared.h.at[own], saved_ref.at[index, head, first + ci])
        scores = product(None, c_rows, b_rows, simulated, b_t=True)
        y = product(None, c_rows, narrow_h, simulated, b_t=True)
        decay = load_rows(late.at[DECAY], layout)
        end = late[DECAY, span - 1]
        row, column = iotas(mine - own, ranks)
        mix = _mixing(late, decay, row, column, simulated)
        skips = _skips(skip, mine - own)
        from_start = spread(rows(jnp.exp2(decay), P), simulated)
        to_end = jnp.exp2(end - load_cols(late.at[OTHER])).astype(jnp.bfloat16)
        scores = _weigh(settle(scores, 1, simulated), mix, skips, simulated)
        y = split(settle(y, 0, simulated), simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.c_empty.at[own]))
        y = product(begin(join(*(v * from_start for v in y), simulated), simulated), scores, x_rows, simulated)
        state = product(begin(state * jnp.exp2(end), simulated), _to_end(x_rows, to_end), b_rows, simulated)
        plgpu.barrier_wait(shared.z_here.at[own])
        z_rows = spread(load_tile(shared.z.at[mine], layout), simulated)
        total = _gate(settle(y, 1, simulated), z_rows, weight, simulated)
        if ranks == 4:
            send_partial(shared.sums.at[mine], total, simulated)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # B: this, too, makes the warps meet

        @pl.when(ci + 1 < count)
        def _():
            get_z(ci + 1)
            get_late(ci + 1)

        if ranks == 4:
            store_sum(shared.y.at[mine], shared.sums.at[mine], total, simulated)
        else:
            shared.y[mine] = total.astype(jnp.bfloat16)
        state = settle(state, 0, simulated)
        pl.when(ci + 2 < count)(lambda: plgpu.barrier_arrive(shared.b_empty.at[own, slot]))
        shared.h[mine] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()  # C
        plgpu.copy_smem_to_gmem(shared.y.at[own], y_ref.at[index, place.span(ci), head])
        return state

    return lax.fori_loop(0, count, one_chunk, state)


def _rotate_ahead(
    place: Place, shared: Shared, x_ref, coefficient_ref, start_ref, weight_ref, get_b: Callable, get_c: Callable,
    together: int,
) -> None:  # fmt: skip
    """The side of a head that rotates; that of a program's first asks for B and C, `get_b` and `get_c` of a chunk."""
    index, head, own, first, count, ranks, simulated = place
    layout = positions_layout(ranks)

    def get_x(ci):
        plgpu.copy_gmem_to_smem(x_ref.at[index, place.span(ci), head], shared.x.at[own], shared.x_here.at[own])

    def get_early(ci):
        at, slot = (index, head, first + ci), (own, lax.rem(ci, 2))
        plgpu.copy_gmem_to_smem(coefficient_ref.at[at], shared.early.at[slot], shared.early_here.at[slot])
        plgpu.copy_gmem_to_smem(start_ref.at[at], shared.start.at[slot], shared.early_here.at[slot])

    get_early(0)
    get_x(0)
    pl.when(count > 1)(lambda: get_early(1))

    @pl.when(own == 0)
    def _():
        get_b(0)
        get_c(0)

    def one_chunk(ci, _):
        slot = lax.rem(ci, 2)
        mine = own + opaque_zero(simulated)
        zero = mine - own
        weight = functools.partial(of.load_weight, weight_ref.at[head + zero], ranks=ranks, simulated=simulated)
        plgpu.barrier_wait(shared.early_here.at[own, slot])
        plgpu.barrier_wait(shared.b_here)
        row, column = iotas(zero, ranks)
        phases = shared.early.at[mine, slot], shared.start.at[mine, slot], shared.rates.at[zero]

        def expand():
            pl.when(ci >= 2)(lambda: plgpu.barrier_wait(shared.b_empty.at[own, slot]))
            plgpu.barrier_wait(shared.x_here.at[own])
            _expand(shared.x.at[mine], shared.x_rows.at[mine, slot], weight, layout, simulated)

        cos, sin = turn(*phases, row, column, ranks, simulated, expand)
        rotate(shared.raw_b.at[zero], shared.b.at[mine, slot], of.B_BIAS, of.B_REST, weight, cos, sin, simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.b_free))

        @pl.when((own == 0) & (ci + 1 < count))
        def _():
            plgpu.barrier_wait(shared.b_free)
            get_b(ci + 1)

        plgpu.barrier_wait(shared.c_here)
        pl.when(ci >= 1)(lambda: plgpu.barrier_wait(shared.c_empty.at[own]))
        rotate(shared.raw_c.at[zero], shared.c.at[mine], of.C_BIAS, of.C_REST, weight, cos, sin, simulated)
        pl.when(ci + 1 < count)(lambda: plgpu.barrier_arrive(shared.c_free))
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.full.at[own])

        @pl.when(ci + 1 < count)
        def _():
            get_x(ci + 1)
            pl.when(ci + 2 < count)(lambda: get_early(ci + 2))

        @pl.when((own == 0) & (ci + 1 < count))
        def _():
            plgpu.barrier_wait(shared.c_free)
            get_c(ci + 1)

        return 0

    lax.fori_loop(0, count, one_chunk, 0)


def _expand(x_here, x_rows, weight, layout, simulated: bool) -> None:
    """x of every rank."""
    wide = spread(widen(load_tile(x_here, layout), simulated, layout), simulated)
    x_rows[...] = join(*((wide * weight(k, of.MIMO_X)).astype(jnp.bfloat16) for k in range(2)), simulated)


def _to_end(x_rows, to_end: jax.Array) -> jax.Array:
    """(2^(L_end - L) s ⊙ x)ᵀ, [P, rows] bfloat16; to_end: along columns, of a chunk's positions."""
    span = to_end.shape[0]
    eights = column_blocks(lax.broadcast_in_dim(to_end, (P, span), (1,)))
    by_column = jnp.concatenate([eights[k] for k in positions_of_columns(span)], axis=1)
    return plgpu.load(x_rows.transpose((1, 0)), layout=WG) * by_column


def _mixing(late, decay: jax.Array, row: jax.Array, column: jax.Array, simulated: bool) -> jax.Array:
    """What multiplies (C_i·B_j) x_j in y_i, [32, T]: 2^(L_i - L_j) s_j below the diagonal, γ_i on it."""
    span = decay.shape[0]
    below, own = (cols(load_cols(late.at[k], positions_layout(ROWS // span)), span) for k in (OTHER, OWN))
    exponent = jnp.where(row > column, rows(decay, span) - below, jnp.where(row == column, own, -jnp.inf))
    return spread(jnp.exp2(exponent), simulated)


def _skips(skip: jax.Array, zero: jax.Array) -> jax.Array:
    """[32, 32]: D on the diagonal, which is where rank and position are the same."""
    row = plgpu.broadcasted_iota(jnp.int32, (HALF_ROWS,) * 2, 0, layout=POS) + zero
    column = plgpu.broadcasted_iota(jnp.int32, (HALF_ROWS,) * 2, 1, layout=POS)
    return jnp.where(row == column, skip, 0.0)


def _weigh(scores: jax.Array, mix: jax.Array, skips: jax.Array, simulated: bool) -> jax.Array:
    """Scores times what they count, plus D where rank and position are the same: bfloat16 [ROWS, ROWS]."""
    mixes, skips, both = column_blocks(mix), column_blocks(skips), []
    for rank, part in enumerate(split(scores, simulated)):
        out = []
        for k, (v, at) in enumerate(zip(column_blocks(part), positions_of_columns(mix.shape[1]), strict=True)):
            v = v * mixes[at]
            out.append((v + skips[k // 2] if k % 2 == rank else v).astype(jnp.bfloat16))
        both.append(jnp.concatenate(out, axis=1))
    return join(*both, simulated)


def _gate(y: jax.Array, z: jax.Array, weight, simulated: bool) -> jax.Array:
    """Σ y silu(z) mimo_o over a pair of ranks: [32, P]."""
    z, total = widen(z, simulated, POS), None
    for k, y_rank in enumerate(split(y, simulated)):
        half = z * weight(k, of.MIMO_Z)  # of z
        out = y_rank * (half * jnp.tanh(half) + half) * weight(k, of.MIMO_O)
        total = out if total is None else total + out
    return total


class Operands(NamedTuple):
    """What the main kernels read besides; l is a whole number of chunks."""

    x: jax.Array  # [b, l, h, P] bfloat16, as z
    z: jax.Array
    b: jax.Array  # [b, l, r, g, N] bfloat16, as c
    c: jax.Array
    weights: jax.Array  # from `mimo_weights.pack`
    d: jax.Array  # [h] float32


def operands(inputs: Inputs) -> Operands:
    """With whole chunks. Absent weights become zeros, or ones where they multiply."""
    seq, weights = inputs.seq, inputs.weights
    heads, ranks = seq.x.shape[2], seq.b.shape[2]

    def weight(v: jax.Array | None, missing: float, *shape: int) -> jax.Array:
        return jnp.full((heads, *shape), missing, jnp.float32) if v is None else v.astype(jnp.float32)

    packed = of.pack(
        *(weight(v, 0.0, ranks, N) for v in (weights.b_bias, weights.c_bias)),
        *(weight(v, 1.0, ranks, P) for v in (weights.mimo_x, weights.mimo_z, weights.mimo_o)),
    )
    return Operands(
        *(in_chunks(v, positions(ranks)) for v in (seq.x, seq.z, seq.b, seq.c)), packed, weight(weights.d, 0.0)
    )


def forward_in_segments(
    inputs: Inputs, prepared: Prepared, segments: int, save: bool = False, interpret=None
) -> tuple[jax.Array, ...]:
    """y [b, l, h, P] and H after the last token, and with `save` H before every chunk.

    `prepared` is for chunks of 64 / r positions.
    """
    x, z, b, c, packed, d = operands(inputs)
    most = -(-x.shape[1] // positions(b.shape[2]) // segments)
    finer = -(-most // -(-most // SHARES))
    how = {"segments": segments, "finer": finer, "interpret": interpret}
    before = state_pass(x, b, prepared, packed, **how) if segments > 1 else None
    y, *states = output_pass(x, z, b, c, prepared, packed, d, inputs.ssm, before, save=save, **how)
    return y[:, : inputs.seq.x.shape[1]], *states
