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

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .forward import Prepared
from .head_gradients import (
    VECTORS,
    Gradients,
    Place,
    Shared,
    Side,
    find,
    phase_sums,
    scores,
    step_of,
    values,
    zeros,
)
from .pieces import HALF, PARAMETERS, WG, N, S, T, publish
from .triangles import anticausal_ones
from .wgmma import product, settle

_GRID = ("batch", "block", "chunk")
_SCORES, _VALUES = range(2)


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
         ssm_ref, grad_ref, *refs) = refs  # fmt: skip
        out, shared = Gradients(*refs[: len(Gradients._fields)]), Shared(*refs[len(Gradients._fields) :])
        index, block_index, ci = (lax.axis_index(name) for name in _GRID)
        warpgroup = lax.axis_index("warpgroup")
        span = pl.ds(ci * T, T)
        place = Place(index, block_index, ci, span, block)
        side = Side(shared, place, out, simulated)

        def get(k):
            slot, head = place.at(k)
            for source, target in (
                (coefficient_ref.at[index, head, ci], shared.coefficients.at[slot]),
                (start_ref.at[index, head, ci], shared.starts.at[slot, pl.ds(0, S)]),
                (b_bias_ref.at[head], shared.biases.at[slot, pl.ds(0, 1)]),
                (c_bias_ref.at[head], shared.biases.at[slot, pl.ds(1, 1)]),
            ):
                plgpu.copy_gmem_to_smem(source, target, shared.small_here.at[slot])
            for source, target in ((dy_ref, shared.g), (z_ref, shared.z), (x_ref, shared.x)):
                if target is not None:
                    plgpu.copy_gmem_to_smem(source.at[index, span, head], target.at[slot], shared.x_here.at[slot])

        def get_after(k):
            slot, head = place.at(k)
            of_grad = jnp.where(ci == chunks - 1, 0, head) if no_last else head
            # The last chunk has none following: what comes of it is not used.
            of_after = jnp.int32(0) if no_first and chunks == 1 else head
            after = ssm_ref.at[index, of_after, jnp.minimum(ci + 1, chunks - 1)]
            given = (grad_ref.at[index, of_grad, ci], shared.grad.at[slot]), (after, shared.states.at[1])
            for source, target in given:
                plgpu.copy_gmem_to_smem(source, target, shared.states_here)

        def get_ssm(k):
            _, head = place.at(k)
            of_ssm = jnp.where(ci == 0, 0, head) if no_first else head
            plgpu.copy_gmem_to_smem(ssm_ref.at[index, of_ssm, ci], shared.states.at[0], shared.states_here)

        @pl.when(warpgroup == _SCORES)
        def _():
            plgpu.barrier_arrive(shared.free)
            plgpu.barrier_wait(shared.raw_here)
            found, none = find(side), (zeros(HALF), zeros(HALF), zeros(S))
            *total, domega = lax.fori_loop(0, block, functools.partial(scores, side, found, get_after), none)
            out.c[block_index, index, span] = jnp.concatenate(total, axis=1).astype(out.c.dtype)
            plgpu.barrier_wait(shared.free)
            ones, (summed, _) = anticausal_ones(found.chosen, simulated), shared.mixes
            q = settle(product(None, ones, summed, simulated), 0, simulated)
            last = block - 1, lax.rem(block - 1, 2), step_of(shared, block - 1)
            out.omega[block_index, index, span] = phase_sums(side, found, q, *last, domega)

        @pl.when(warpgroup == _VALUES)
        def _():
            group = block_index * block // per_group
            for which, source in enumerate((b_ref, c_ref)):
                plgpu.copy_gmem_to_smem(source.at[index, span, group], shared.raw.at[which], shared.raw_here)
            plgpu.copy_gmem_to_smem(rate_ref.at[index, span], shared.rate, shared.raw_here)
            get(0)
            get_after(0)
            get_ssm(0)
            shared.mixes[0][...] = plgpu.layout_cast(jnp.zeros((T, T), jnp.bfloat16), WG)
            publish(simulated)
            plgpu.barrier_arrive(shared.free)
            plgpu.barrier_wait(shared.raw_here)
            one = functools.partial(values, side, d_ref, chunks, get, get_ssm)
            total = lax.fori_loop(0, block, one, (zeros(HALF), zeros(HALF)))
            out.b[block_index, index, span] = jnp.concatenate(total, axis=1).astype(out.b.dtype)
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
        scratch_types=Shared.types(z is not None, simulated),
        grid=(batch, blocks, chunks), grid_names=_GRID, num_threads=2, thread_name="warpgroup",
        interpret=interpret, compiler_params=PARAMETERS,
    )(x, z, dy, b, c, *prepared[:3], b_bias, c_bias, d, chunk_ssm, chunk_grad)  # fmt: skip
    return Gradients(*arrays)
