"""What the Mosaic GPU kernels for MIMO need besides pieces.py: rows of two ranks, weights by rank, products by hand.

Notation: a chunk has T = 32 positions of R ranks. A [32, w] array, one row per position, lies in registers so that a
thread has pairs of neighbouring columns in one row (POS). Row 16 v + 8 k + i of a [64, w] array as the matrix units
leave it (WG) is rank k of two, position 8 v + i: a thread has both ranks of its position, so what depends on the
position alone exists once, and sums over ranks are sums of a thread's own numbers. Shared memory holds the rows of a
pair of ranks in the same order: B and C, [64, 128] a pair, in blocks of 8 rows and 64 columns, [4, 2, 2, 8, 64] by v,
k, columns, i and column (BLOCKS).

What is written by hand has a plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from .pieces import WG, P
from .wgmma import IN_FLIGHT, array_of, assembly, descriptor, issue, words

T = 32  # positions of a chunk
ROWS = 2 * T  # of a pair of ranks
BLOCKS = (4, 2, 2, 8, 64)

POS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# With 4 ranks: of 16 positions, each of which two warps have.
_HALF_POS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((16, 8), (8, 8), (2,))), warp_dims=(fragmented_array.Replicated(2), -5),
    lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip


def positions_layout(ranks: int):
    """Of arrays with a row per position of a step."""
    return POS if ranks == 2 else _HALF_POS


def spread(v: jax.Array, simulated: bool) -> jax.Array:
    """A row per position of a step, [T or T / 2, w] → per position and pair of ranks, [T, w]. No instruction."""
    if v.shape[0] == T:
        return v
    if simulated:
        return jnp.concatenate([v, v])
    out = plgpu.ShapeDtypeStruct((T, v.shape[1]), v.dtype, layout=POS)
    return plgpu.inline_mgpu(arg_types=(_HALF_POS,), return_type=out)(
        lambda ctx, v: array_of(POS, out.shape, v.registers)
    )(v)


# Weights of a head per rank: biases of the half that rotates, mimo_x, half of mimo_z, mimo_o; biases of the other half,
# which share a row.
WEIGHTS = 6
B_BIAS, C_BIAS, MIMO_X, MIMO_Z, MIMO_O, B_REST, C_REST = range(WEIGHTS + 1)


def blocks(*shape: int) -> plgpu.SMEM:
    """B or C of pairs of ranks."""
    return plgpu.SMEM((*shape, *BLOCKS), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))


def cols(v: jax.Array) -> jax.Array:
    """[w] along columns → [T, w]."""
    return lax.broadcast_in_dim(v, (T, v.shape[0]), (1,))


def join(first: jax.Array, second: jax.Array, simulated: bool) -> jax.Array:
    """Two ranks, [T, w] each → [ROWS, w] as the matrix units take it. No instruction."""
    if simulated:
        return jnp.stack([v.reshape(4, 8, -1) for v in (first, second)], axis=1).reshape(ROWS, -1)
    out = plgpu.ShapeDtypeStruct((ROWS, first.shape[1]), first.dtype, layout=WG)

    @plgpu.inline_mgpu(arg_types=(POS, POS), return_type=out)
    def inline(ctx, *parts):
        registers = np.empty(WG.to_mgpu().registers_shape(out.shape), dtype=object)
        for half, part in enumerate(parts):
            registers[0, :, 0, 0, half].flat[:] = part.registers.flat
        return array_of(WG, out.shape, registers)

    return inline(first, second)


def split(v: jax.Array, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """The converse of `join`."""
    if simulated:
        return tuple(v.reshape(4, 2, 8, -1)[:, half].reshape(T, -1) for half in range(2))
    out = plgpu.ShapeDtypeStruct((T, v.shape[1]), v.dtype, layout=POS)

    @plgpu.inline_mgpu(arg_types=(WG,), return_type=(out, out))
    def inline(ctx, array):
        return tuple(array_of(POS, out.shape, array.registers[0, :, 0, 0, half]) for half in range(2))

    return inline(v)


def load_pair(ref, columns: int, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """64 columns of a pair of ranks in shared memory (BLOCKS): two of [T, 64]."""
    ref = ref.at[:, :, columns]
    if simulated:
        v = ref[...]  # [4, 2, 8, 64]
        return v[:, 0].reshape(T, 64), v[:, 1].reshape(T, 64)
    out = plgpu.ShapeDtypeStruct((ROWS, 64), jnp.bfloat16, layout=WG)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((plgpu.SwizzleTransform(128),)),), return_type=out)
    def inline(ctx, memory):
        tiles = mgpu.utils.memref_unsqueeze(mgpu.utils.memref_fold(memory, 0, 2), 1)
        return mgpu.FragmentedArray.load_tiled(tiles, swizzle=128, layout=WG.to_mgpu())

    return split(inline(ref), simulated)


def store_pair(ref, columns: int, first: jax.Array, second: jax.Array, simulated: bool) -> None:
    """The converse of `load_pair`."""
    ref = ref.at[:, :, columns]
    if simulated:
        ref[...] = jnp.stack([v.reshape(4, 8, 64) for v in (first, second)], axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(WG, plgpu.RefType((plgpu.SwizzleTransform(128),))))
    def inline(ctx, array, memory):
        array.store_tiled(mgpu.utils.memref_unsqueeze(mgpu.utils.memref_fold(memory, 0, 2), 1), swizzle=128)

    inline(join(first, second, simulated), ref)


def pack(b_bias, c_bias, mimo_x, mimo_z, mimo_o) -> jax.Array:
    """Weights [h, r, n or p] as the kernels read them: [h, r, WEIGHTS, 64] float32.

    A thread finds its columns in pieces of 16 bytes. The last row holds the biases that do not rotate, two bfloat16
    numbers to each 32 bits.
    """
    wide = jnp.stack([b_bias[..., :P], c_bias[..., :P], mimo_x, mimo_z / 2, mimo_o], axis=2).astype(jnp.float32)
    narrow = jnp.concatenate([_in_pieces(v[..., P:].astype(jnp.bfloat16)) for v in (b_bias, c_bias)], axis=-1)
    narrow = lax.bitcast_convert_type(narrow.reshape(*narrow.shape[:-1], 64, 2), jnp.float32)
    return jnp.concatenate([_in_pieces(wide), narrow[:, :, None]], axis=2)


def _in_pieces(v: jax.Array) -> jax.Array:
    """The last axis, of 64: columns 8 j + 2 q + {0, 1} with the same q, up to 16 bytes, side by side."""
    pairs = _pairs(v.dtype)
    out = v.reshape(*v.shape[:-1], 8 // pairs, pairs, 4, 2)
    return jnp.swapaxes(out, -3, -2).reshape(v.shape)


def x_weights(packed: jax.Array) -> jax.Array:
    """mimo_x, [h, r, p] float32, from what `pack` made."""
    v = packed[:, :, MIMO_X]
    pairs = _pairs(v.dtype)
    return jnp.swapaxes(v.reshape(*v.shape[:-1], 8 // pairs, 4, pairs, 2), -3, -2).reshape(v.shape)


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


def load_row_weight(ref, k: int, kind: int, ranks: int, simulated: bool) -> jax.Array:
    """Of rank k of the pair of a row, [T, 64]: float32, or bfloat16 for B_REST and C_REST. `ref`: of one head."""
    row, dtype = (kind, jnp.float32) if kind < B_REST else (B_REST, jnp.bfloat16)
    pairs, second = _pairs(dtype), kind == C_REST
    if simulated:
        v = [load_weight(ref, rank, kind, True) for rank in range(k, ranks, 2)]
        return jnp.concatenate([lax.broadcast_in_dim(w, (2 * T // ranks, 64), (1,)) for w in v])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((T, 64), dtype, layout=POS))
    def inline(ctx, memory):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        element = ir.F32Type.get() if dtype == jnp.float32 else ir.BF16Type.get()
        thread = mgpu.utils.thread_idx()
        at = arith.muli(arith.andi(thread, mgpu.utils.c(3, i32)), mgpu.utils.c(16, i32))
        if ranks == 4:  # the upper two warps have the second pair
            pair = arith.andi(arith.shrui(thread, mgpu.utils.c(6, i32)), mgpu.utils.c(1, i32))
            at = arith.addi(at, arith.muli(pair, mgpu.utils.c(2 * 4 * 64 * WEIGHTS, i32)))
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(memory))
        pointer = mgpu.utils.getelementptr(pointer, [at], i8)
        first = 4 * 64 * (WEIGHTS * k + row) + 128 * second
        return array_of(POS, (T, 64), _load_pieces(pointer, first, element, pairs))

    return inline(ref)


def send_partial(sums, total: jax.Array, simulated: bool) -> None:
    """Half of the sums over a pair of ranks, [T, P], to the warp with the other pair; `sums`: [16, 64] float32."""
    if simulated:
        sums[...] = total[:16]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), POS))
    def inline(ctx, sums, total):
        four, at = ir.VectorType.get((4,), ir.F32Type.get()), _own_place(sums, 0)
        upper, registers = _has_upper_pair(), list(total.registers.flat)
        gone = [arith.select(upper, a, b) for a, b in zip(registers[:4], registers[4:], strict=True)]
        for k in range(2):
            numbers = [vector.extract(v, [], [e]) for v in gone[2 * k : 2 * k + 2] for e in range(2)]
            place = mgpu.utils.getelementptr(at, [128 * k], four)
            llvm.store(vector.from_elements(four, numbers), place, alignment=16)

    inline(sums, total)


def store_sum(y, sums, total: jax.Array, simulated: bool) -> None:
    """The sum over all ranks, bfloat16 to y [16, 64]; after `send_partial` and a barrier."""
    if simulated:
        y[...] = (sums[...] + total[16:]).astype(jnp.bfloat16)
        return

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))), plgpu.RefType(), POS)
    )
    def inline(ctx, y, sums, total):
        i32, i8, f32, bf16 = *(ir.IntegerType.get_signless(k) for k in (32, 8)), ir.F32Type.get(), ir.BF16Type.get()
        c = mgpu.utils.c
        two, four, at = ir.VectorType.get((2,), f32), ir.VectorType.get((4,), f32), _own_place(sums, 64)
        upper, registers = _has_upper_pair(), list(total.registers.flat)
        kept = [arith.select(upper, b, a) for a, b in zip(registers[:4], registers[4:], strict=True)]
        thread = mgpu.utils.thread_idx()
        in_eight = arith.andi(arith.shrui(thread, c(2, i32)), c(7, i32))
        row = arith.addi(in_eight, arith.andi(arith.shrui(thread, c(2, i32)), c(8, i32)))
        base = arith.addi(arith.muli(row, c(128, i32)), arith.muli(arith.andi(thread, c(3, i32)), c(4, i32)))
        block = arith.andi(arith.shrui(thread, c(4, i32)), c(4, i32))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(y), [base], i8)
        for k in range(2):
            numbers = llvm.load(four, mgpu.utils.getelementptr(at, [128 * k], four), alignment=16)
            for e in range(2):
                other = vector.extract_strided_slice(two, numbers, [2 * e], [2], [1])
                v = arith.truncf(ir.VectorType.get((2,), bf16), arith.addf(kept[2 * k + e], other))
                piece = arith.xori(arith.addi(block, c(2 * k + e, i32)), in_eight)
                place = mgpu.utils.getelementptr(pointer, [arith.muli(piece, c(16, i32))], i8)
                llvm.store(v, place, alignment=4)

    inline(y, sums, total)


def _has_upper_pair() -> ir.Value:
    """Whether this thread's rows are of the second pair of ranks."""
    i32 = ir.IntegerType.get_signless(32)
    bit = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(64, i32))
    return arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.utils.c(0, i32))


