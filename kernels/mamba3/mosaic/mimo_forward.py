"""Hopper kernels of the MIMO forward scan: for each of two heads, a warpgroup that rotates and one that multiplies.

Notation as in forward.py, with chunks of T = 32 positions of R = 2 or 4 ranks; L, s, γ, phase, x, z are of positions.
A step is 64 rows, all ranks of its positions: a chunk with 2 ranks, half of one with 4. Rows are ordered as
mimo_pieces.py says, pairs of ranks after one another. Per step and rank r, with L from the beginning of the step:

    y_r = 2^L ⊙ (C_r Hᵀ) + Σ_q (C_r B_qᵀ ⊙ M) X_q + D X_r        M, [T, T] at rank 2, is the same for all pairs of ranks
    H ← 2^(L_end) H + Σ_q (2^(L_end - L) s ⊙ X_q)ᵀ B_q            X_q = x ⊙ mimo_x_q

and Σ_r y_r ⊙ silu(z ⊙ mimo_z_r) ⊙ mimo_o_r is what is written. With 4 ranks two warps have the same positions and half
of the sum over ranks each, which meet in shared memory.

Shared memory is used without automatic barriers. Both heads of a program read the same raw B, C and ω. A head has two
slots of rotated B and of X, and one of C. What arrives has its own barrier; every thread arrives at the others:
  full            Rotated B and C and X of a step are there: its products may start.
  c_empty         The products with C are done: it may change. b_empty: likewise for a slot of B and X.
  b_free, c_free  Both heads have rotated raw B (and used ω), or C: the next may arrive.
The warpgroup that multiplies meets at two points of a step:
  B   Every warp has read z and the coefficients: the next may arrive. Its products with `narrow_h` are done, and H has
      left if it is saved, and y of the step before: they may change. Sums for other warps are there.
  C   The new H is in `narrow_h` and y in its place, and every warp has read the sums of others: they may change.
The one that rotates meets once, before `full`: every warp has read x and the coefficients, so the next may arrive.
Before `full` and C every thread publishes its stores (a fence) to copies and products.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ..inputs import Inputs
from . import mimo_pieces as mimo
from .forward import Prepared, in_chunks
from .mimo_pieces import POS, ROWS, T, blocks, cols, join, load_pair, product, split, store_pair
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
    rows,
    tile,
    widen,
)  # fmt: skip
from .segment_states import added_shapes, load_state, no_state, pass_through, store_added
from .wgmma import begin, settle

LATE = 3  # the first coefficients, of which the products' side needs to know
_RATES = plgpu.SMEM((1, 2, T, S), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(64),))


SHARES = 5  # of a segment, each of which a program of the state pass has
REGISTERS = 168, 88  # of a thread that multiplies, and of one that rotates


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
      prepared: from prepare.py, for chunks of T positions.
      weights: from `mimo_pieces.pack`.
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
    per_group, chunks = heads // groups, length // T
    together = 2 - per_group % 2
    parts = ranks // 2
    short = T // parts
    layout = mimo.positions_layout(ranks)
    most = -(-chunks // segments)
    simulated = interpret is not None

    def body(*refs):
        x_ref, z_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, weight_ref, d_ref, *refs = refs
        if ssm is not None:
            ssm_ref, *refs = refs
        if segments > 1:
            added_ref, decay_ref, *refs = refs
        y_ref, last_ref, *refs = refs
        if save:
            saved_ref, *refs = refs
        (raw_b, raw_c, rates, all_b, all_c, all_h, all_x_rows, all_x, all_z, all_y, all_late, all_early, all_start,
         b_here, c_here, x_here, z_here, late_here, early_here, full, b_empty, c_empty, b_free, c_free,
         *all_sums) = refs  # fmt: skip
        index, segment, program = (lax.axis_index(name) for name in GRID)
        thread = lax.axis_index("warpgroup")
        own = lax.rem(thread, together)
        head = program * together + own
        first = segment * most
        count = jnp.minimum(most, chunks - first) if chunks % segments else most
        steps = count * parts
        group = head // per_group

        def where(step):
            """Of a step: chunk, which part of it, and slot of two."""
            return (step, 0, lax.rem(step, 2)) if parts == 1 else (step // 2, lax.rem(step, 2), lax.rem(step, 2))

        def span(step):
            return pl.ds(first * T + step * short, short)

        def consume():
            def get_late(ci):
                to, here = all_late.at[own, lax.rem(ci, 2)], late_here.at[own, lax.rem(ci, 2)]
                plgpu.copy_gmem_to_smem(coefficient_ref.at[index, head, first + ci, pl.ds(0, LATE)], to, here)

            def get_z(step):
                plgpu.copy_gmem_to_smem(z_ref.at[index, span(step), head], all_z.at[own], z_here.at[own])

            get_late(0)
            get_z(0)
            state = no_state() if ssm is None else load_state(ssm_ref.at[index, head])
            if segments > 1:
                at = (index, head)
                state = pass_through(state, added_ref.at[at], decay_ref.at[at], segment * finer, lambda k: k)
            all_h[own] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            skip = d_ref[head]

            def one_step(step, state):
                ci, part, slot = where(step)
                mine = own + opaque_zero(simulated)
                narrow_h, z_tile, late = all_h.at[mine], all_z.at[mine], all_late.at[mine, lax.rem(ci, 2)]
                c_rows, b_rows, x_rows = all_c.at[mine], all_b.at[mine, slot], all_x_rows.at[mine, slot]
                weight = functools.partial(
                    mimo.load_row_weight, weight_ref.at[head + mine - own], ranks=ranks, simulated=simulated
                )
                pl.when(part == 0)(lambda: plgpu.barrier_wait(late_here.at[own, lax.rem(ci, 2)]))
                plgpu.barrier_wait(full.at[own])
                if save:
                    pl.when(part == 0)(
                        lambda: plgpu.copy_smem_to_gmem(all_h.at[own], saved_ref.at[index, head, first + ci])
                    )
                scores = product(None, c_rows, b_rows, simulated, transposed=True)
                y = product(None, c_rows, narrow_h, simulated, transposed=True)
                here = pl.ds(part * short, short)
                decay = load_rows(late.at[DECAY, here], layout)
                end = late[DECAY, part * short + short - 1]
                past = 0.0 if parts == 1 else jnp.where(part > 0, late[DECAY, short - 1], 0.0)
                mix = _mixing(late, here, decay, simulated, layout)
                row, column = _iotas(mine - own)
                skips = jnp.where(row == column, skip, 0.0)
                from_start = mimo.spread(rows(jnp.exp2(decay - past), P), simulated)
                end_decay = jnp.exp2(end - past)
                to_end = jnp.exp2(end - load_cols(late.at[OTHER, here])).astype(jnp.bfloat16)
                scores = _weigh(settle(scores, 1, simulated), mix, skips, simulated)
                y = split(settle(y, 0, simulated), simulated)
                pl.when(step + 1 < steps)(lambda: plgpu.barrier_arrive(c_empty.at[own]))
                y = product(begin(join(*(v * from_start for v in y), simulated), simulated), scores, x_rows, simulated)
                state = product(begin(state * end_decay, simulated), _to_end(x_rows, to_end), b_rows, simulated)
                plgpu.barrier_wait(z_here.at[own])
                z_rows = mimo.spread(load_tile(z_tile, layout), simulated)
                total = _gate(settle(y, 1, simulated), z_rows, weight, simulated)
                if parts == 2:
                    mimo.send_partial(all_sums[0].at[mine], total, simulated)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # B: this, too, makes the warps meet
                pl.when(step + 1 < steps)(lambda: get_z(step + 1))
                pl.when((part == 0) & (ci + 1 < count))(lambda: get_late(ci + 1))
                if parts == 2:
                    mimo.store_sum(all_y.at[mine], all_sums[0].at[mine], total, simulated)
                else:
                    all_y[mine] = total.astype(jnp.bfloat16)
                state = settle(state, 0, simulated)
                pl.when(step + 2 < steps)(lambda: plgpu.barrier_arrive(b_empty.at[own, slot]))
                all_h[mine] = state.astype(jnp.bfloat16)
                plgpu.commit_smem()  # C
                plgpu.copy_smem_to_gmem(all_y.at[own], y_ref.at[index, span(step), head])
                return state

            state = lax.fori_loop(0, steps, one_step, state)

            @pl.when(segment == segments - 1)
            def _():
                last_ref[index, head] = state

            plgpu.wait_smem_to_gmem(0)

        def produce():
            def get_x(step):
                plgpu.copy_gmem_to_smem(x_ref.at[index, span(step), head], all_x.at[own], x_here.at[own])

            def get_early(ci):
                at, slot = (index, head, first + ci), (own, lax.rem(ci, 2))
                plgpu.copy_gmem_to_smem(coefficient_ref.at[at], all_early.at[slot], early_here.at[slot])
                plgpu.copy_gmem_to_smem(start_ref.at[at], all_start.at[slot], early_here.at[slot])

            def get_b(step):
                ci, _, _ = where(step)
                span = pl.ds((first + ci) * T, T)
                plgpu.copy_gmem_to_smem(rate_ref.at[index, span], rates.at[0].transpose((1, 0, 2)), b_here)
                _get_rows(b_ref, (index * chunks + first) * parts + step, group, raw_b.at[0], b_here, parts, simulated)

            def get_c(step):
                _get_rows(c_ref, (index * chunks + first) * parts + step, group, raw_c.at[0], c_here, parts, simulated)

            get_early(0)
            get_x(0)
            pl.when(count > 1)(lambda: get_early(1))

            @pl.when(own == 0)
            def _():
                get_b(0)
                get_c(0)

            def one_step(step, _):
                ci, part, slot = where(step)
                mine = own + opaque_zero(simulated)
                zero = mine - own
                weight = functools.partial(
                    mimo.load_row_weight, weight_ref.at[head + zero], ranks=ranks, simulated=simulated
                )
                pl.when(part == 0)(lambda: plgpu.barrier_wait(early_here.at[own, lax.rem(ci, 2)]))
                plgpu.barrier_wait(b_here)
                row, column = _iotas(part * short + zero, layout, (short, T))
                early = mine, lax.rem(ci, 2)
                phases = all_early.at[early], all_start.at[early], rates.at[zero]

                def expand():
                    pl.when(step >= 2)(lambda: plgpu.barrier_wait(b_empty.at[own, slot]))
                    plgpu.barrier_wait(x_here.at[own])
                    _expand(all_x.at[mine], all_x_rows.at[mine, slot], weight, layout, simulated)

                cos, sin = _turn(*phases, row, column, simulated, layout, expand)
                _rotate(raw_b.at[zero], all_b.at[mine, slot], mimo.B_BIAS, mimo.B_REST, weight, cos, sin, simulated)
                pl.when(step + 1 < steps)(lambda: plgpu.barrier_arrive(b_free))

                @pl.when((own == 0) & (step + 1 < steps))
                def _():
                    plgpu.barrier_wait(b_free)
                    get_b(step + 1)

                plgpu.barrier_wait(c_here)
                pl.when(step >= 1)(lambda: plgpu.barrier_wait(c_empty.at[own]))
                _rotate(raw_c.at[zero], all_c.at[mine], mimo.C_BIAS, mimo.C_REST, weight, cos, sin, simulated)
                pl.when(step + 1 < steps)(lambda: plgpu.barrier_arrive(c_free))
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[own])

                @pl.when(step + 1 < steps)
                def _():
                    get_x(step + 1)
                    pl.when((part == parts - 1) & (ci + 2 < count))(lambda: get_early(ci + 2))

                @pl.when((own == 0) & (step + 1 < steps))
                def _():
                    plgpu.barrier_wait(c_free)
                    get_c(step + 1)

                return 0

            lax.fori_loop(0, steps, one_step, 0)

        @pl.when(thread < together)
        def _():
            if together == 2:
                plgpu.set_max_registers(REGISTERS[0], action="increase")
            consume()

        @pl.when(thread >= together)
        def _():
            if together == 2:
                plgpu.set_max_registers(REGISTERS[1], action="decrease")
            produce()

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((batch, heads, P, N), jnp.float32)]
    if save:
        out.append(jax.ShapeDtypeStruct((batch, heads, chunks, P, N), jnp.bfloat16))
    given = [() if ssm is None else (ssm,), before or ()]

    def barriers(*number: int, arrivals: int = 1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    return plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            blocks(1), blocks(1), _RATES, blocks(together, 2), blocks(together), tile(together, P, N),
            tile(together, 2, ROWS, P), tile(together, short, P), tile(together, short, P), tile(together, short, P),
            plgpu.SMEM((together, 2, LATE, T), jnp.float32), plgpu.SMEM((together, 2, COEFFICIENTS, T), jnp.float32),
            plgpu.SMEM((together, 2, S), jnp.float32),
            plgpu.Barrier(num_arrivals=parts + 1), plgpu.Barrier(num_arrivals=parts), barriers(together),
            barriers(together), barriers(together, 2), barriers(together, 2, arrivals=2), barriers(together),
            barriers(together, 2), barriers(together), plgpu.Barrier(num_arrivals=together),
            plgpu.Barrier(num_arrivals=together),
            *([plgpu.SMEM((together, short, P), jnp.float32)] if parts == 2 else []),
        ],
        grid=(batch, segments, heads // together), grid_names=GRID, num_threads=2 * together, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, _in_rows(b, simulated), _in_rows(c, simulated), *_by_parts(prepared), weights, d,
      *sum(map(tuple, given), ()))  # fmt: skip


def state_pass(
    x: jax.Array, b: jax.Array, prepared: Prepared, weights: jax.Array, *, segments: int, finer: int = 1, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """Of every `finer` part of each segment but the last: what it adds to H, and its decay (N times the same).

    Shapes [b, h, (segments - 1) finer, P, N] and [.., N]; arguments as in `output_pass`, where no part may be empty.
    Every warpgroup has a head of its own; four in a program are a way to have no more than 128 registers a thread.

    Shared memory is safe by two points where a warpgroup meets: A, where B is rotated in its place, and every warp has
    read x, ω and the coefficients, so that those of the next chunk may arrive; C, where its products with B are done,
    so that the next may arrive.
    """
    batch, length, heads, _ = x.shape
    ranks, groups = b.shape[2:4]
    pairs, per_group, chunks = ranks // 2, heads // groups, length // T
    most = -(-chunks // segments)
    share = -(-most // finer)
    together = math.gcd(heads, 4)
    simulated = interpret is not None

    def body(*refs):
        (x_ref, b_ref, coefficient_ref, rate_ref, start_ref, weight_ref, mimo_x_ref, added_ref, decay_ref,
         all_b, all_x, all_rates, all_here, all_start, early_here, b_here) = refs  # fmt: skip
        index, place, program = (lax.axis_index(name) for name in GRID)
        own = lax.axis_index("warpgroup")
        head = program * together + own
        within = lax.rem(place, finer)
        first = (place // finer) * most + within * share
        count = jnp.minimum(share, most - within * share)

        def get_early(ci):
            sources = coefficient_ref, start_ref, rate_ref, x_ref
            to = tuple(v.at[own] for v in (all_here, all_start, all_rates, all_x))
            _get_early(sources, to, early_here.at[own], index, head, first + ci)

        def get_b(ci):
            for pair in range(pairs):
                _get_pair(
                    b_ref, index * chunks + first + ci, pair, head // per_group, all_b.at[own, pair], b_here.at[own],
                    simulated,
                )  # fmt: skip

        get_early(0)
        get_b(0)
        x_weights = [load_rows(mimo_x_ref.at[head, rank]).astype(jnp.bfloat16) for rank in range(ranks)]

        def chunk(ci, carry):
            state, log_decay = carry
            mine = own + opaque_zero(simulated)
            here, rot = all_here.at[mine], all_b.at[mine]
            load = functools.partial(mimo.load_weight, weight_ref.at[head + mine - own], simulated=simulated)
            plgpu.barrier_wait(early_here.at[own])
            cos, sin = _turn(here, all_start.at[mine], all_rates.at[mine], *_iotas(mine - own), simulated)
            end = here[DECAY, T - 1]
            to_end = lax.broadcast_in_dim(load_cols(here.at[TO_END]).astype(jnp.bfloat16), (P, T), (1,))
            scaled = plgpu.load(all_x.at[mine].transpose((1, 0)), layout=WG) * to_end
            plgpu.barrier_wait(b_here.at[own])
            _rotate_pairs(rot, mimo.B_BIAS, mimo.B_REST, load, cos, sin, simulated)
            plgpu.commit_smem()  # A
            pl.when(ci + 1 < count)(lambda: get_early(ci + 1))
            values = [
                scaled[:, k : k + 8] * rows(x_weights[rank + j], 8)
                for rank in range(0, ranks, 2) for k in range(0, T, 8) for j in range(2)
            ]  # fmt: skip
            state = begin(state * jnp.exp2(end), simulated)
            state = settle(product(state, jnp.concatenate(values, axis=1), rot, simulated), 0, simulated)
            meet(simulated)  # C
            pl.when(ci + 1 < count)(lambda: get_b(ci + 1))
            return state, log_decay + end

        state, log_decay = lax.fori_loop(0, count, chunk, (no_state(), jnp.float32(0.0)))
        at = (index, head, place)
        store_added(added_ref.at[at], decay_ref.at[at], state, log_decay)

    barriers = functools.partial(plgpu.Barrier, num_barriers=together)
    return plgpu.kernel(
        body,
        out_type=added_shapes(batch, heads, (segments - 1) * finer + 1),
        scratch_types=[
            blocks(together, pairs), tile(together, T, P),
            plgpu.SMEM((together, 2, T, S), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(64),)),
            plgpu.SMEM((together, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((together, S), jnp.float32),
            barriers(num_arrivals=4), barriers(num_arrivals=pairs),
        ],
        grid=(batch, (segments - 1) * finer, heads // together), grid_names=GRID, num_threads=together,
        thread_name="warpgroup", interpret=interpret, compiler_params=PARAMETERS,
    )(x, _in_blocks(b, simulated), *_by_parts(prepared), weights, mimo.x_weights(weights))  # fmt: skip


def _iotas(zero: jax.Array, layout=POS, shape=(T, T)) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, int32."""
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + zero
    return row, plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)


