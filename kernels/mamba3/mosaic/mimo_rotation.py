"""Phases and rotation in the MIMO forward's main kernel, where a thread has the same columns and ranks all along.

Notation as in mimo_pieces.py. So it keeps the biases of its rows. A warpgroup finds the phases of one head and leaves
cosines and sines in shared memory, from which two take them, each for one of B and C. Of 128 threads, eight have a
row: four angles each (8 bytes of both halves of what rotates) and eight columns of the rest (16 bytes).

What is written by hand has a plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from .mimo_pieces import BLOCKS, HALF_ROWS, POS, has_upper_pair
from .mimo_weights import HALVES, by_column, unpack_biases
from .pieces import HALF, WG, N, P, S
from .wgmma import array_of

_CARRIED = (64, 64)  # bfloat16 in WG: 16 words of a thread


def own_angles(v: jax.Array, ranks: int, simulated: bool) -> jax.Array:
    """[32, S]; of positions that two warps have, each keeps half of the angles: [32, S / 2]."""
    if ranks == 2:
        return v
    half = v.shape[1] // 2
    if simulated:
        return jnp.concatenate([v[:16, :half], v[16:, half:]])

    out = plgpu.ShapeDtypeStruct((v.shape[0], half), v.dtype, layout=POS)

    @plgpu.inline_mgpu(arg_types=(POS,), return_type=out)
    def inline(ctx, v):
        upper, registers = has_upper_pair(), list(v.registers.flat)
        pairs = zip(registers[: len(registers) // 2], registers[len(registers) // 2 :], strict=True)
        return array_of(POS, out.shape, np.array([arith.select(upper, b, a) for a, b in pairs]))

    return inline(v)


def store_turns(ref, cos: jax.Array, sin: jax.Array, ranks: int, simulated: bool) -> None:
    """Cosines and sines of `own_angles` to [T, S], int32 of two float16 each.

    Rounded to 2^-12 they are off by an eighth of what bfloat16 is.
    """
    if simulated:
        both = jnp.stack([cos, sin], axis=-1).astype(jnp.float16)
        if ranks == 4:
            both = jnp.concatenate([both[:16], both[16:]], axis=1)
        ref[...] = lax.bitcast_convert_type(both, jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), POS, POS))
    def inline(ctx, ref, cos, sin):
        i32, i8, f32, f16 = *(ir.IntegerType.get_signless(k) for k in (32, 8)), ir.F32Type.get(), ir.F16Type.get()
        c, thread = mgpu.utils.c, mgpu.utils.thread_idx()
        in_eight, warps = _bits(thread, 2, 3), 1 if ranks == 4 else 2
        position = arith.addi(in_eight, arith.muli(_bits(thread, 5, warps), c(8, i32)))
        base = arith.addi(arith.muli(position, c(128, i32)), arith.muli(_bits(thread, 0, 2), c(8, i32)))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [base], i8)
        flip = arith.andi(in_eight, c(3, i32))
        if ranks == 4:
            flip = arith.xori(flip, arith.muli(_bits(thread, 6, 1), c(2, i32)))
        for k, pair in enumerate(zip(cos.registers.flat, sin.registers.flat, strict=True)):
            numbers = []
            for e in range(2):
                both = vector.from_elements(ir.VectorType.get((2,), f32), [vector.extract(r, [], [e]) for r in pair])
                both = arith.truncf(ir.VectorType.get((2,), f16), both)
                numbers.append(vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), both), [], [0]))
            at = arith.muli(arith.xori(flip, c(k, i32)), c(32, i32))
            at = mgpu.utils.getelementptr(pointer, [at], i8)
            llvm.store(vector.from_elements(ir.VectorType.get((2,), i32), numbers), at, alignment=8)

    inline(ref, cos, sin)


def load_turns(ref, ranks: int, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines that `store_turns` put there, of every position and pair of ranks: [32, S] each."""
    if simulated:
        both = lax.bitcast_convert_type(ref[...], jnp.float16).astype(jnp.float32)
        return tuple(jnp.concatenate([both[..., k]] * (ranks // 2)) for k in range(2))
    out = plgpu.ShapeDtypeStruct((HALF_ROWS, S), jnp.float32, layout=POS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def inline(ctx, ref):
        i32, i8, f32 = *(ir.IntegerType.get_signless(k) for k in (32, 8)), ir.F32Type.get()
        c, thread, two = mgpu.utils.c, mgpu.utils.thread_idx(), ir.VectorType.get((2,), f32)
        in_eight, warps = _bits(thread, 2, 3), 1 if ranks == 4 else 2
        position = arith.addi(in_eight, arith.muli(_bits(thread, 5, warps), c(8, i32)))
        base = arith.addi(arith.muli(position, c(128, i32)), arith.muli(_bits(thread, 0, 2), c(8, i32)))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [base], i8)
        flip, found = arith.andi(in_eight, c(3, i32)), ([], [])
        for k in range(S // 8):
            at = mgpu.utils.getelementptr(pointer, [arith.muli(arith.xori(flip, c(k, i32)), c(32, i32))], i8)
            for numbers, registers in zip(_unpacked(at, 2), found, strict=True):
                registers.append(vector.from_elements(two, numbers))
        return tuple(array_of(POS, out.shape, np.array(v)) for v in found)

    return inline(ref)


def load_biases(ref, matrix: jax.Array, ranks: int, simulated: bool, words: int = 1) -> jax.Array:
    """Biases of a head's B (0) or C (1) that a thread needs. `ref`: of one head, from `mimo_weights.pack`.

    `words`: that are read at once, up to 4; then they take registers in a row, which biases that are kept should not.
    """
    if simulated:
        halves = [jnp.stack([unpack_biases(ref[rank, k])[matrix] for rank in range(ranks)]) for k in range(HALVES)]
        return jnp.concatenate([by_column(halves[0]), halves[1]], axis=1)
    out = plgpu.ShapeDtypeStruct(_CARRIED, jnp.bfloat16, layout=WG)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=out)
    def inline(ctx, memory, matrix):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        c, thread = mgpu.utils.c, mgpu.utils.thread_idx()
        at = arith.muli(matrix.registers.flat[0], c(2 * P, i32))
        if ranks == 4:
            at = arith.addi(at, arith.muli(_bits(thread, 6, 1), c(2 * 4 * P * HALVES, i32)))
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(memory))
        pointer = mgpu.utils.getelementptr(pointer, [at], i8)
        pointer = mgpu.utils.getelementptr(pointer, [arith.muli(_bits(thread, 0, 3), c(16, i32))], i8)
        places = [4 * P * (HALVES * k + half) for k in range(2) for half in range(HALVES)]
        places = [at + 4 * k for at in places for k in range(0, 4, words)]
        registers = [v for at in places for v in _load(mgpu.utils.getelementptr(pointer, [at], i8), words)]
        return array_of(WG, _CARRIED, np.array(registers))

    return inline(ref, matrix)


def rotate_rows(raws: list, outs: list, biases: list[jax.Array], turns: list, ranks: int, simulated: bool) -> None:
    """B or C of a chunk with biases, rotated, as often as there are `outs`.

    Raw rows or turns that are given several times are read once.
    """
    if simulated:
        for raw, out, bias, turn in zip(raws, outs, biases, turns, strict=True):
            out[...] = _rotated(raw[...], bias, turn[...], ranks)
        return
    (raws, of_raw), (turns, of_turn) = _once(raws), _once(turns)
    blocks = plgpu.RefType((plgpu.SwizzleTransform(128),))
    types = (blocks,) * (len(raws) + len(outs)) + (plgpu.RefType(),) * len(turns) + (WG,) * len(outs)

    @plgpu.inline_mgpu(arg_types=types)
    def inline(ctx, *given):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        c, thread, pointer = mgpu.utils.c, mgpu.utils.thread_idx(), mgpu.utils.getelementptr
        count, last = len(raws) + len(outs), len(raws) + len(outs) + len(turns)
        turns_here, biases = given[count:last], given[last:]
        part, pair = _bits(thread, 0, 3), _bits(thread, 6, 1)
        # Rows that differ by four are in the same half warp, where their 8 bytes are in different banks.
        row = arith.addi(arith.muli(_bits(thread, 3, 1), c(4, i32)), _bits(thread, 4, 1))
        row = arith.addi(row, arith.muli(_bits(thread, 5, 1), c(2, i32)))
        first = arith.addi(arith.muli(pair, c(2 * 4096, i32)), arith.muli(row, c(128, i32)))
        real = arith.muli(arith.xori(_bits(thread, 1, 2), row), c(16, i32))
        real = arith.addi(real, arith.muli(_bits(thread, 0, 1), c(8, i32)))
        rest = arith.addi(arith.muli(arith.xori(part, row), c(16, i32)), c(1024, i32))
        places = [arith.addi(first, v) for v in (real, arith.xori(real, c(64, i32)), rest)]
        at = arith.muli(arith.xori(part, arith.muli(arith.andi(row, c(3, i32)), c(2, i32))), c(16, i32))
        at = arith.addi(at, arith.muli(row, c(128, i32)))
        if ranks == 2:
            at = arith.addi(at, arith.muli(pair, c(2048, i32)))
        matrices = [[pointer(mgpu.utils.memref_ptr(v), [at], i8) for at in places] for v in given[:count]]
        sources, targets = matrices[: len(raws)], matrices[len(raws) :]
        turns_here = [pointer(mgpu.utils.memref_ptr(v), [at], i8) for v in turns_here]
        for j in range(2):
            both = [_unpacked(pointer(v, [1024 * j], i8)) for v in turns_here]
            for k in range(2):
                offset = 4096 * j + 2048 * k
                loaded = [
                    [
                        v
                        for place, words in zip(source, (2, 2, 4), strict=True)
                        for v in _load(pointer(place, [offset], i8), words)
                    ]
                    for source in sources
                ]
                for to, bias, raw, turn in zip(targets, biases, of_raw, of_turn, strict=True):
                    words, (cos, sin) = list(bias.registers.flat)[8 * k : 8 * k + 8], both[turn]
                    added = [arith.addf(a, b) for a, b in zip(loaded[raw], words, strict=True)]
                    wide = [number for v in added[:4] for number in _widened(v)]
                    four = list(zip(wide[:4], wide[4:], cos, sin, strict=True))
                    turned = [
                        [math.fma(r, x, arith.negf(arith.mulf(i, y))) for r, i, x, y in four],
                        [math.fma(r, y, arith.mulf(i, x)) for r, i, x, y in four],
                    ]
                    for v, numbers in zip(to, [*map(_narrowed, turned), added[4:]], strict=True):
                        _store(pointer(v, [offset], i8), numbers)

    inline(*raws, *outs, *turns, *biases)


def _once(given: list) -> tuple[list, list[int]]:
    """What is given, once each, and the number of each one there."""
    found = list({id(v): v for v in given}.values())
    return found, [next(k for k, one in enumerate(found) if one is v) for v in given]


def _rotated(raw: jax.Array, biases: jax.Array, turns: jax.Array, ranks: int) -> jax.Array:
    v, k, i = (lax.broadcasted_iota(jnp.int32, (4, 2, 8), axis) for axis in range(3))
    rank, position = (k, 8 * v + i) if ranks == 2 else (2 * (v // 2) + k, 8 * (v % 2) + i)
    rows = jnp.swapaxes(raw, 2, 3).reshape(4, 2, 8, N) + biases[rank]
    both = lax.bitcast_convert_type(turns, jnp.float16).astype(jnp.float32)[position]
    cos, sin = both[..., 0], both[..., 1]
    real, imag = rows[..., :S].astype(jnp.float32), rows[..., S:HALF].astype(jnp.float32)
    parts = (v.astype(jnp.bfloat16) for v in (real * cos - imag * sin, real * sin + imag * cos))
    rows = jnp.concatenate([*parts, rows[..., HALF:]], axis=-1)
    return jnp.swapaxes(rows.reshape(4, 2, 8, 2, 64), 2, 3).reshape(BLOCKS)


def _bits(v: ir.Value, first: int, count: int) -> ir.Value:
    i32, c = ir.IntegerType.get_signless(32), mgpu.utils.c
    return arith.andi(arith.shrui(v, c(first, i32)), c(2**count - 1, i32))


def _load(pointer: ir.Value, words: int) -> list[ir.Value]:
    """Pairs of bfloat16."""
    i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    loaded = llvm.load(ir.VectorType.get((words,), i32), pointer, alignment=4 * words)
    one = ir.VectorType.get((1,), i32)
    return [vector.bitcast(two, vector.extract_strided_slice(one, loaded, [k], [1], [1])) for k in range(words)]


def _store(pointer: ir.Value, pairs: list[ir.Value]) -> None:
    i32 = ir.IntegerType.get_signless(32)
    words = [vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), v), [], [0]) for v in pairs]
    llvm.store(vector.from_elements(ir.VectorType.get((len(words),), i32), words), pointer, alignment=4 * len(words))


def _unpacked(pointer: ir.Value, count: int = 4) -> tuple[list[ir.Value], list[ir.Value]]:
    """Cosines and sines of so many angles."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    two, halves = ir.VectorType.get((2,), f32), ir.VectorType.get((2,), ir.F16Type.get())
    loaded = llvm.load(ir.VectorType.get((count,), i32), pointer, alignment=4 * count)
    one = ir.VectorType.get((1,), i32)
    pairs = [
        arith.extf(two, vector.bitcast(halves, vector.extract_strided_slice(one, loaded, [k], [1], [1])))
        for k in range(count)
    ]
    return tuple([vector.extract(v, [], [e]) for v in pairs] for e in range(2))


def _widened(pair: ir.Value) -> list[ir.Value]:
    """As `pieces.widen`."""
    i32, f32, c = ir.IntegerType.get_signless(32), ir.F32Type.get(), mgpu.utils.c
    bits = vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), pair), [], [0])
    high = arith.constant(i32, ir.IntegerAttr.get(i32, -65536))
    return [arith.bitcast(f32, arith.shli(bits, c(16, i32))), arith.bitcast(f32, arith.andi(bits, high))]


def _narrowed(numbers: list[ir.Value]) -> list[ir.Value]:
    """In pairs of bfloat16."""
    f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
    pairs = [vector.from_elements(ir.VectorType.get((2,), f32), numbers[k : k + 2]) for k in range(0, len(numbers), 2)]
    return [arith.truncf(ir.VectorType.get((2,), bf16), v) for v in pairs]