def _own_place(sums: ir.Value, flipped: int) -> ir.Value:
    """Address of the first four numbers of this thread, or of that whose number differs in `flipped`."""
    i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.F32Type.get())
    thread = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(127, i32))
    thread = arith.xori(thread, mgpu.utils.c(flipped, i32))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(sums), [thread], four)


def load_weight(ref, rank: int, kind: int, simulated: bool) -> jax.Array:
    """Along columns, [64]: float32, or bfloat16 for B_REST and C_REST. `ref`: of one head, in global memory."""
    row, dtype = (kind, jnp.float32) if kind < B_REST else (B_REST, jnp.bfloat16)
    pairs, second = _pairs(dtype), kind == C_REST
    if simulated:
        v = ref[rank, row]
        if dtype == jnp.bfloat16:
            v = lax.bitcast_convert_type(v, dtype).reshape(2, 64)[int(second)]
        return jnp.swapaxes(v.reshape(8 // pairs, 4, pairs, 2), 1, 2).reshape(64)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), dtype, layout=POS.reduce(0))
    )
    def inline(ctx, memory):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        element = ir.F32Type.get() if dtype == jnp.float32 else ir.BF16Type.get()
        lane = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(3, i32))
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(memory))
        pointer = mgpu.utils.getelementptr(pointer, [arith.muli(lane, mgpu.utils.c(16, i32))], i8)
        first = 4 * 64 * (WEIGHTS * rank + row) + 128 * second
        return array_of(POS.reduce(0), (64,), _load_pieces(pointer, first, element, pairs))

    return inline(ref)


