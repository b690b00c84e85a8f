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
from jaxlib.mlir.dialects import arith, llvm, vector

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


def send_partial(sums, total: jax.Array, simulated: bool) -> None:
    """Half of the sums over a pair of ranks, [32, P], to the warp with the other pair; `sums`: 4 KiB."""
    if simulated:
        sums[...] = total[:16]
        return

    @plgpu.inline_mgpu(arg_types=(_type(sums), POS))
    def inline(ctx, sums, total):
        four, at = ir.VectorType.get((4,), ir.F32Type.get()), _own_place(sums, 0)
        upper, registers = has_upper_pair(), list(total.registers.flat)
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
        arg_types=(plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))), _type(sums), POS)
    )
    def inline(ctx, y, sums, total):
        i32, i8, f32, bf16 = *(ir.IntegerType.get_signless(k) for k in (32, 8)), ir.F32Type.get(), ir.BF16Type.get()
        c = mgpu.utils.c
        two, four, at = ir.VectorType.get((2,), f32), ir.VectorType.get((4,), f32), _own_place(sums, 64)
        upper, registers = has_upper_pair(), list(total.registers.flat)
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


def _type(sums) -> plgpu.RefType:
    """Of memory for partial sums, which may be that of something else: float32 [16, 64], or a bfloat16 tile."""
    if sums.dtype == jnp.float32:
        return plgpu.RefType()
    return plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def has_upper_pair() -> ir.Value:
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
