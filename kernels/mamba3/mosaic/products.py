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

from .pieces import STEP_HIGH, STEP_LOW, WG, S, T, _int, _places, cols, load_cols, load_tile
from .triangles import causal_ones
from .wgmma import array_of, product, ref_type, settle


def turn_by_hand(coefficients, start, rates, chosen: jax.Array, simulated: bool):
    """Cosine and sine as `turn` in pieces.py has them; `chosen`: selectors (triangles.py)."""
    causal, acc = causal_ones(chosen, simulated), None
    for k in (STEP_HIGH, STEP_LOW):
        part = causal * cols(load_cols(coefficients.at[k]).astype(jnp.bfloat16), T)
        acc = product(acc, part, rates, simulated)
    parts = settle(acc, 0, simulated)
    angle = (parts[:, :S] + parts[:, S:]) + cols(load_cols(start), T)
    return jnp.cos(angle), jnp.sin(angle)


def column_sums(v: jax.Array, out, scratch, simulated: bool) -> None:
    """Sums of v, float32 [64, 128], over its rows to out [128] of global memory; scratch: a [64, 128] tile.

    A thread stores what it has of a column, from two rows. The scratch gets [8, 32, 4] fours of numbers: pairs of
    blocks of eight columns; rows of warps and lanes; two columns of each of the blocks. A thread then adds up eight.
    """
    if simulated:
        out[...] = jnp.sum(v, axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(WG, plgpu.RefType(), ref_type(scratch)))
    def inline(ctx, v, out, scratch):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        four = ir.VectorType.get((4,), f32)
        thread = arith.andi(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), _int(127))
        lane, warp = arith.andi(thread, _int(31)), arith.shrui(thread, _int(5))
        bit = [arith.andi(arith.shrui(lane, _int(k)), _int(1)) for k in range(5)]
        base = mgpu.utils.memref_ptr(scratch)
        registers = v.registers.reshape(16, 2)
        pairs = [arith.addf(*registers[k]) for k in range(16)]
        mine = mgpu.utils.getelementptr(base, [thread], four)
        for k in range(8):
            numbers = [vector.extract(pairs[2 * k + half], [], [e]) for half in range(2) for e in range(2)]
            at = mgpu.utils.getelementptr(mine, [128 * k], four)
            llvm.store(vector.from_elements(four, numbers), at, alignment=16)
        mgpu.warpgroup_barrier()
        # A lane has even or odd rows of one half, and what four lanes have found is then put together.
        place = arith.addi(arith.muli(warp, _int(256)), arith.muli(bit[4], _int(128)))
        place = arith.addi(arith.addi(place, arith.muli(bit[3], _int(64))), arith.andi(lane, _int(7)))
        mine = mgpu.utils.getelementptr(base, [place], four)
        total = None
        for k in range(8):
            one = llvm.load(four, mgpu.utils.getelementptr(mine, [8 * k], four), alignment=16)
            total = one if total is None else arith.addf(total, one)
        sums = [vector.extract(total, [], [k]) for k in range(4)]
        for distance, which in ((4, bit[2]), (8, bit[3])):
            high = arith.cmpi(arith.CmpIPredicate.ne, which, _int(0))
            half = len(sums) // 2
            kept = []
            for a, b in zip(sums[:half], sums[half:], strict=True):
                own, other = arith.select(high, b, a), arith.select(high, a, b)
                other = nvvm.shfl_sync(_int(-1), other, _int(distance), _int(31), nvvm.ShflKind.bfly)
                kept.append(arith.addf(own, other))
            sums = kept
        column = arith.addi(arith.muli(warp, _int(32)), arith.muli(bit[4], _int(16)))
        column = arith.addi(column, arith.muli(bit[2], _int(8)))
        column = arith.addi(column, arith.addi(arith.muli(arith.andi(lane, _int(3)), _int(2)), bit[3]))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [column], f32)
        llvm.store(sums[0], pointer, alignment=4)

    inline(v, out, scratch)


def stash_turns(ref, cos: jax.Array, sin: jax.Array, simulated: bool) -> None:
    """Cosine and sine [.., S] to shared memory in float16, in an order that only `unstash_turns` understands.

    Rounded to 2^-12 they are off by an eighth of what bfloat16 is.
    """
    if simulated:
        for k, v in enumerate((cos, sin)):
            ref[k] = v.astype(jnp.float16).astype(jnp.float32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WG, WG))
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


def unstash_turns(ref, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """What `stash_turns` put there."""
    if simulated:
        return tuple(load_tile(ref.at[k]) for k in range(2))
    out = plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=WG)

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
            arrays.append(array_of(WG, out.shape, registers))
        return tuple(arrays)

    return inline(ref)
