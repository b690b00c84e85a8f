"""Hopper kernel of the SISO backward scan's gradients: chunks in parallel, two warpgroups to a program.

Notation as in forward.py; H enters the chunk, G is the gradient of H after it, H' what enters the next one. A program
has one chunk and walks a block of heads. Per head, with g = dy ⊙ silu(z) (without gate, dy itself), M without its
diagonal (0 there) and w_j = 2^(L_end - L_j) s_j:

    weights = C Bᵀ ⊙ M             y = 2^L ⊙ (C Hᵀ) + weights X + κ ⊙ X       κ_i = D + γ_i C_i·B_i
    dS = g Xᵀ ⊙ (M + diag(γ))      dX = w ⊙ (B Gᵀ) + weightsᵀ g + κ ⊙ g
    dC = dS B + (2^L ⊙ g) H        dB = dSᵀ C + (w ⊙ X) G                     both still rotated
    dφ = <dC, J C> + <dB, J B>     of every pair and position, at the B and C that the products read

Turned back, dB and dC are added up over the heads of the block, as are dω's parts. What of them does not turn is added
up by the products, and gradients of biases are written as sums over positions of all heads so far. A step of a phase
turns all that comes later: in the chunk dφ, beyond it H', from which its gradient takes <G, J H'> (cotangents.py).

The warpgroup SCORES rotates B and C, finds weights and dS, and has dC and the sums of dφ. The warpgroup VALUES has g,
y, dz, dX and dB, and, while it waits for weights, <H', G>. They share memory without automatic barriers, and wait for
one another at:
  free    Both are done with the head before, whose dφ is in `weights`: SCORES writes rotated B and C, cos and sin.
  ready   They are written (SCORES), so are g, in place of dy, and dy silu'(z), in place of z (VALUES).
  mixed   Weights, dS and C_i·B_i are written. SCORES has read g, X and the coefficients.
  scored  SCORES is done with H and rotated B, and has written its part of dφ.
  flowed  VALUES is done with H', and has written <G, J H'>.
Before one of these every thread publishes (a fence) what copies or products are to read. Within a warpgroup a thread
overwrites at once what it alone has read, and after the warpgroup has met what its products have read.

What arrives from global memory has its own barrier. All is asked for a head ahead, as soon as its place is free: x, z,
dy and coefficients of two heads (VALUES, after `ready`) and G of two heads have places of their own; H' is asked for
with G once its place, in which SCORES adds up columns after `flowed`, is free; H once both are done with the one before
(VALUES, after `scored`). The three arrive at one barrier: its next phase cannot end before both have seen this one, as
H comes after VALUES has.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared
from .pieces import (
    COEFFICIENTS,
    DECAY,
    HALF,
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
    T,
    cols,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    meet,
    pick,
    publish,
    rows,
    stash,
    tile,
    turning,
    unstash,
    widen,
)  # fmt: skip
from .products import column_sums, stash_turns, turn_by_hand, unstash_turns
from .triangles import anticausal_ones, selectors, triangle
from .wgmma import begin, product, settle

_GRID = ("batch", "block", "chunk")
_SCORES, _VALUES = range(2)
_PART = 16  # columns
# Rows of what is written per position and head, float32 [T] each: g·x; C·B; <H', G> by coordinate; what L_i scales as a
# query and as a key; the phases' part of Δ's gradient.
VECTORS = 6
OVERLAP, SCORE, FLOW, QUERY, KEY, TURN = range(VECTORS)
_OWN_SCORES, _TURNED_FLOW = 2, 3  # rows of shared memory after the two of phases; of the latter there are two


class Gradients(NamedTuple):
    """What the kernel writes."""

    x: jax.Array  # [b, l, h, P] bfloat16
    z: jax.Array | None  # likewise
    b: jax.Array  # [blocks, b, l, N] float32; bfloat16 if a block is all heads of its group
    c: jax.Array  # likewise
    biases: jax.Array  # of B and C, [b, chunks, h, 2, N] float32: sums over the heads of a block up to this one
    vectors: jax.Array  # [b, h, chunks, VECTORS, T] float32
    omega: jax.Array  # [blocks, b, l, S] float32


def gradients(
    x: jax.Array, z: jax.Array | None, dy: jax.Array, b: jax.Array, c: jax.Array, prepared: Prepared,
    b_bias: jax.Array, c_bias: jax.Array, d: jax.Array, chunk_ssm: jax.Array, chunk_grad: jax.Array,
    *, block: int, no_first: bool = False, no_last: bool = False, interpret=None,
) -> Gradients:  # fmt: skip
    """All gradients of a scan but those that need sums over chunks.

    Args:
      x: [b, l, h, P] bfloat16, as z and dy; l is a whole number of chunks.
      z: the gate; None = none.
      dy: gradient of the output.
      b: B, [b, l, g, N] bfloat16.
      c: C likewise.
      prepared: from prepare.py.
      b_bias: [h, 1, N] float32.
      c_bias: likewise.
      d: [h] float32.
      chunk_ssm: H before every chunk, [b, h, chunks, P, N] bfloat16.
      chunk_grad: gradient of H after every chunk, likewise.
      block: heads of a program, a divisor of h / g.
      no_first: whether H before the first chunk is 0 and only there for the first head.
      no_last: likewise of the gradient of H after the last chunk.
      interpret: parameters of the interpreter, if it is to run the kernel.
    """
    batch, length, heads, _ = x.shape
    chunks, per_group = length // T, heads // b.shape[2]
    blocks = heads // block
    simulated = interpret is not None

    def body(*refs):
        (x_ref, z_ref, dy_ref, b_ref, c_ref, coefficient_ref, rate_ref, start_ref, b_bias_ref, c_bias_ref, d_ref,
         ssm_ref, grad_ref, dx_ref, dz_ref, db_ref, dc_ref, dbias_ref, vector_ref, domega_ref,
         raw, rot, states, both_grad, both_x, both_z, both_g, small, turns, phase,
         both_coefficients, both_starts, both_biases,
         raw_here, x_here, small_here, states_here, free, ready, mixed, scored, flowed) = refs  # fmt: skip
        index, block_index, ci = (lax.axis_index(name) for name in _GRID)
        warpgroup = lax.axis_index("warpgroup")
        span = pl.ds(ci * T, T)

        rot_b, rot_c, ssm, following = rot.at[0], rot.at[1], states.at[0], states.at[1]
        weights, dscores, rate = (small.at[k] for k in range(3))
        score, both_turned_flows = both_starts.at[_OWN_SCORES], both_starts.at[pl.ds(_TURNED_FLOW, 2)]

        def at(k):
            """What depends on the head."""
            slot, head = lax.rem(k, 2), block_index * block + k
            return slot, head, both_coefficients.at[slot], both_grad.at[slot], vector_ref.at[index, head, ci]

        def get(k):
            slot, head, *_ = at(k)
            for source, target in (
                (coefficient_ref.at[index, head, ci], both_coefficients.at[slot]),
                (start_ref.at[index, head, ci], both_starts.at[slot, pl.ds(0, S)]),
                (b_bias_ref.at[head], both_biases.at[slot, pl.ds(0, 1)]),
                (c_bias_ref.at[head], both_biases.at[slot, pl.ds(1, 1)]),
            ):
                plgpu.copy_gmem_to_smem(source, target, small_here.at[slot])
            for source, target in ((dy_ref, both_g), (z_ref, both_z), (x_ref, both_x)):
                if target is not None:
                    plgpu.copy_gmem_to_smem(source.at[index, span, head], target.at[slot], x_here.at[slot])

        def get_after(k):
            _, head, _, grad, _ = at(k)
            of_grad = jnp.where(ci == chunks - 1, 0, head) if no_last else head
            # The last chunk has none following: what comes of it is not used.
            of_after = jnp.int32(0) if no_first and chunks == 1 else head
            after = ssm_ref.at[index, of_after, jnp.minimum(ci + 1, chunks - 1)]
            for source, target in ((grad_ref.at[index, of_grad, ci], grad), (after, following)):
                plgpu.copy_gmem_to_smem(source, target, states_here)

        def get_ssm(k):
            _, head, *_ = at(k)
            of_ssm = jnp.where(ci == 0, 0, head) if no_first else head
            plgpu.copy_gmem_to_smem(ssm_ref.at[index, of_ssm, ci], ssm, states_here)

        def for_next(get, k):
            pl.when(k + 1 < block)(lambda: get(k + 1))

        first, second = pl.ds(0, HALF), pl.ds(HALF, HALF)

        def zeros(width):
            return plgpu.layout_cast(jnp.zeros((T, width), jnp.float32), WG)

        def from_rest(rest):
            """Of what products add to: 0 for what turns, as its gradient still has to, and the other's total so far."""
            return begin(jnp.concatenate([zeros(HALF), rest], axis=1), simulated)

        def add_up_columns(total, which, head, scratch):
            column_sums(jnp.concatenate(total, axis=1), dbias_ref.at[index, ci, head, which], scratch, simulated)

        @pl.when(warpgroup == _SCORES)
        def _():
            plgpu.barrier_arrive(free)
            plgpu.barrier_wait(raw_here)
            row, column = iotas()
            chosen = selectors(row, column, simulated)
            omega = widen(load_tile(rate), simulated)
            omega = omega[:, :S] + omega[:, S:]
            for slot in range(2):
                both_turned_flows[slot] = plgpu.layout_cast(jnp.zeros((T,), jnp.float32), WG.reduce(1))

            def phase_sums(q, k, slot, step, domega):
                """Adds head k's part to dω, and writes that of Δ: from sums of dφ and, in its slot, <G, J H'>."""
                turned_flow = both_turned_flows.at[slot]
                beyond = load_cols(turned_flow.at[pl.ds(0, S)]) - load_cols(turned_flow.at[pl.ds(S, S)])
                q = (q[:, :S] + q[:, S:]) + cols(beyond, T)
                vector_ref[index, block_index * block + k, ci, TURN] = jnp.sum(q * omega, axis=1)
                return domega + rows(step, S) * q

            def step_of(k):
                here = both_coefficients.at[lax.rem(k, 2)]
                return load_rows(here.at[STEP_HIGH]) + load_rows(here.at[STEP_LOW])

            def one(k, carry):
                *total, domega = carry
                slot, head, here, _, vectors = at(k)
                x_tile, g_tile, biases = both_x.at[slot], both_g.at[slot], both_biases.at[slot]
                plgpu.barrier_wait(small_here.at[slot])

                def rest(which):
                    bias = load_cols(biases.at[which, pl.ds(HALF, HALF)]).astype(jnp.bfloat16)
                    return load_tile(raw.at[which, :, pl.ds(HALF, HALF)]) + cols(bias, T)

                cos, sin = turn_by_hand(here, both_starts.at[slot, pl.ds(0, S)], rate, chosen, simulated)
                turned = [turning(raw.at[which], biases.at[pl.ds(which, 1)], cos, sin, simulated) for which in range(2)]
                rests = [rest(which) for which in range(2)]
                before = jnp.maximum(k - 1, 0)  # for the first, sums of the zeros that were in `weights`, and no flow
                step = step_of(before)
                plgpu.barrier_wait(free)
                for target, half, other in zip((rot_b, rot_c), turned, rests, strict=True):
                    target[:, first] = half
                    target[:, second] = other
                stash_turns(turns, cos, sin, simulated)
                publish(simulated)
                plgpu.barrier_arrive(ready)
                meet(simulated)
                q = product(None, anticausal_ones(chosen, simulated), weights, simulated)
                scores = product(None, rot_c, rot_b, simulated, b_t=True)
                decay = load_rows(here.at[DECAY])
                mix = jnp.exp2(rows(decay, T) - cols(load_cols(here.at[OTHER]), T))
                gamma = jnp.exp2(load_rows(here.at[OWN]))
                domega = phase_sums(settle(q, 1, simulated), before, 1 - slot, step, domega)
                meet(simulated)  # no product reads `weights` any more
                plgpu.barrier_wait(x_here.at[slot])
                plgpu.barrier_wait(ready)
                overlaps = product(None, g_tile, x_tile, simulated, b_t=True)
                scores = settle(scores, 1, simulated)
                weights[...] = triangle((scores * mix).astype(jnp.bfloat16), None, chosen, simulated)
                own = pick(scores, row, column, 0, simulated)
                score[...] = own
                scaled = load_tile(g_tile) * rows(jnp.exp2(decay).astype(jnp.bfloat16), P)
                overlaps = settle(overlaps, 0, simulated)
                overlap = pick(overlaps, row, column, 0, simulated)
                narrow = triangle((overlaps * mix).astype(jnp.bfloat16), gamma * overlap, chosen, simulated)
                dscores[...] = narrow
                publish(simulated)
                plgpu.barrier_arrive(mixed)
                vectors[SCORE] = own
                vectors[OVERLAP] = overlap
                plgpu.barrier_wait(states_here)
                dc = product(from_rest(total[1]), scaled, ssm, simulated)
                dc = product(dc, narrow, rot_b, simulated)
                dc = settle(dc, 0, simulated)
                stash(phase, _phase(dc, rot_c, simulated), simulated)
                plgpu.barrier_arrive(scored)
                total = _with_turned_back(total[0], dc, turns, simulated)
                plgpu.barrier_wait(flowed)
                add_up_columns(total, 1, head, following)
                publish(simulated)
                meet(simulated)
                for_next(get_after, k)
                plgpu.barrier_arrive(free)
                return *total, domega

            *total, domega = lax.fori_loop(0, block, one, (zeros(HALF), zeros(HALF), zeros(S)))
            dc_ref[block_index, index, span] = jnp.concatenate(total, axis=1).astype(dc_ref.dtype)
            plgpu.barrier_wait(free)
            q = settle(product(None, anticausal_ones(chosen, simulated), weights, simulated), 0, simulated)
            slot = lax.rem(block - 1, 2)
            domega_ref[block_index, index, span] = phase_sums(q, block - 1, slot, step_of(block - 1), domega)

        @pl.when(warpgroup == _VALUES)
        def _():
            group = block_index * block // per_group
            for which, source in enumerate((b_ref, c_ref)):
                plgpu.copy_gmem_to_smem(source.at[index, span, group], raw.at[which], raw_here)
            plgpu.copy_gmem_to_smem(rate_ref.at[index, span], rate, raw_here)
            get(0)
            get_after(0)
            get_ssm(0)
            weights[...] = plgpu.layout_cast(jnp.zeros((T, T), jnp.bfloat16), WG)
            publish(simulated)
            plgpu.barrier_arrive(free)
            plgpu.barrier_wait(raw_here)

            def one(k, total):
                slot, head, here, grad, vectors = at(k)
                x_tile, g_tile, skip = both_x.at[slot], both_g.at[slot], d_ref[head]
                plgpu.barrier_wait(small_here.at[slot])
                plgpu.barrier_wait(x_here.at[slot])
                if z is not None:
                    z_tile = both_z.at[slot]
                    half = widen(load_tile(z_tile) * jnp.bfloat16(0.5), simulated)
                    tanh = jnp.tanh(half)
                    dy = widen(load_tile(g_tile), simulated)
                    twice = dy * tanh + dy  # 2 dy sigmoid(z)
                    g = twice * half
                    g_tile[...] = g.astype(jnp.bfloat16)
                    z_tile[...] = (twice + (g - g * tanh)).astype(jnp.bfloat16) * jnp.bfloat16(0.5)
                    publish(simulated)
                plgpu.barrier_arrive(ready)
                plgpu.barrier_wait(states_here)
                plgpu.barrier_wait(ready)

                # The other slot's dx and dz have left it.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for_next(get, k)
                decay, to_end = jnp.exp2(load_rows(here.at[DECAY])), load_rows(here.at[TO_END])
                gamma = jnp.exp2(load_rows(here.at[OWN]))

                y = product(None, rot_c, ssm, simulated, b_t=True)
                dx = product(None, rot_b, grad, simulated, b_t=True)
                flow = product(None, grad.at[:, first], following.at[:, first], simulated, a_t=True)
                y = settle(y, 2, simulated) * rows(decay, P)
                dx = settle(dx, 1, simulated) * rows(to_end, P)
                flow = settle(flow, 0, simulated)
                row, column = iotas()
                has_next = jnp.where(ci + 1 < chunks, jnp.float32(1), jnp.float32(0))
                both_turned_flows[slot] = pick(flow, row, column, S, simulated) * has_next
                flow = product(begin(flow, simulated), grad.at[:, second], following.at[:, second], simulated, a_t=True)
                vectors[FLOW] = pick(settle(flow, 0, simulated), row, column, 0, simulated)
                plgpu.barrier_arrive(flowed)
                plgpu.barrier_wait(mixed)
                y = product(begin(y, simulated), weights, x_tile, simulated)
                dx = product(begin(dx, simulated), weights, g_tile, simulated, a_t=True)
                kept = skip + gamma * load_rows(score)
                x, g = load_tile(x_tile), load_tile(g_tile)
                scaled = x * rows(to_end.astype(jnp.bfloat16), P)
                y = settle(y, 1, simulated)
                if z is None:
                    vectors[QUERY], _ = _along(y, g, x, kept, None, simulated)
                else:
                    vectors[QUERY], z_tile[...] = _along(y, g, x, kept, load_tile(z_tile), simulated)
                db = product(from_rest(total[1]), scaled, grad, simulated)
                db = product(db, dscores, rot_c, simulated, a_t=True)
                vectors[KEY], narrow = _along(settle(dx, 2, simulated), x, g, kept, None, simulated)
                meet(simulated)  # no product reads x or weights any more
                x_tile[...] = narrow
                db = settle(db, 0, simulated)
                dphase = _phase(db, rot_b, simulated)
                total = _with_turned_back(total[0], db, turns, simulated)
                plgpu.barrier_wait(scored)
                for_next(get_ssm, k)
                dphase = dphase + unstash(phase, simulated)
                high = dphase.astype(jnp.bfloat16)
                low = (dphase - widen(high, simulated)).astype(jnp.bfloat16)
                weights[...] = jnp.concatenate([high, low], axis=1)
                publish(simulated)
                meet(simulated)
                if z is not None:
                    plgpu.copy_smem_to_gmem(z_tile, dz_ref.at[index, span, head])
                plgpu.copy_smem_to_gmem(x_tile, dx_ref.at[index, span, head])
                add_up_columns(total, 0, head, rot_b)
                plgpu.barrier_arrive(free)
                return total

            total = lax.fori_loop(0, block, one, (zeros(HALF), zeros(HALF)))
            db_ref[block_index, index, span] = jnp.concatenate(total, axis=1).astype(db_ref.dtype)
            plgpu.wait_smem_to_gmem(0)

    # Rounded where nothing is left to be added.
    per_block = jax.ShapeDtypeStruct((blocks, batch, length, N), b.dtype if block == per_group else jnp.float32)
    out = Gradients(
        x=jax.ShapeDtypeStruct(x.shape, x.dtype),
        z=None if z is None else jax.ShapeDtypeStruct(x.shape, x.dtype),
        b=per_block,
        c=per_block,
        biases=jax.ShapeDtypeStruct((batch, chunks, heads, 2, N), jnp.float32),
        vectors=jax.ShapeDtypeStruct((batch, heads, chunks, VECTORS, T), jnp.float32),
        omega=jax.ShapeDtypeStruct((blocks, batch, length, S), jnp.float32),
    )
    arrays = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            tile(2, T, N), tile(2, T, N), tile(2, P, N), tile(2, P, N),  # raw B and C; rotated; H, H'; G of two heads
            # x, z, dy of two heads; weights, dS, ω
            tile(2, T, P), None if z is None else tile(2, T, P), tile(2, T, P), tile(3, T, T),
            plgpu.SMEM((2, T, S) if simulated else (T, S), jnp.float32), plgpu.SMEM((T, S), jnp.float32),
            plgpu.SMEM((2, COEFFICIENTS, T), jnp.float32), plgpu.SMEM((5, T), jnp.float32),
            plgpu.SMEM((2, 2, N), jnp.float32),
            plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=2 + (z is not None), num_barriers=2),
            plgpu.Barrier(num_arrivals=4, num_barriers=2), plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(), plgpu.Barrier(), plgpu.Barrier(),
        ],
        grid=(batch, blocks, chunks), grid_names=_GRID, num_threads=2, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, b, c, *prepared[:3], b_bias, c_bias, d, chunk_ssm, chunk_grad)  # fmt: skip
    return Gradients(*arrays)