def product(acc: jax.Array | None, a, b, simulated: bool, transposed: bool = False) -> jax.Array:
    """acc + a @ b, or a @ bᵀ if `transposed`; without acc, the product alone. It runs on by itself until `settle`.

    Pallas' own wgmma would write zeros to registers for what begins as 0, long before they are needed.

    Args:
      acc: [64, n] float32, from `begin` or another product.
      a: [64, k] bfloat16, an array or in shared memory; not to be changed before the product is done.
      b: [k, n] or, transposed, [n, k] bfloat16 in shared memory.
      simulated: whether the interpreter runs this.
      transposed: as above.
    """
    if simulated:
        left, right = (v if isinstance(v, jax.Array) else _matrix(v) for v in (a, b))
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        out = jnp.dot(left, right.T if transposed else right, precision=lax.Precision.HIGHEST)
        return out if acc is None else acc + out
    in_registers = isinstance(a, jax.Array)
    height, width = _matrix_shape(b)
    n = height if transposed else width
    swizzle = min(128, 2 * width)
    deep = swizzle // 2  # of a block of columns

    def inline(ctx, a, b, *acc):
        b = _tiles(b, deep)
        if transposed:
            b = mgpu.utils.memref_transpose(b, (1, 0, 3, 2))
        right = mma_utils.create_descriptor(
            b, swizzle=swizzle, group_size=(deep, n), logical_k_major=True, split_const=True
        )
        if in_registers:
            depth = a.shape[1]
            a = fragmented_array.optimization_barrier(a)
        else:
            a = _tiles(a, deep)
            depth = deep * ir.MemRefType(a.type).shape[1]
            left = mma_utils.create_descriptor(
                a, swizzle=swizzle, group_size=(64, deep), logical_k_major=False, split_const=True
            )
        registers = list(fragmented_array.optimization_barrier(acc[0]).registers.flat) if acc else None
        nvvm.wgmma_fence_aligned()
        for k in range(0, depth, 16):
            part = words(a[:, k : k + 16]) if in_registers else descriptor(left, k, deep)
            transposes = [right[2] != mma_utils.Dim.K] if in_registers else [False, right[2] != mma_utils.Dim.K]
            registers = issue(registers, part, descriptor(right, k, deep), n, transposes)
        assembly("wgmma.commit_group.sync.aligned;")
        return array_of(IN_FLIGHT, (64, n), np.array(registers))

    a_type = WG if in_registers else _type(a)
    types = (a_type, _type(b)) + ((IN_FLIGHT,) if acc is not None else ())
    out = plgpu.ShapeDtypeStruct((64, n), jnp.float32, layout=IN_FLIGHT)
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(inline)(a, b, *(() if acc is None else (acc,)))


