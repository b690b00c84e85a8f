"""Hopper kernels of the MIMO forward scan: one warpgroup walks the chunks of one head, two of them share an SM.

Notation as in forward.py, with chunks of T = 32 positions of R = 2 or 4 ranks; L, s, γ, phase, x, z are of positions.
Rows are ordered as mimo_pieces.py says, two ranks of every position to a tile of 64. Per chunk and rank r:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r        M, [T, T], is the same for all pairs of ranks
    H ← 2^(L_end) H + Σ_q (2^(L_end - L) s ⊙ X_q)ᵀ B_q            X_q = x ⊙ mimo_x_q

and Σ_r y_r ⊙ silu(z ⊙ mimo_z_r) ⊙ mimo_o_r is what is written. Why 32 positions: 16 (64 rows) would halve the scores
above the diagonal, but find every phase in two warps, carry the sum over ranks through shared memory, and scale, round
and store H and meet twice as often. Estimated per 64 rows, before any was written: 1,140 instructions of a warp and 896
cycles of the matrix units; with 32 positions 1,010 and 1,280.

Shared memory is used without automatic barriers. The warpgroup meets at four points of a chunk:
  A   Rotated B, and C of the first pair of ranks, are in the place of the raw ones; H is in `narrow_h` since the chunk
      before, whose y has left `gate`. Products may start, and this chunk's z may arrive.
  A2  The rest of C is rotated, and X of every rank in `x_rows`. Every warp has read x, ω and the coefficients: those of
      the next chunk may arrive.
  B   Every warp's products with C and `narrow_h` are done: they may change, and the next C may arrive.
  C   Every warp's products with B and `x_rows` are done: they may change, and the next B may arrive. The new H is in
      `narrow_h`, and y in `gate`, where each warp writes only rows whose z it alone has read.
Before A, A2 and C every thread publishes its stores (a fence) to copies and products. What arrives has its own barrier.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..inputs import Inputs
from . import mimo_pieces as mimo
from .forward import Prepared, in_chunks
from .mimo_pieces import POS, ROWS, T, blocks, cols, join, load_pair, product, settle, split, store_pair
from .pieces import (
    COEFFICIENTS,
    DECAY,
    GRID,
    OTHER,
    OWN,
    PARAMETERS,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    WG,
    N,
    P,
    S,
    cos_sin,
    load_cols,
    load_rows,
    load_tile,
    meet,
    opaque_zero,
    publish,
    rows,
    tile,
    widen,
)  # fmt: skip
from .segment_states import added_shapes, load_state, no_state, pass_through, store_added

_RATES = plgpu.SMEM((1, 2, T, S), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(64),))


def output_pass(
    x: jax.Array, z: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared, weights: jax.Array, d: jax.Array,
    ssm: jax.Array, before: tuple[jax.Array, jax.Array] | None, *, segments: int, interpret=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """y and H after the last token.

    Args:
      x: [b, l, h, P] bfloat16, as z; l is a whole number of chunks.
      z: the gate.
      b: B, [b, l, r, g, N] bfloat16, r 2 or 4.
      c: C likewise.
      prepared: from prepare.py, for chunks of T positions.
      weights: from `mimo_pieces.pack`.
      d: [h] float32.
      ssm: H before the first token, [b, h, P, N] float32.
      before: what `state_pass` returns, if there are several segments.
      segments: of the sequence; all but the last have equally many chunks.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    pairs, per_group, chunks = ranks // 2, heads // groups, length // T
    most = -(-chunks // segments)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, ssm_ref,
         *refs) = refs  # fmt: skip
        if segments > 1:
            added_ref, decay_ref, *refs = refs
        (y_ref, last_ref, all_b, all_c, all_h, all_x_rows, all_x, all_gate, all_rates, all_here, all_start,
         early_here, b_here, c_here, z_here) = refs  # fmt: skip
        index, segment, head = (lax.axis_index(name) for name in GRID)
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most

        def get_early(ci):
            sources = coefficient_ref, start_ref, rate_ref, x_ref
            _get_early(sources, (all_here, all_start, all_rates, all_x), early_here, index, head, first + ci)

        def get_pairs(ref, to, barrier, ci):
            for pair in range(pairs):
                _get_pair(ref, index * chunks + first + ci, pair, head // per_group, to.at[0, pair], barrier, simulated)

        get_early(0)
        get_pairs(c_ref, all_c, c_here, 0)
        get_pairs(b_ref, all_b, b_here, 0)
        state = load_state(ssm_ref.at[index, head])
        if segments > 1:
            at = (index, head)
            state = pass_through(state, added_ref.at[at], decay_ref.at[at], segment, lambda k: k)
        all_h[0] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        skip = d_ref[head]

        def chunk(ci, state):
            # Addresses must not look constant: the compiler would find all before the loop and keep them in registers,
            # of which there are too few. Those of products are put together in assembly.
            zero = opaque_zero(simulated)
            rot, c_rows, narrow_h, x_rows, x_here, gate, here, start = (
                v.at[zero] for v in (all_b, all_c, all_h, all_x_rows, all_x, all_gate, all_here, all_start)
            )
            weight = functools.partial(mimo.load_weight, weight_ref.at[head + zero], simulated=simulated)
            row, column = _iotas(zero)
            plgpu.barrier_wait(early_here)
            cos, sin = _turn(here, start, all_rates.at[0], row, column, simulated)
            plgpu.barrier_wait(c_here)
            _rotate(c_rows, 0, mimo.C_BIAS, mimo.C_REST, weight, cos, sin, simulated)
            plgpu.barrier_wait(b_here)
            for pair in range(pairs):
                _rotate(rot, pair, mimo.B_BIAS, mimo.B_REST, weight, cos, sin, simulated)
            publish(simulated)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # A: this, too, makes the warps meet
            plgpu.copy_gmem_to_smem(z_ref.at[index, pl.ds((first + ci) * T, T), head], all_gate.at[0], z_here)

            def from_state(pair):
                return product(None, all_c.at[0, pair], all_h.at[0], simulated, transposed=True)

            def score(pair, other):
                return product(None, all_c.at[0, pair], all_b.at[0, other], simulated, transposed=True)

            total = None
            y, scores = from_state(0), score(0, 0)
            for pair in range(1, pairs):
                _rotate(c_rows, pair, mimo.C_BIAS, mimo.C_REST, weight, cos, sin, simulated)
            _expand(x_here, x_rows, weight, simulated)
            decay = load_rows(here.at[DECAY], POS)
            mix, skips = _mixing(here, decay, skip, row, column)
            from_start = rows(jnp.exp2(decay), P)
            end_decay = jnp.exp2(here[DECAY, T - 1])
            to_end = load_cols(here.at[TO_END]).astype(jnp.bfloat16)
            plgpu.commit_smem()  # A2
            pl.when(ci + 1 < count)(lambda: get_early(ci + 1))
            for pair in range(pairs):
                if pair:
                    previous, y, scores = y, from_state(pair), score(pair, 0)
                    if pair == 1:
                        plgpu.barrier_wait(z_here)
                    total = _gate_into(total, pair - 1, settle(previous, 2, simulated), gate, weight, simulated)
                for other in range(pairs):
                    following = score(pair, other + 1) if other + 1 < pairs else None
                    if other == 0:
                        y = split(settle(y, 2 if following is not None else 1, simulated), simulated)
                        y = mimo.begin(join(*(v * from_start for v in y), simulated), simulated)
                    weights = settle(scores, 1 if following is not None else int(other > 0), simulated)
                    weights = _weigh(weights, pair == other, mix, skips, simulated)
                    y = product(y, weights, all_x_rows.at[0, pl.ds(ROWS * other, ROWS)], simulated)
                    scores = following
            state = product(mimo.begin(state * end_decay, simulated), _to_end(x_rows, to_end), all_b.at[0], simulated)
            if pairs == 1:
                plgpu.barrier_wait(z_here)
            total = _gate_into(total, pairs - 1, settle(y, 1, simulated), gate, weight, simulated)
            meet(simulated)  # B
            pl.when(ci + 1 < count)(lambda: get_pairs(c_ref, all_c, c_here, ci + 1))
            gate[...] = total.astype(jnp.bfloat16)
            state = settle(state, 0, simulated)
            narrow_h[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()  # C
            plgpu.copy_smem_to_gmem(all_gate.at[0], y_ref.at[index, pl.ds((first + ci) * T, T), head])
            pl.when(ci + 1 < count)(lambda: get_pairs(b_ref, all_b, b_here, ci + 1))
            return state

        state = lax.fori_loop(0, count, chunk, state)

        @pl.when(segment == segments - 1)
        def _():
            last_ref[index, head] = state

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(ssm.shape, ssm.dtype)),
        scratch_types=[
            blocks(1, pairs), blocks(1, pairs), tile(1, P, N), tile(1, ranks * T, P), tile(1, T, P), tile(1, T, P),
            _RATES, plgpu.SMEM((1, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((1, S), jnp.float32),
            plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=pairs), plgpu.Barrier(num_arrivals=pairs),
            plgpu.Barrier(),
        ],
        grid=(batch, segments, heads), grid_names=GRID, num_threads=1, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, _in_blocks(b, simulated), _in_blocks(c, simulated), *_by_parts(prepared), weights, d, ssm,
      *(before or ()))  # fmt: skip


def state_pass(
    x: jax.Array, b: jax.Array, prepared: Prepared, weights: jax.Array, *, segments: int, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """Of each segment but the last: what it adds to H, [b, h, segments - 1, P, N], and its decay (N times the same).

    Arguments as in `output_pass`. B has two slots and arrives a chunk ahead. Shared memory is safe by point A, which
    A2 has joined here, and point C.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    pairs, per_group, chunks = ranks // 2, heads // groups, length // T
    count = -(-chunks // segments)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, added_ref, decay_ref, both_b, all_x_rows,
         all_x, all_rates, all_here, all_start, early_here, b_here) = refs  # fmt: skip
        index, segment, head = (lax.axis_index(name) for name in GRID)
        first = segment * count

        def get_early(ci):
            sources = coefficient_ref, start_ref, rate_ref, x_ref
            _get_early(sources, (all_here, all_start, all_rates, all_x), early_here, index, head, first + ci)

        def get_b(ci, slot):
            for pair in range(pairs):
                to, here = both_b.at[slot, pair], b_here.at[slot]
                _get_pair(b_ref, index * chunks + first + ci, pair, head // per_group, to, here, simulated)

        get_early(0)
        get_b(0, 0)
        if count > 1:
            get_b(1, 1)

        def chunk(ci, carry):
            state, log_decay = carry
            slot = lax.rem(ci, 2)
            zero = opaque_zero(simulated)
            x_rows, x_here, here, start = (v.at[zero] for v in (all_x_rows, all_x, all_here, all_start))
            weight = functools.partial(mimo.load_weight, weight_ref.at[head + zero], simulated=simulated)
            plgpu.barrier_wait(early_here)
            cos, sin = _turn(here, start, all_rates.at[0], *_iotas(zero), simulated)
            end = here[DECAY, T - 1]
            to_end = load_cols(here.at[TO_END]).astype(jnp.bfloat16)
            _expand(x_here, x_rows, weight, simulated)
            plgpu.barrier_wait(b_here.at[slot])
            for pair in range(pairs):
                _rotate(both_b.at[slot], pair, mimo.B_BIAS, mimo.B_REST, weight, cos, sin, simulated)
            plgpu.commit_smem()  # A
            pl.when(ci + 1 < count)(lambda: get_early(ci + 1))
            state = mimo.begin(state * jnp.exp2(end), simulated)
            state = settle(product(state, _to_end(x_rows, to_end), both_b.at[slot], simulated), 0, simulated)
            plgpu.commit_smem()  # C
            pl.when(ci + 2 < count)(lambda: get_b(ci + 2, slot))
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (no_state(), jnp.float32(0.0)))
        at = (index, head, segment)
        store_added(added_ref.at[at], decay_ref.at[at], state, log_decay)

    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, segments),
        scratch_types=[
            blocks(2, pairs), tile(1, ranks * T, P), tile(1, T, P), _RATES,
            plgpu.SMEM((1, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((1, S), jnp.float32),
            plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=pairs, num_barriers=2),
        ],
        grid=(batch, segments - 1, heads), grid_names=GRID, num_threads=1, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, _in_blocks(b, simulated), *_by_parts(prepared), weights)  # fmt: skip


def _iotas(zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, int32 [T, T]."""
    row = plgpu.broadcasted_iota(jnp.int32, (T, T), 0, layout=POS) + zero
    return row, plgpu.broadcasted_iota(jnp.int32, (T, T), 1, layout=POS)


def _turn(here, start, rates, row: jax.Array, column: jax.Array, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [T, S] of the phases, as `pieces.turn` finds them.

    One product finds both parts: its rows hold the high and the low part of Δ, its depth those of ω.
    """
    causal, zero = row >= column, jnp.bfloat16(0)
    steps = [cols(load_cols(here.at[k], POS).astype(jnp.bfloat16)) for k in (STEP_HIGH, STEP_LOW)]
    steps = [jnp.where(causal, v, zero) for v in steps]
    steps = join(*(jnp.concatenate([v, v], axis=1) for v in steps), simulated)
    high, low = split(settle(product(None, steps, rates, simulated), 0, simulated), simulated)
    return cos_sin((high + low) + cols(load_cols(start, POS)), simulated)


def _rotate(raw, pair: int, bias: int, rest_bias: int, weight, cos: jax.Array, sin: jax.Array, simulated: bool) -> None:
    """A pair of ranks of B or C with bias, rotated, in place."""
    raw, both, turned = raw.at[pair], (2 * pair, 2 * pair + 1), []
    for rank, v in zip(both, load_pair(raw, 0, simulated), strict=True):
        v = widen(v, simulated, POS) + cols(weight(rank, bias))
        real, imag = v[:, :S], v[:, S:]
        parts = [real * cos - imag * sin, real * sin + imag * cos]
        turned.append(jnp.concatenate([part.astype(jnp.bfloat16) for part in parts], axis=1))
    store_pair(raw, 0, *turned, simulated)
    rest = zip(both, load_pair(raw, 1, simulated), strict=True)
    store_pair(raw, 1, *(v + cols(weight(rank, rest_bias)) for rank, v in rest), simulated)


def _expand(x_here, x_rows, weight, simulated: bool) -> None:
    """x of every rank."""
    wide = widen(load_tile(x_here, POS), simulated, POS)
    for pair in range(x_rows.shape[0] // ROWS):
        both = [(wide * cols(weight(2 * pair + k, mimo.MIMO_X))).astype(jnp.bfloat16) for k in range(2)]
        x_rows[pl.ds(ROWS * pair, ROWS)] = join(*both, simulated)


def _to_end(x_rows, to_end: jax.Array) -> jax.Array:
    """(2^(L_end - L) s ⊙ x)ᵀ, [P, rows] bfloat16; to_end: [T] along columns."""
    by_column = lax.broadcast_in_dim(to_end, (P, T), (1,))
    by_column = [by_column[:, 8 * (k // 2) : 8 * (k // 2) + 8] for k in range(8)] * (x_rows.shape[0] // ROWS)
    return plgpu.load(x_rows.transpose((1, 0)), layout=WG) * jnp.concatenate(by_column, axis=1)


def _mixing(here, decay: jax.Array, skip: jax.Array, row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What multiplies (C_i·B_j) x_j in y_i, [T, T]: 2^(L_i - L_j) s_j below the diagonal, γ_i on it; and D on it."""
    below = rows(decay, T) - cols(load_cols(here.at[OTHER], POS))
    own = cols(load_cols(here.at[OWN], POS))
    exponent = jnp.where(row > column, below, jnp.where(row == column, own, -jnp.inf))
    return jnp.exp2(exponent), jnp.where(row == column, skip, 0.0)


def _weigh(scores: jax.Array, own: bool, mix: jax.Array, skips: jax.Array, simulated: bool) -> jax.Array:
    """Scores of two pairs of ranks times what they count, plus D if both are `own`: bfloat16 [ROWS, ROWS]."""
    both = []
    for half, part in enumerate(split(scores, simulated)):
        out = []
        for k in range(8):
            positions = slice(8 * (k // 2), 8 * (k // 2) + 8)
            v = part[:, 8 * k : 8 * k + 8] * mix[:, positions]
            out.append((v + skips[:, positions] if own and k % 2 == half else v).astype(jnp.bfloat16))
        both.append(jnp.concatenate(out, axis=1))
    return join(*both, simulated)


def _gate_into(total: jax.Array | None, pair: int, y: jax.Array, gate, weight, simulated: bool) -> jax.Array:
    """Adds Σ y silu(z) mimo_o over a pair of ranks: [T, P]."""
    z = widen(load_tile(gate, POS), simulated, POS)
    for rank, y_rank in zip((2 * pair, 2 * pair + 1), split(y, simulated), strict=True):
        half = z * cols(weight(rank, mimo.MIMO_Z))  # of z
        out = y_rank * (half * jnp.tanh(half) + half) * cols(weight(rank, mimo.MIMO_O))
        total = out if total is None else total + out
    return total


def _by_parts(prepared: Prepared) -> Prepared:
    """The rates' parts apart: [b, l, 2, S]."""
    rates = prepared.rates
    return prepared._replace(rates=rates.reshape(*rates.shape[:2], 2, S))


def _in_blocks(v: jax.Array, simulated: bool) -> jax.Array:
    """B or C with the axes that copies need apart; the interpreter's copies transpose nothing."""
    batch, length, ranks, groups, _ = v.shape
    v = v.reshape(batch * length // 8, 8, ranks, 2 * groups, 64)
    if simulated:
        v = v.reshape(batch * length // T, 4, 8, ranks // 2, 2, groups, 2, 64)
        v = v.transpose(0, 3, 5, 1, 4, 6, 2, 7)
    return v


def _get_early(sources, to, barrier, index, head, chunk) -> None:
    """Coefficients, phases at the start, ω and x of a chunk."""
    (coefficients, starts, rates, x), at, span = sources, (index, head, chunk), pl.ds(chunk * T, T)
    here, start, rates_here, x_here = (v.at[0] for v in to)
    plgpu.copy_gmem_to_smem(coefficients.at[at], here, barrier)
    plgpu.copy_gmem_to_smem(starts.at[at], start, barrier)
    plgpu.copy_gmem_to_smem(rates.at[index, span], rates_here.transpose((1, 0, 2)), barrier)
    plgpu.copy_gmem_to_smem(x.at[index, span, head], x_here, barrier)


def _get_pair(ref, chunk, pair: int, group, to, barrier, simulated: bool) -> None:
    if simulated:
        plgpu.copy_gmem_to_smem(ref.at[chunk, pair, group], to, barrier)
        return
    source = ref.at[pl.ds(4 * chunk, 4), :, pl.ds(2 * pair, 2), pl.ds(2 * group, 2)]
    plgpu.copy_gmem_to_smem(source, to.transpose((0, 3, 1, 2, 4)), barrier)


def forward_in_segments(
    inputs: Inputs, prepared: Prepared, segments: int, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """y [b, l, h, P] and H after the last token. `prepared` is for chunks of T positions.

    Absent weights become zeros, or ones where they multiply.
    """
    seq, weights = inputs.seq, inputs.weights
    length, heads, ranks = *seq.x.shape[1:3], seq.b.shape[2]

    def weight(v: jax.Array | None, missing: float, *shape: int) -> jax.Array:
        return jnp.full((heads, *shape), missing, jnp.float32) if v is None else v.astype(jnp.float32)

    packed = mimo.pack(
        *(weight(v, 0.0, ranks, N) for v in (weights.b_bias, weights.c_bias)),
        *(weight(v, 1.0, ranks, P) for v in (weights.mimo_x, weights.mimo_z, weights.mimo_o)),
    )
    x, z, b, c = (in_chunks(v, T) for v in (seq.x, seq.z, seq.b, seq.c))
    how = {"segments": segments, "interpret": interpret}
    before = state_pass(x, b, prepared, packed, **how) if segments > 1 else None
    y, ssm = output_pass(x, z, b, c, prepared, packed, weight(weights.d, 0.0), inputs.ssm, before, **how)
    return y[:, :length], ssm
