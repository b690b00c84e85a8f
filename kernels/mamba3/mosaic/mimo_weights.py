"""Weights of MIMO heads by rank, as the Mosaic GPU kernels read them."""

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .pieces import WG, P
from .wgmma import array_of

MIMO_X, MIMO_Z, MIMO_O = range(3)
HALVES = 2  # of a row of biases: what rotates, and the rest
_LINE = 128  # bytes of the first-level cache


class Packed(NamedTuple):
    """What `pack` returns."""

    biases: jax.Array  # [h, r, HALVES, 64] float32: of B, then of C, two bfloat16 numbers to each 32 bits
    mimo: jax.Array  # mimo_x, half of mimo_z, mimo_o: [h, P, 3, r] float32


def pack(b_bias, c_bias, mimo_x, mimo_z, mimo_o) -> Packed:
    """Of weights [h, r, n or p].

    What a thread needs of either lies side by side, 16 bytes at 4 ranks: of the biases four angles, real and imaginary
    parts, or eight columns of the rest; of the others all ranks. Biases' rounding to bfloat16 is no larger than that of
    a rotated row.
    """
    halves = [[v[..., part].astype(jnp.bfloat16) for v in (b_bias, c_bias)] for part in (slice(P), slice(P, None))]
    halves[0] = [_by_angle(v) for v in halves[0]]
    biases = jnp.stack([jnp.concatenate(half, axis=-1) for half in halves], axis=2)
    biases = lax.bitcast_convert_type(biases.reshape(*biases.shape[:-1], P, 2), jnp.float32)
    mimo = jnp.stack([mimo_x, mimo_z / 2, mimo_o], axis=1).astype(jnp.float32)
    return Packed(biases, jnp.transpose(mimo, (0, 3, 1, 2)))


def _by_angle(v: jax.Array) -> jax.Array:
    return jnp.swapaxes(v.reshape(*v.shape[:-1], 2, 8, 4), -3, -2).reshape(v.shape)


def unpack_biases(v: jax.Array) -> jax.Array:
    """A packed row [64] as `pack` was given it, of B and C: [2, 64] bfloat16."""
    return lax.bitcast_convert_type(v, jnp.bfloat16).reshape(2, P)


def by_column(v: jax.Array) -> jax.Array:
    """Biases of what rotates, [.., P], in the order of columns."""
    return jnp.swapaxes(v.reshape(*v.shape[:-1], 8, 2, 4), -3, -2).reshape(v.shape)


def load_of_ranks(ref, kind: int, simulated: bool) -> list[jax.Array]:
    """A head's weights of a kind, [P] along rows (WG) of every rank. `ref`: of the head, in global memory."""
    ranks = ref.shape[-1]
    if simulated:
        return [ref[:, kind, rank] for rank in range(ranks)]
    layout = WG.reduce(1)
    out = (plgpu.ShapeDtypeStruct((P,), jnp.float32, layout=layout),) * ranks

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=out)
    def inline(ctx, memory):
        i32, f32, c = ir.IntegerType.get_signless(32), ir.F32Type.get(), mgpu.utils.c
        one, all_ranks = (ir.VectorType.get((count,), f32) for count in (1, ranks))
        thread = mgpu.utils.thread_idx()
        row = arith.andi(arith.shrui(thread, c(2, i32)), c(7, i32))  # four threads have a row
        warp = arith.andi(arith.shrui(thread, c(5, i32)), c(3, i32))
        at = arith.muli(arith.addi(row, arith.muli(warp, c(16, i32))), c(3, i32))
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(memory))
        pointer = mgpu.utils.getelementptr(pointer, [at], all_ranks)
        rows = []
        for half in range(2):
            place = mgpu.utils.getelementptr(pointer, [3 * 8 * half + kind], all_ranks)
            rows.append(llvm.load(all_ranks, place, alignment=4 * ranks))
        numbers = [[vector.from_elements(one, [vector.extract(v, [], [rank])]) for v in rows] for rank in range(ranks)]
        return tuple(array_of(layout, (P,), np.array(v)) for v in numbers)

    return inline(ref)


def touch(ref, simulated: bool) -> None:
    """Lets weights in global memory be in the first-level cache soon, by a load of every line that no one waits for.

    Every thread of the warpgroup takes a line, as far as there are any.
    """
    if simulated:
        return
    lines = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize // _LINE

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(ctx, memory):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        thread = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(127, i32))
        at = arith.muli(thread, mgpu.utils.c(_LINE, i32))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(memory), [at], i8)
        is_one = f"setp.lt.s32 p, $1, {lines};"
        code = f"{{ .reg .pred p; .reg .b32 v; {is_one} @p ld.global.ca.b32 v, [$0]; }}"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [pointer, thread], code, "l,r", has_side_effects=True)

    inline(ref)
