"""What the Mosaic GPU kernels for MIMO need besides pieces.py: rows of all ranks, and sums over them.

Notation: a chunk has 64 rows, all R = 2 or 4 ranks of T = 64 / R positions. Row 16 v + 8 k + i of a [64, w] array as
the matrix units leave it (WG) is rank k of a pair, position 8 v + i at 2 ranks; at 4, the lower 32 rows have the first
pair and the others the second, each of 16 positions. So a thread has both ranks of a pair at its position: what
depends on the position alone exists once, and sums over a pair are sums of a thread's own numbers. One rank of every
pair is a [32, w] array, in which a thread has pairs of neighbouring columns in one row (POS): a row per position at 2
ranks; at 4 every position twice, which the same warps have once more as [16, w].

Shared memory holds rows in the same order: B and C, [64, 128], in blocks of 8 rows and 64 columns, [4, 2, 2, 8, 64] by
v, k, columns, i and column (BLOCKS).

What is written by hand has a plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from .pieces import WG
from .wgmma import array_of

ROWS = 64  # of a chunk
HALF_ROWS = ROWS // 2  # one rank of every pair
RANKS = 4  # at most
BLOCKS = (4, 2, 2, 8, 64)

POS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# With 4 ranks: of 16 positions, each of which two warps have.
_HALF_POS = plgpu.Layout.TILED(
    fragmented_array.Tiling(((16, 8), (8, 8), (2,))), warp_dims=(fragmented_array.Replicated(2), -5),
    lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip


def positions(ranks: int) -> int:
    """Of a chunk."""
    return ROWS // ranks


def positions_layout(ranks: int):
    """Of arrays with a row per position of a chunk."""
    return POS if ranks == 2 else _HALF_POS


def iotas(zero: jax.Array, ranks: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of an array with a row and a column per position, int32."""
    shape, layout = (positions(ranks),) * 2, positions_layout(ranks)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + zero
    return row, plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)


def spread(v: jax.Array, simulated: bool) -> jax.Array:
    """A row per position, [T, w] → per position and pair of ranks, [32, w]. No instruction."""
    if v.shape[0] == HALF_ROWS:
        return v
    if simulated:
        return jnp.concatenate([v, v])
    out = plgpu.ShapeDtypeStruct((HALF_ROWS, v.shape[1]), v.dtype, layout=POS)
    return plgpu.inline_mgpu(arg_types=(_HALF_POS,), return_type=out)(
        lambda ctx, v: array_of(POS, out.shape, v.registers)
    )(v)


def blocks(*shape: int) -> plgpu.SMEM:
    """B or C of a chunk."""
    return plgpu.SMEM((*shape, *BLOCKS), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))


def column_blocks(v: jax.Array) -> list[jax.Array]:
    """[.., w] in parts of eight columns."""
    return [v[:, k : k + 8] for k in range(0, v.shape[1], 8)]