def _turn(here, start, rates, row, column, simulated: bool, layout=POS, meanwhile=None) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [T, S] of phases, as `pieces.turn` finds them.

    One product finds both parts: its rows hold the high and the low part of Δ, its depth those of ω. `row` is the
    number of a row's position, `column` that of a position of the chunk, in `layout`. `meanwhile` is called while the
    product runs.
    """
    causal, zero = row >= column, jnp.bfloat16(0)
    steps = [load_cols(here.at[k], layout).astype(jnp.bfloat16) for k in (STEP_HIGH, STEP_LOW)]
    steps = [jnp.where(causal, lax.broadcast_in_dim(v, row.shape, (1,)), zero) for v in steps]
    steps = [mimo.spread(v, simulated) for v in steps]
    steps = join(*(jnp.concatenate([v, v], axis=1) for v in steps), simulated)
    sums = product(None, steps, rates, simulated)
    if meanwhile is not None:
        meanwhile()
    high, low = split(settle(sums, 0, simulated), simulated)
    return cos_sin((high + low) + cols(load_cols(start, POS)), simulated)


def _rotate(raw, out, bias: int, rest_bias: int, weight, cos: jax.Array, sin: jax.Array, simulated: bool) -> None:
    """A pair of ranks of B or C with bias, rotated; `weight`: of one of them and a kind, [T, 64]."""
    turned = []
    for k, v in enumerate(load_pair(raw, 0, simulated)):
        v = widen(v, simulated, POS) + weight(k, bias)
        real, imag = v[:, :S], v[:, S:]
        parts = [real * cos - imag * sin, real * sin + imag * cos]
        turned.append(jnp.concatenate([part.astype(jnp.bfloat16) for part in parts], axis=1))
    store_pair(out, 0, *turned, simulated)
    rest = load_pair(raw, 1, simulated)
    store_pair(out, 1, *(v + weight(k, rest_bias) for k, v in enumerate(rest)), simulated)


def _rotate_pairs(tiles, bias: int, rest_bias: int, load, cos: jax.Array, sin: jax.Array, simulated: bool) -> None:
    """All ranks of B or C of a chunk with bias, rotated in place; `load`: from a rank and a kind, [64]."""
    for pair in range(tiles.shape[0]):

        def weight(k: int, kind: int, pair=pair) -> jax.Array:
            return cols(load(2 * pair + k, kind))

        _rotate(tiles.at[pair], tiles.at[pair], bias, rest_bias, weight, cos, sin, simulated)


def _expand(x_here, x_rows, weight, layout, simulated: bool) -> None:
    """x of every rank."""
    wide = mimo.spread(widen(load_tile(x_here, layout), simulated, layout), simulated)
    x_rows[...] = join(*((wide * weight(k, mimo.MIMO_X)).astype(jnp.bfloat16) for k in range(2)), simulated)


def _to_end(x_rows, to_end: jax.Array) -> jax.Array:
    """(2^(L_end - L) s ⊙ x)ᵀ, [P, rows] bfloat16; to_end: along columns, of a step's positions."""
    short = to_end.shape[0]
    by_column = lax.broadcast_in_dim(to_end, (P, short), (1,))
    by_column = [by_column[:, k : k + 8] for k in _columns(short)]
    return plgpu.load(x_rows.transpose((1, 0)), layout=WG) * jnp.concatenate(by_column, axis=1)


