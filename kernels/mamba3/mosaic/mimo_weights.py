"""Weights of a MIMO head by rank, as the Mosaic GPU kernels read them: biases of B and C, mimo_x, mimo_z, mimo_o.

A thread finds its columns (mimo_pieces.py) in pieces of 16 bytes.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .mimo_pieces import HALF_ROWS, POS, positions
from .pieces import P
from .wgmma import array_of

# mimo_x, half of mimo_z, mimo_o; then biases, of the half that rotates and of the other, two kinds to a row.
WEIGHTS = 5
MIMO_X, MIMO_Z, MIMO_O, B_BIAS, C_BIAS, B_REST, C_REST = range(WEIGHTS + 2)


def pack(b_bias, c_bias, mimo_x, mimo_z, mimo_o) -> jax.Array:
    """Weights [h, r, n or p] as the kernels read them: [h, r, WEIGHTS, 64] float32.

    A thread finds its columns in pieces of 16 bytes. Biases are bfloat16 numbers, two to each 32 bits; their rounding
    is no larger than that of a rotated row.
    """
    wide = jnp.stack([mimo_x, mimo_z / 2, mimo_o], axis=2).astype(jnp.float32)
    halves = [[v[..., part].astype(jnp.bfloat16) for v in (b_bias, c_bias)] for part in (slice(P), slice(P, None))]
    narrow = jnp.stack([jnp.concatenate([_in_pieces(v) for v in half], axis=-1) for half in halves], axis=2)
    narrow = lax.bitcast_convert_type(narrow.reshape(*narrow.shape[:-1], 64, 2), jnp.float32)
    return jnp.concatenate([_in_pieces(wide), narrow], axis=2)


def _in_pieces(v: jax.Array) -> jax.Array:
    """The last axis, of 64: columns 8 j + 2 q + {0, 1} with the same q, up to 16 bytes, side by side."""
    pairs = _pairs(v.dtype)
    out = v.reshape(*v.shape[:-1], 8 // pairs, pairs, 4, 2)
    return jnp.swapaxes(out, -3, -2).reshape(v.shape)


def mimo_weights(packed: jax.Array) -> jax.Array:
    """mimo_x, half of mimo_z and mimo_o, [h, 3, r, p] float32, from what `pack` made."""
    v = packed[:, :, : MIMO_O + 1]
    pairs = _pairs(v.dtype)
    v = jnp.swapaxes(v.reshape(*v.shape[:-1], 8 // pairs, 4, pairs, 2), -3, -2).reshape(v.shape)
    return jnp.swapaxes(v, 1, 2)


def load_weight(ref, k: int, kind: int, ranks: int, simulated: bool) -> jax.Array:
    """Of rank k of the pair of a row, [32, 64]: float32, or bfloat16 for biases. `ref`: of one head."""
    row, dtype = (kind, jnp.float32) if kind < B_BIAS else ((kind + B_BIAS) // 2, jnp.bfloat16)
    pairs, second = _pairs(dtype), kind in (C_BIAS, C_REST)
    if simulated:
        of_ranks = [_unpack(ref[rank, row], dtype, second) for rank in range(k, ranks, 2)]
        return jnp.concatenate([lax.broadcast_in_dim(v, (positions(ranks), P), (1,)) for v in of_ranks])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((HALF_ROWS, P), dtype, layout=POS)
    )
    def inline(ctx, memory):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        element = ir.F32Type.get() if dtype == jnp.float32 else ir.BF16Type.get()
        thread = mgpu.utils.thread_idx()
        at = arith.muli(arith.andi(thread, mgpu.utils.c(3, i32)), mgpu.utils.c(16, i32))
        if ranks == 4:  # the upper two warps have the second pair
            pair = arith.andi(arith.shrui(thread, mgpu.utils.c(6, i32)), mgpu.utils.c(1, i32))
            at = arith.addi(at, arith.muli(pair, mgpu.utils.c(2 * 4 * P * WEIGHTS, i32)))
        pointer = mgpu.utils.memref_ptr(memory)
        if not mgpu.utils.is_smem_ref(memory):
            pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
        pointer = mgpu.utils.getelementptr(pointer, [at], i8)
        first = 4 * P * (WEIGHTS * k + row) + 2 * P * second
        return array_of(POS, (HALF_ROWS, P), _load_pieces(pointer, first, element, pairs))

    return inline(ref)


def _unpack(v: jax.Array, dtype, second: bool) -> jax.Array:
    """A packed row [64] as `pack` was given it."""
    if dtype == jnp.bfloat16:
        return unpack_biases(v)[int(second)]
    pairs = _pairs(dtype)
    return jnp.swapaxes(v.reshape(8 // pairs, 4, pairs, 2), 1, 2).reshape(P)


def unpack_biases(v: jax.Array) -> jax.Array:
    """A packed row [64] of biases as `pack` was given it, of two kinds: [2, 64] bfloat16."""
    pairs = _pairs(jnp.bfloat16)
    v = lax.bitcast_convert_type(v, jnp.bfloat16).reshape(2, 8 // pairs, 4, pairs, 2)
    return jnp.swapaxes(v, 2, 3).reshape(2, P)


def _pairs(dtype) -> int:
    """In 16 bytes."""
    return 16 // jnp.dtype(dtype).itemsize // 2


def _load_pieces(pointer: ir.Value, first: int, element: ir.Type, pairs: int) -> np.ndarray:
    """A thread's 16 numbers of a packed row, in pairs; `pointer`: where its first piece would be at 0."""
    i8, pair = ir.IntegerType.get_signless(8), ir.VectorType.get((2,), element)
    registers = []
    for piece in range(8 // pairs):
        at = mgpu.utils.getelementptr(pointer, [first + 64 * piece], i8)
        loaded = llvm.load(ir.VectorType.get((2 * pairs,), element), at)
        registers += [vector.extract_strided_slice(pair, loaded, [2 * k], [2], [1]) for k in range(pairs)]
    return np.array(registers)