def positions_of_columns(count: int) -> list[int]:
    """Of every eight rows of a chunk of `count` positions: which eight positions they have."""
    return [(k // 2) % (count // 8) for k in range(8)]


def ranks_of_columns(ranks: int) -> list[tuple[int, int]]:
    """Of every eight rows of a chunk: their rank, and which eight positions they have."""
    span = positions(ranks)
    return [(2 * (k // (span // 4)) + k % 2, at) for k, at in enumerate(positions_of_columns(span))]


def join(first: jax.Array, second: jax.Array, simulated: bool) -> jax.Array:
    """Both ranks of pairs, [32, w] each → [ROWS, w] as the matrix units take it. No instruction."""
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
        return tuple(v.reshape(4, 2, 8, -1)[:, half].reshape(HALF_ROWS, -1) for half in range(2))
    out = plgpu.ShapeDtypeStruct((HALF_ROWS, v.shape[1]), v.dtype, layout=POS)

    @plgpu.inline_mgpu(arg_types=(WG,), return_type=(out, out))
    def inline(ctx, array):
        return tuple(array_of(POS, out.shape, array.registers[0, :, 0, 0, half]) for half in range(2))

    return inline(v)


def load_pair(ref, columns: int, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """64 columns of B or C in shared memory (BLOCKS): both ranks of pairs, [32, 64] each."""
    ref = ref.at[:, :, columns]
    if simulated:
        v = ref[...]  # [4, 2, 8, 64]
        return v[:, 0].reshape(HALF_ROWS, 64), v[:, 1].reshape(HALF_ROWS, 64)
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


def has_upper_pair() -> ir.Value:
    """Whether this thread's rows are of the second pair of ranks."""
    i32 = ir.IntegerType.get_signless(32)
    bit = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(64, i32))
    return arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.utils.c(0, i32))


def unspread(v: jax.Array, ranks: int, simulated: bool) -> jax.Array:
    """The converse of `spread`, of what every pair has the same of: [32, w] → [T, w]. No instruction."""
    if ranks == 2:
        return v
    if simulated:
        return v[: positions(ranks)]
    out = plgpu.ShapeDtypeStruct((positions(ranks), v.shape[1]), v.dtype, layout=_HALF_POS)
    return plgpu.inline_mgpu(arg_types=(POS,), return_type=out)(
        lambda ctx, v: array_of(_HALF_POS, out.shape, v.registers)
    )(v)


def add_counted(out, v: jax.Array | None, simulated: bool) -> None:
    """Adds v [64, 8] (WG) to `out` [2, 64, RANKS] in global memory, its columns in two halves; None: sets `out` to 0.

    A number is always added by the same thread, so the order of additions is that of the program.
    """
    if simulated:
        out[...] = jnp.zeros(out.shape) if v is None else out[...] + jnp.stack(jnp.split(v, 2, axis=1))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(() if v is None else (WG,))))
    def inline(ctx, out, *v):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        c, two = mgpu.utils.c, ir.VectorType.get((2,), f32)
        thread = arith.andi(mgpu.utils.thread_idx(), c(127, i32))
        columns = arith.andi(thread, c(3, i32))  # two of eight: four threads have a row
        in_warp = arith.andi(arith.shrui(thread, c(2, i32)), c(7, i32))
        row = arith.addi(in_warp, arith.muli(arith.shrui(thread, c(5, i32)), c(16, i32)))
        row = arith.addi(row, arith.muli(arith.shrui(columns, c(1, i32)), c(64, i32)))
        at = arith.addi(arith.muli(row, c(RANKS // 2, i32)), arith.andi(columns, c(1, i32)))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [at], two)
        code = f"{'red.global.add' if v else 'st.global'}.v2.f32 [$0], {{$1, $2}};"
        for k in range(2):
            place = mgpu.utils.getelementptr(pointer, [8 * k * (RANKS // 2)], two)
            numbers = [vector.extract(v[0].registers.flat[k], [], [e]) if v else c(0.0, f32) for e in range(2)]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"), [place, *numbers], code, "l,f,f,~{memory}", has_side_effects=True
            )

    inline(out, *(() if v is None else (v,)))


def add_of_ranks(out, parts: list[jax.Array] | None, simulated: bool) -> None:
    """Adds to `out` [64, RANKS] in global memory, for every rank, sums along rows of [64, 8] (WG); None: sets it to 0.

    A number is always added by the same thread, as by `add_counted`.
    """
    if simulated:
        v = jnp.zeros(out.shape) if parts is None else jnp.stack([jnp.sum(v, axis=1) for v in parts], axis=1)
        out[...] = v if parts is None else out[...] + jnp.pad(v, ((0, 0), (0, RANKS - len(parts))))
        return
    parts = parts or []

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(WG for _ in parts)))
    def inline(ctx, out, *parts):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        c = mgpu.utils.c
        thread = arith.andi(mgpu.utils.thread_idx(), c(127, i32))
        rank = arith.andi(thread, c(3, i32))  # four threads have a row, each of them a rank
        row = arith.addi(arith.andi(arith.shrui(thread, c(2, i32)), c(7, i32)),
                         arith.muli(arith.shrui(thread, c(5, i32)), c(16, i32)))  # fmt: skip
        at = arith.addi(arith.muli(row, c(RANKS, i32)), rank)
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [at], f32)
        code = f"{'red.global.add' if parts else 'st.global'}.f32 [$0], $1;"
        high = [arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, c(k, i32)), c(0, i32)) for k in (1, 2)]
        for half in range(2):
            sums = []
            for v in parts:
                pair = v.registers.flat[half]
                sums.append(arith.addf(*(vector.extract(pair, [], [e]) for e in range(2))))
            number = c(0.0, f32)
            if sums:
                if len(sums) == 2:  # both halves of the threads have both
                    sums = [arith.addf(v, _other(v, 2)) for v in sums]
                else:
                    sums = [_shared(*pair, high[1], 2) for pair in zip(sums[:2], sums[2:], strict=True)]
                number = _shared(*sums, high[0], 1)
                if len(parts) == 2:
                    number = arith.select(high[1], c(0.0, f32), number)
            place = mgpu.utils.getelementptr(pointer, [8 * half * RANKS], f32)
            void = ir.Type.parse("!llvm.void")
            llvm.inline_asm(void, [place, number], code, "l,f,~{memory}", has_side_effects=True)

    inline(out, *parts)


def _other(v: ir.Value, distance: int) -> ir.Value:
    """What the thread has whose number differs in one bit."""
    i32, c = ir.IntegerType.get_signless(32), mgpu.utils.c
    return nvvm.shfl_sync(c(-1, i32), v, c(distance, i32), c(31, i32), nvvm.ShflKind.bfly)


def _shared(low: ir.Value, high: ir.Value, is_high: ir.Value, distance: int) -> ir.Value:
    """Of two numbers that two threads have, the sum of one: of the latter in that of which `is_high` is true."""
    own, gone = arith.select(is_high, high, low), arith.select(is_high, low, high)
    return arith.addf(own, _other(gone, distance))


def store_diagonal(out, blocks: list[jax.Array], simulated: bool) -> None:
    """To `out` [32] in global memory, of every row the number in the column of its own number.

    blocks: columns in parts of eight, [32, 8] each (POS), which start again if there are fewer than 32. The eight rows
    of a warp find theirs in one part, two of them in a thread's two columns.
    """
    if simulated:
        row = jnp.arange(HALF_ROWS)
        out[...] = jnp.concatenate(blocks, axis=1)[row, row % (8 * len(blocks))]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(POS for _ in blocks)))
    def inline(ctx, out, *blocks):
        i32, c, ne = ir.IntegerType.get_signless(32), mgpu.utils.c, arith.CmpIPredicate.ne
        thread = arith.andi(mgpu.utils.thread_idx(), c(127, i32))
        row, columns = arith.shrui(thread, c(2, i32)), arith.andi(thread, c(3, i32))
        is_odd = arith.cmpi(ne, arith.andi(row, c(1, i32)), c(0, i32))
        numbers = [[vector.extract(v.registers.flat[0], [], [e]) for e in (1, 0)] for v in blocks]
        numbers = [arith.select(is_odd, *pair) for pair in numbers]
        for bit in range(len(numbers).bit_length() - 1):
            upper = arith.cmpi(ne, arith.andi(row, c(8 << bit, i32)), c(0, i32))
            numbers = [arith.select(upper, b, a) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        apart = arith.xori(arith.andi(arith.shrui(row, c(1, i32)), c(3, i32)), columns)
        place = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [row], ir.F32Type.get())
        code = "{ .reg .pred p; setp.eq.s32 p, $2, 0; @p st.global.f32 [$0], $1; }"
        operands, void = [place, numbers[0], apart], ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, code, "l,f,r,~{memory}", has_side_effects=True)

    inline(out, *blocks)


def store_row(out, v: jax.Array, simulated: bool) -> None:
    """A row of v [32, S], whose rows are all the same, to `out` [S] in global memory; every thread stores its part."""
    if simulated:
        out[...] = v[0]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), POS))
    def inline(ctx, out, v):
        i32 = ir.IntegerType.get_signless(32)
        columns = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(3, i32))
        two = ir.VectorType.get((2,), ir.F32Type.get())
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [columns], two)
        for k, pair in enumerate(v.registers.flat):
            llvm.store(pair, mgpu.utils.getelementptr(pointer, [4 * k], two), alignment=8)

    inline(out, v)