def sum_positions(staged, columns: int, ones, simulated: bool) -> jax.Array:
    """Sums over positions of 64 columns of a pair of ranks in shared memory (BLOCKS): [64, 8] by column and rank.

    A product, as `product` returns it. `ones` [8, ROWS] bfloat16 in shared memory: 1 where row k meets rank k, else 0.
    """
    staged = staged.at[:, :, columns]
    if simulated:
        v = staged[...].reshape(ROWS, 64).astype(jnp.float32)
        return jnp.dot(v.T, ones[...].astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    types = (plgpu.RefType((plgpu.SwizzleTransform(128),)), _type(ones))
    out = plgpu.ShapeDtypeStruct((64, 8), jnp.float32, layout=IN_FLIGHT)

    @plgpu.inline_mgpu(arg_types=types, return_type=out)
    def inline(ctx, a, b):
        a = mgpu.utils.memref_unsqueeze(mgpu.utils.memref_fold(a, 0, 2), 1)
        a, b = (mgpu.utils.memref_transpose(v, (1, 0, 3, 2)) for v in (a, b))
        left = mma_utils.create_descriptor(a, swizzle=128, group_size=(64, 64), logical_k_major=False, split_const=True)
        right = mma_utils.create_descriptor(b, swizzle=128, group_size=(64, 8), logical_k_major=True, split_const=True)
        registers = None
        nvvm.wgmma_fence_aligned()
        for k in range(0, ROWS, 16):
            registers = issue(registers, descriptor(left, k, 64), descriptor(right, k, 64), 8, [True, False])
        assembly("wgmma.commit_group.sync.aligned;")
        return array_of(IN_FLIGHT, (64, 8), np.array(registers))

    return inline(staged, ones)


def _matrix_shape(ref) -> tuple[int, int]:
    if len(ref.shape) == 2:
        return ref.shape
    if len(ref.shape) == 3:  # [2, T, w]
        return ref.shape[0] * ref.shape[1], ref.shape[2]
    return 16 * ref.shape[-5] * (ref.shape[0] if len(ref.shape) == 6 else 1), 128


def _matrix(ref) -> jax.Array:
    v = ref[...]
    if v.ndim > 3:
        v = jnp.swapaxes(v, -3, -2)
    return v.reshape(_matrix_shape(ref))


def _type(ref) -> plgpu.RefType:
    swizzle = plgpu.SwizzleTransform(min(128, 2 * ref.shape[-1]))
    return plgpu.RefType((plgpu.TilingTransform((8, 64)), swizzle) if len(ref.shape) == 2 else (swizzle,))


def _tiles(memory: ir.Value, width: int) -> ir.Value:
    """Shared memory as blocks of 8 rows: [rows / 8, columns / width, 8, width]."""
    shape = ir.MemRefType(memory.type).shape
    if len(shape) == 4:
        return memory
    if len(shape) == 3:
        memory = mgpu.utils.memref_fold(memory, 0, 2)
        return mgpu.utils.memref_unsqueeze(mgpu.utils.memref_unfold(memory, 0, (None, 8)), 1)
    return mgpu.utils.memref_fold(memory, 0, len(shape) - 3)
