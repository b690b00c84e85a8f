"""What the SISO gradients' kernel makes of products: phases, sums over rows; and cosines kept aside.

What is written by hand has a plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

from .pieces import STEP_HIGH, STEP_LOW, WG, S, T, _causal_ones, _int, _places, cols, cos_sin, load_cols, load_tile
from .wgmma import array_of, product, settle


def turn_by_hand(coefficients, start, rates, row: jax.Array, column: jax.Array, simulated: bool):
    """Cosine and sine as `turn` in pieces.py has them."""
    causal = _causal_ones(row, column, simulated)
    acc = None
    for k in (STEP_HIGH, STEP_LOW):
        part = causal * cols(load_cols(coefficients.at[k]).astype(jnp.bfloat16), T)
        acc = product(acc, part, rates, simulated)
    parts = settle(acc, 0, simulated)
    return cos_sin((parts[:, :S] + parts[:, S:]) + cols(load_cols(start), T), simulated)


def column_sums(v: jax.Array, out, partial, simulated: bool) -> None:
    """Sums of v, float32 [64, 64], over its rows to out [64] of global memory; partial: [4, 64] of shared memory.

    What of a column a warp's threads have goes to one of them, halving what each has at every exchange.
    """
    if simulated:
        out[...] = jnp.sum(v, axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(WG, plgpu.RefType(), plgpu.RefType()))
    def inline(ctx, v, out, partial):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        thread = arith.andi(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), _int(127))
        lane = arith.andi(thread, _int(31))
        registers = v.registers.reshape(8, 2)
        sums = [arith.addf(*registers[k]) for k in range(8)]  # a column block of eight each
        sums = [[vector.extract(r, [], [e]) for e in range(2)] for r in sums]
        for distance in (16, 8, 4):
            high = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, _int(distance)), _int(0))
            half = len(sums) // 2
            kept = []
            for low_pair, high_pair in zip(sums[:half], sums[half:], strict=True):
                pair = []
                for a, b in zip(low_pair, high_pair, strict=True):
                    mine, other = arith.select(high, b, a), arith.select(high, a, b)
                    other = nvvm.shfl_sync(_int(-1), other, _int(distance), _int(31), nvvm.ShflKind.bfly)
                    pair.append(arith.addf(mine, other))
                kept.append(pair)
            sums = kept
        # Now a lane has columns 2 lane and 2 lane + 1.
        base = mgpu.utils.memref_ptr(partial)
        llvm.store(vector.from_elements(two, sums[0]), mgpu.utils.getelementptr(base, [thread], two), alignment=8)
        mgpu.warpgroup_barrier()
        total = None
        for warp in range(4):
            at = mgpu.utils.getelementptr(base, [arith.addi(lane, _int(32 * warp))], two)
            one = llvm.load(two, at, alignment=8)
            total = one if total is None else arith.addf(total, one)
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [lane], two)
        llvm.store(total, pointer, alignment=8)

    inline(v, out, partial)


def stash_turns(ref, cos: jax.Array, sin: jax.Array, simulated: bool, layout=WG) -> None:
    """Cosine and sine [.., S] to shared memory in float16, in an order that only `unstash_turns` understands.

    Rounded to 2^-12 they are off by an eighth of what bfloat16 is.
    """
    if simulated:
        for k, v in enumerate((cos, sin)):
            ref[k] = v.astype(jnp.float16).astype(jnp.float32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def inline(ctx, ref, cos, sin):
        f16, i32 = ir.F16Type.get(), ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), i32)
        words = []
        for pair in zip(cos.registers.flat, sin.registers.flat, strict=True):
            for e in range(2):
                both = [vector.extract(r, [], [e]) for r in pair]
                both = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), both)
                both = arith.truncf(ir.VectorType.get((2,), f16), both)
                words.append(vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), both), [], [0]))
        for k, at in enumerate(_places(ref)):
            llvm.store(vector.from_elements(four, words[4 * k : 4 * k + 4]), at, alignment=16)

    inline(ref, cos, sin)


def unstash_turns(ref, simulated: bool, layout=WG) -> tuple[jax.Array, jax.Array]:
    """What `stash_turns` put there."""
    if simulated:
        return tuple(load_tile(ref.at[k], layout) for k in range(2))
    out = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def inline(ctx, ref):
        f16, f32, i32 = ir.F16Type.get(), ir.F32Type.get(), ir.IntegerType.get_signless(32)
        two, four = ir.VectorType.get((2,), f32), ir.VectorType.get((4,), i32)
        halves = ([], [])
        for at in _places(ref):
            words = llvm.load(four, at, alignment=16)
            for k in range(4):
                word = vector.from_elements(ir.VectorType.get((1,), i32), [vector.extract(words, [], [k])])
                both = arith.extf(two, vector.bitcast(ir.VectorType.get((2,), f16), word))
                for e, half in enumerate(halves):
                    half.append(vector.extract(both, [], [e]))
        arrays = []
        for half in halves:
            pairs = [vector.from_elements(two, half[k : k + 2]) for k in range(0, len(half), 2)]
            registers = np.empty(len(pairs), dtype=object)
            registers[:] = pairs
            arrays.append(array_of(layout, out.shape, registers))
        return tuple(arrays)

    return inline(ref)