def _columns(short: int) -> list[int]:
    """The first position of every eight rows of a step."""
    return [8 * (k // 2) % short for k in range(8)]


def _mixing(late, here, decay: jax.Array, simulated: bool, layout) -> jax.Array:
    """What multiplies (C_i·B_j) x_j in y_i, [T, short]: 2^(L_i - L_j) s_j below the diagonal, γ_i on it."""
    short = decay.shape[0]
    row, column = _iotas(0, layout, (short, short))
    below, own = (lax.broadcast_in_dim(load_cols(late.at[k, here], layout), (short, short), (1,)) for k in (OTHER, OWN))
    exponent = jnp.where(row > column, rows(decay, short) - below, jnp.where(row == column, own, -jnp.inf))
    return mimo.spread(jnp.exp2(exponent), simulated)


def _weigh(scores: jax.Array, mix: jax.Array, skips: jax.Array, simulated: bool) -> jax.Array:
    """Scores times what they count, plus D where rank and position are the same: bfloat16 [ROWS, ROWS]."""
    both = []
    for half, part in enumerate(split(scores, simulated)):
        out = []
        for k, first in enumerate(_columns(mix.shape[1])):
            v = part[:, 8 * k : 8 * k + 8] * mix[:, first : first + 8]
            own = 8 * (k // 2)
            out.append((v + skips[:, own : own + 8] if k % 2 == half else v).astype(jnp.bfloat16))
        both.append(jnp.concatenate(out, axis=1))
    return join(*both, simulated)


def _gate(y: jax.Array, z: jax.Array, weight, simulated: bool) -> jax.Array:
    """Σ y silu(z) mimo_o over a pair of ranks: [T, P]."""
    z, total = widen(z, simulated, POS), None
    for k, y_rank in enumerate(split(y, simulated)):
        half = z * weight(k, mimo.MIMO_Z)  # of z
        out = y_rank * (half * jnp.tanh(half) + half) * weight(k, mimo.MIMO_O)
        total = out if total is None else total + out
    return total


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
    here, start, rates_here, x_here = to
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


def _in_rows(v: jax.Array, simulated: bool) -> jax.Array:
    """B or C with the axes that copies need apart; the interpreter's copies transpose nothing."""
    batch, length, ranks, groups, _ = v.shape
    v = v.reshape(batch * length // 8, 8, ranks, 2 * groups, 64)
    if simulated:
        parts = ranks // 2
        v = v.reshape(batch * length // T * parts, 4 // parts, 8, parts, 2, groups, 2, 64)
        v = v.transpose(0, 5, 3, 1, 4, 6, 2, 7)
    return v


def _get_rows(ref, step, group, to, barrier, parts: int, simulated: bool) -> None:
    """B or C of a step."""
    eights = 4 // parts
    for pair in range(parts):
        here = to.at[pl.ds(eights * pair, eights)]
        if simulated:
            plgpu.copy_gmem_to_smem(ref.at[step, group, pair], here, barrier)
            continue
        source = ref.at[pl.ds(eights * step, eights), :, pl.ds(2 * pair, 2), pl.ds(2 * group, 2)]
        plgpu.copy_gmem_to_smem(source, here.transpose((0, 3, 1, 2, 4)), barrier)


def _by_parts(prepared: Prepared) -> Prepared:
    """The rates' parts apart: [b, l, 2, S]."""
    rates = prepared.rates
    return prepared._replace(rates=rates.reshape(*rates.shape[:2], 2, S))


class Operands(NamedTuple):
    """What the main kernels read besides; l is a whole number of chunks."""

    x: jax.Array  # [b, l, h, P] bfloat16, as z
    z: jax.Array
    b: jax.Array  # [b, l, r, g, N] bfloat16, as c
    c: jax.Array
    weights: jax.Array  # from `mimo_pieces.pack`
    d: jax.Array  # [h] float32


def operands(inputs: Inputs) -> Operands:
    """With whole chunks of T positions. Absent weights become zeros, or ones where they multiply."""
    seq, weights = inputs.seq, inputs.weights
    heads, ranks = seq.x.shape[2], seq.b.shape[2]

    def weight(v: jax.Array | None, missing: float, *shape: int) -> jax.Array:
        return jnp.full((heads, *shape), missing, jnp.float32) if v is None else v.astype(jnp.float32)

    packed = mimo.pack(
        *(weight(v, 0.0, ranks, N) for v in (weights.b_bias, weights.c_bias)),
        *(weight(v, 1.0, ranks, P) for v in (weights.mimo_x, weights.mimo_z, weights.mimo_o)),
    )
    return Operands(*(in_chunks(v, T) for v in (seq.x, seq.z, seq.b, seq.c)), packed, weight(weights.d, 0.0))


def forward_in_segments(
    inputs: Inputs, prepared: Prepared, segments: int, save: bool = False, interpret=None
) -> tuple[jax.Array, ...]:
    """y [b, l, h, P] and H after the last token, and with `save` H before every chunk.

    `prepared` is for chunks of T positions.
    """
    x, z, b, c, packed, d = operands(inputs)
    most = -(-x.shape[1] // T // segments)
    finer = -(-most // -(-most // SHARES))
    how = {"segments": segments, "finer": finer, "interpret": interpret}
    before = state_pass(x, b, prepared, packed, **how) if segments > 1 else None
    y, *states = output_pass(x, z, b, c, prepared, packed, d, inputs.ssm, before, save=save, **how)
    return y[:, : inputs.seq.x.shape[1]], *states