def _phase(down: jax.Array, rotated, simulated: bool) -> jax.Array:
    """What turning `rotated` by each phase does to what its gradient `down` is of: float32 [T, S]."""
    v = widen(load_tile(rotated.at[:, pl.ds(0, HALF)]), simulated)
    return down[:, S : 2 * S] * v[:, :S] - down[:, :S] * v[:, S:]


def _with_turned_back(total: jax.Array, down: jax.Array, turns, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Total gradient of B or C, of what turns with this head's, from that of what is rotated, and of the rest."""
    cos, sin = unstash_turns(turns, simulated)
    real, imag = down[:, :S], down[:, S : 2 * S]
    turned = [(total[:, :S] + real * cos) + imag * sin, (total[:, S:] + imag * cos) - real * sin]
    return jnp.concatenate(turned, axis=1), down[:, 2 * S :]


def _along(v: jax.Array, left, right, kept, factor, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Sums of v ⊙ left over columns, and (v + kept ⊙ right) ⊙ factor in bfloat16; a few columns at a time."""
    products, out = 0, []
    for first in range(0, P, _PART):
        part = slice(first, first + _PART)
        one = v[:, part]
        products += one * widen(left[:, part], simulated)
        one = one + rows(kept, _PART) * widen(right[:, part], simulated)
        if factor is not None:
            one = one * widen(factor[:, part], simulated)
        out.append(one.astype(jnp.bfloat16))
    return jnp.sum(products, axis=1), jnp.concatenate(out, axis=1)
