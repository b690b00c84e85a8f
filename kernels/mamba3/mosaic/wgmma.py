"""Warpgroup matrix products (wgmma) instruction by instruction, for what Pallas' own cannot do.

That one writes zeros to registers for what begins as 0, long before they are needed. What is written by hand has a
plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm, vector

from .pieces import WG, hidden

IN_FLIGHT = plgpu.Layout._WGMMA_ACC_32BIT  # of accumulators


def product(acc: jax.Array | None, a, b, simulated: bool, *, a_t: bool = False, b_t: bool = False) -> jax.Array:
    """acc + a @ b; without acc, the product alone. It runs on by itself until `settle`.

    Matrices in shared memory are tiles (`pieces.tile`), [64, 128] in blocks or half the columns of one ([4, 2, 2, 8,
    64] and [4, 2, 8, 64], mimo_pieces.py), or a pair [2, h, w] on top of each other, which has no tiles of 64 columns.

    Args:
      acc: [64, n] float32, from `begin` or another product.
      a: [64, k] bfloat16, an array or in shared memory; not to be changed before the product is done.
      b: [k, n] bfloat16 in shared memory.
      simulated: whether the interpreter runs this.
      a_t: `a` is given transposed, in shared memory.
      b_t: `b` is given transposed.
    """
    if simulated:
        left, right = (v if isinstance(v, jax.Array) else _matrix(v) for v in (a, b))
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        left, right = left.T if a_t else left, right.T if b_t else right
        out = jnp.dot(left, right, precision=lax.Precision.HIGHEST)
        return out if acc is None else acc + out
    in_registers, kinds = isinstance(a, jax.Array), [len(v.shape) for v in (a, b)]
    depth, n = _matrix_shape(b.shape)[::-1] if b_t else _matrix_shape(b.shape)
    swizzle = _swizzle(b)
    deep = swizzle // 2  # of a block of columns

    def inline(ctx, a, b, *acc):
        right = mma_utils.create_descriptor(
            _tiles(b, kinds[1], b_t), swizzle=swizzle, group_size=(deep, n), logical_k_major=True, split_const=True
        )
        transposes = [right[2] != mma_utils.Dim.K]
        if in_registers:
            a = fragmented_array.optimization_barrier(a)
        else:
            left = mma_utils.create_descriptor(
                _tiles(a, kinds[0], a_t), swizzle=swizzle, group_size=(64, deep), logical_k_major=False,
                split_const=True,
            )  # fmt: skip
            transposes.insert(0, left[2] != mma_utils.Dim.K)
        registers = list(fragmented_array.optimization_barrier(acc[0]).registers.flat) if acc else None
        nvvm.wgmma_fence_aligned()
        high_b, high_a = _high(right), None if in_registers else _high(left)
        for k in range(0, depth, 16):
            part = words(a[:, k : k + 16]) if in_registers else (*_low(left, k, deep), high_a)
            registers = issue(registers, part, (*_low(right, k, deep), high_b), n, transposes)
        nvvm.wgmma_commit_group_sync_aligned()
        return array_of(IN_FLIGHT, (64, n), np.array(registers))

    types = (WG if in_registers else ref_type(a), ref_type(b)) + ((IN_FLIGHT,) if acc is not None else ())
    out = plgpu.ShapeDtypeStruct((64, n), jnp.float32, layout=IN_FLIGHT)
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(inline)(a, b, *(() if acc is None else (acc,)))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 2:
        return shape
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else (64, 128 if len(shape) == 5 else 64)


def _matrix(ref) -> jax.Array:
    v = ref[...]
    return (jnp.swapaxes(v, -3, -2) if v.ndim == 5 else v).reshape(_matrix_shape(v.shape))


def _swizzle(ref) -> int:
    return 128 if len(ref.shape) == 2 else min(128, 2 * ref.shape[-1])


def ref_type(ref) -> plgpu.RefType:
    """Of a matrix in shared memory, as `product` takes it."""
    tiled = (plgpu.TilingTransform((8, 64)),) if len(ref.shape) == 2 else ()
    return plgpu.RefType((*tiled, plgpu.SwizzleTransform(_swizzle(ref))))


def _tiles(memory: ir.Value, kind: int, transposed: bool) -> ir.Value:
    """Shared memory as blocks of 8 rows, [rows / 8, columns / w, 8, w]; `kind`: axes of what it was given as."""
    if kind > 2:
        memory = mgpu.utils.memref_fold(memory, 0, 2)
    if kind == 3:
        memory = mgpu.utils.memref_unfold(memory, 0, (None, 8))
    if kind in (3, 4):
        memory = mgpu.utils.memref_unsqueeze(memory, 1)
    return mgpu.utils.memref_transpose(memory, (1, 0, 3, 2)) if transposed else memory


def settle(v: jax.Array, in_flight: int, simulated: bool) -> jax.Array:
    """The result of a product once at most `in_flight` later ones have not ended."""
    if simulated:
        return v

    @plgpu.inline_mgpu(arg_types=(IN_FLIGHT,), return_type=plgpu.ShapeDtypeStruct(v.shape, v.dtype, layout=WG))
    def inline(ctx, array):
        nvvm.wgmma_wait_group_sync_aligned(in_flight)
        return fragmented_array.optimization_barrier(array).to_layout(WG.to_mgpu())

    return inline(v)


def begin(v: jax.Array, simulated: bool) -> jax.Array:
    """[64, n] float32 as what a product adds to."""
    if simulated:
        return v
    out = plgpu.ShapeDtypeStruct(v.shape, v.dtype, layout=IN_FLIGHT)
    return plgpu.inline_mgpu(arg_types=(WG,), return_type=out)(lambda ctx, v: v.to_layout(IN_FLIGHT.to_mgpu()))(v)


def _low(parts, k: int, deep: int) -> tuple[ir.Value, int]:
    """The low 32 bits of an operand's descriptor from its row or column k on: a value and what is to be added."""
    ((base, constant), (_, steps)), (_, group_stride), _ = parts
    group, within = divmod(k, deep)
    offset = mma_utils.encode_addr(group * group_stride) + (within // 16) * mma_utils.encode_addr(steps[0])
    return base, offset + (constant & 0xFFFFFFFF)


def _high(parts) -> ir.Value:
    """The others, of all its descriptors; hidden, as the assembler writes what it knows anew at every instruction."""
    return hidden(parts[0][0][1] >> 32)


def issue(acc, a, b: tuple[ir.Value, int, ir.Value], n: int, transposes: list[bool]) -> list[ir.Value]:
    """One instruction, 16 deep; `a`: 4 registers or a descriptor; `transposes`: of those operands that are in memory.

    Descriptors are put together in the assembly: outside, the compiler would find all before the loop and keep them in
    registers.
    """
    one = ir.VectorType.get((1,), ir.F32Type.get())
    count = n // 2
    inputs, names, code = [], {}, ""
    first = 2 * count if acc else count
    if isinstance(a, list):
        inputs += a
        names["a"] = f"{{{', '.join(f'${first + k}' for k in range(4))}}}"
    for name, operand in (("a", a), ("b", b)):
        if isinstance(operand, tuple):
            base, low, high = operand
            at = first + len(inputs)
            code += f"add.u32 low_{name}, ${at}, {low}; mov.b64 {name}, {{low_{name}, ${at + 1}}}; "
            inputs += [base, high]
            names[name] = name
    flags = "".join(f", {int(v)}" for v in transposes)
    code = (
        "{ .reg .pred p; .reg .b32 low_a, low_b; .reg .b64 a, b; "
        + code
        + f"setp.ne.b32 p, {int(acc is not None)}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{', '.join(f'${k}' for k in range(count))}}}, "
        f"{names['a']}, b, p, 1, 1{flags}; }}"
    )
    constraints = ["=f"] * count + ([str(k) for k in range(count)] if acc else []) + ["r"] * len(inputs)
    outputs = llvm.inline_asm(
        llvm.StructType.get_literal([one] * count), [*(acc or ()), *inputs], code, ",".join(constraints),
        asm_dialect=0, has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(one, outputs, [k]) for k in range(count)]


def words(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's bfloat16 numbers as integers of two each."""
    return [word(v) for v in array.registers.flat]


def word(register: ir.Value) -> ir.Value:
    """Two bfloat16 numbers as an integer."""
    word = vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), register)
    return vector.extract(word, [], [0])


def array_of(layout, shape: tuple[int, ...], registers: np.ndarray) -> mgpu.FragmentedArray:
    """An array of the registers that a thread has of it in `layout`."""
    layout = layout.to_mgpu()
    out = np.empty(layout.registers_shape(shape), dtype=object)
    out.flat[:] = list(registers.flat)
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)
