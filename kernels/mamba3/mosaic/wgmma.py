"""Warpgroup matrix products (wgmma) instruction by instruction, for what Pallas' own cannot do.

That one writes zeros to registers for what begins as 0, long before they are needed.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from .pieces import WG

IN_FLIGHT = plgpu.Layout._WGMMA_ACC_32BIT  # of accumulators


def settle(v: jax.Array, in_flight: int, simulated: bool) -> jax.Array:
    """The result of a product once at most `in_flight` later ones have not ended."""
    if simulated:
        return v

    @plgpu.inline_mgpu(arg_types=(IN_FLIGHT,), return_type=plgpu.ShapeDtypeStruct(v.shape, v.dtype, layout=WG))
    def inline(ctx, array):
        assembly(f"wgmma.wait_group.sync.aligned {in_flight};")
        return fragmented_array.optimization_barrier(array).to_layout(WG.to_mgpu())

    return inline(v)


def begin(v: jax.Array, simulated: bool) -> jax.Array:
    """[64, n] float32 as what a product adds to."""
    if simulated:
        return v
    out = plgpu.ShapeDtypeStruct(v.shape, v.dtype, layout=IN_FLIGHT)
    return plgpu.inline_mgpu(arg_types=(WG,), return_type=out)(lambda ctx, v: v.to_layout(IN_FLIGHT.to_mgpu()))(v)


def descriptor(parts, k: int, deep: int) -> tuple[ir.Value, int, int]:
    """Of an operand, from its row or column k on: its low 32 bits as a value and what is to be added, its high bits."""
    ((base, constant), (_, steps)), (_, group_stride), _ = parts
    group, within = divmod(k, deep)
    offset = mma_utils.encode_addr(group * group_stride) + (within // 16) * mma_utils.encode_addr(steps[0])
    return base, offset + (constant & 0xFFFFFFFF), constant >> 32


def issue(acc, a, b: tuple[ir.Value, int, int], n: int, transposes: list[bool]) -> list[ir.Value]:
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
            code += f"add.u32 low_{name}, ${first + len(inputs)}, {low}; mov.b64 {name}, {{low_{name}, {high}}}; "
            inputs.append(base)
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


def assembly(code: str) -> None:
    """One instruction without operands."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], code, "", has_side_effects=True)


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
