"""What the Mosaic GPU kernels share: loads, phases, rotation and masks of one chunk.

Notation: a chunk has T = 64 positions, one warpgroup works on it. A [64, w] array lies in registers as the matrix units
leave it (WG): a thread has pairs of neighbouring columns in two rows. wgmma(acc, a, b) adds a @ b to acc and runs on by
itself until it is waited for.

Some pieces exist twice: in plain operations, which the interpreter takes, and by hand where the compiler takes more
instructions than needed (`simulated` chooses the plain ones).
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

T, N, P, S = 64, 128, 64, 32  # chunk, state width, head width, angles
HALF = N // 2  # of the state's coordinates: the first rotates, the second does not

# Rows of the coefficients of a chunk, float32 [T] each (prepare.py).
COEFFICIENTS = 6
DECAY, OTHER, OWN, STEP_HIGH, STEP_LOW, TO_END = range(COEFFICIENTS)

MULTIPROCESSORS = 132  # of a large Hopper GPU
WG = plgpu.Layout.WGMMA
PARAMETERS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
GRID = ("batch", "segment", "head")  # of kernels that walk a segment's chunks
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_MAGIC = 1.5 * 2.0**23  # adding it to |v| < 2^22 and taking it away again rounds v to an integer
_TWO_PI = 2 * math.pi


def tile(*shape: int) -> plgpu.SMEM:
    """bfloat16 in shared memory, laid out for the matrix units."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TRANSFORMS)


def rates_tile(*shape: int) -> plgpu.SMEM:
    """ω in its high and low parts, bfloat16 [2, T, S] of so many chunks, as `turn_apart` takes it."""
    transforms = (plgpu.TilingTransform((8, S)), plgpu.SwizzleTransform(64))
    return plgpu.SMEM((*shape, 2, T, S), jnp.bfloat16, transforms=transforms)


def rows(v: jax.Array, width: int) -> jax.Array:
    """[h] along rows → [h, width]."""
    return lax.broadcast_in_dim(v, (v.shape[0], width), (0,))


def cols(v: jax.Array, height: int) -> jax.Array:
    """[w] along columns → [height, w]."""
    return lax.broadcast_in_dim(v, (height, v.shape[0]), (1,))


def load_rows(ref, layout=WG) -> jax.Array:
    """A vector of shared memory, one element per row of arrays in `layout`."""
    return plgpu.load(ref, layout=layout.reduce(1), optimized=False)


def load_cols(ref, layout=WG) -> jax.Array:
    """A vector of shared memory, one element per column of arrays in `layout`."""
    return plgpu.load(ref, layout=layout.reduce(0), optimized=False)


def load_tile(ref, layout=WG) -> jax.Array:
    """[64, w] of shared memory, in another layout with another height."""
    return plgpu.load(ref, layout=layout)


def iotas() -> tuple[jax.Array, jax.Array]:
    """Row and column numbers, int32 [T, T]."""
    row = plgpu.broadcasted_iota(jnp.int32, (T, T), 0, layout=WG)
    column = plgpu.broadcasted_iota(jnp.int32, (T, T), 1, layout=WG)
    return row, column


def widen(v: jax.Array, simulated: bool, layout=WG) -> jax.Array:
    """bfloat16 in `layout` → float32, in two integer operations a pair (the compiler's own way takes three)."""
    if simulated:
        return v.astype(jnp.float32)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(v.shape, jnp.float32, layout=layout))
    def inline(ctx, array):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        sixteen, high = _int(16), _int(-65536)
        out = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            bits = vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), register), [], [0])
            first = arith.bitcast(f32, arith.shli(bits, sixteen))
            second = arith.bitcast(f32, arith.andi(bits, high))
            out[index] = vector.from_elements(ir.VectorType.get((2,), f32), [first, second])
        return type(array)(_registers=out, _layout=array.layout, _is_signed=None)

    return inline(v)


def turn(coefficients, start, rates, row: jax.Array, column: jax.Array, meanwhile, simulated: bool):
    """Cosine and sine [T, S] of the phases: that of the chunk's start plus Σ_{j ≤ i} Δ_j ω_j, in radians.

    The sum is a product of a triangle holding Δ with ω. Both come as two bfloat16 parts, off by 2^-17 of them, as is a
    step Δω. Cosine and sine reduce sums themselves, by a product that is off by as much as the sum's own rounding.
    `meanwhile` is called while the product runs; what it returns comes third.
    """
    high, low = _step_triangles(coefficients, row, column, simulated)

    def sum_steps(acc):
        plgpu.wgmma(acc, high, rates)
        plgpu.wgmma(acc, low, rates)
        done = meanwhile()
        return acc[...], done

    parts, done = pl.run_scoped(sum_steps, plgpu.ACC((T, 2 * S), jnp.float32))
    angle = (parts[:, :S] + parts[:, S:]) + cols(load_cols(start), T)
    return jnp.cos(angle), jnp.sin(angle), done


def turn_apart(
    coefficients, start, rates, row: jax.Array, column: jax.Array, meanwhile, simulated: bool, tight: bool = False
):
    """`turn` with the parts of ω apart, which takes half the accumulators, and without the product of the low parts.

    With `tight` the low parts of Δ take the registers of the high ones.
    """
    high, low = _step_triangles(coefficients, row, column, simulated)

    def sum_steps(acc):
        plgpu.wgmma(acc, high, rates.at[0])
        plgpu.wgmma(acc, high, rates.at[1])
        if tight:
            plgpu.wgmma_wait(0)
        plgpu.wgmma(acc, low, rates.at[0])
        done = meanwhile()
        return acc[...], done

    steps, done = pl.run_scoped(sum_steps, plgpu.ACC((T, S), jnp.float32))
    angle = steps + cols(load_cols(start), T)
    return jnp.cos(angle), jnp.sin(angle), done


def _step_triangles(coefficients, row: jax.Array, column: jax.Array, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Δ_j where i ≥ j, else 0, in its high and low parts: bfloat16 [T, T]."""
    causal = _causal_ones(row, column, simulated)
    parts = (load_cols(coefficients.at[k]).astype(jnp.bfloat16) for k in (STEP_HIGH, STEP_LOW))
    return tuple(causal * cols(part, T) for part in parts)


def cos_sin(angle: jax.Array, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Of radians, reduced to half a turn before."""
    turns = angle * (1 / _TWO_PI)
    turns = jnp.round(turns) if simulated else (turns + _MAGIC) - _MAGIC  # XLA would undo the latter
    angle = angle - turns * _TWO_PI
    return jnp.cos(angle), jnp.sin(angle)


def turning(raw, bias, cos: jax.Array, sin: jax.Array, simulated: bool) -> jax.Array:
    """The half of B or C that rotates, with its bias: bfloat16 [T, HALF]."""
    v = widen(load_tile(raw.at[:, pl.ds(0, HALF)]), simulated) + cols(load_cols(bias.at[0, pl.ds(0, HALF)]), T)
    real, imag = v[:, :S], v[:, S:]
    turned = [(real * cos - imag * sin).astype(jnp.bfloat16), (real * sin + imag * cos).astype(jnp.bfloat16)]
    return jnp.concatenate(turned, axis=1)


def resting(raw, bias) -> jax.Array:
    """The half that does not, with its bias in bfloat16, whose rounding is no larger than that of the sum."""
    return load_tile(raw.at[:, pl.ds(HALF, HALF)]) + cols(load_cols(bias), T)


def mixing(coefficients, row: jax.Array, column: jax.Array, from_start: jax.Array, simulated: bool) -> jax.Array:
    """What multiplies (C_i·B_j) x_j in y_i, float32 [T, T]: e^{L_i - L_j} s_j below the diagonal, γ_i on it, else 0."""
    below = rows(from_start, T) - cols(load_cols(coefficients.at[OTHER]), T)
    diagonal = cols(load_cols(coefficients.at[OWN]), T)
    return jnp.exp2(_causal_exponent(row, column, below, diagonal, simulated))


def pick(v: jax.Array, row: jax.Array, column: jax.Array, offset: int, simulated: bool) -> jax.Array:
    """Of row i of v, float32 [T, T], the element in column (i + offset) mod T; offset is a multiple of 8."""
    if simulated:
        return jnp.sum(jnp.where(column == lax.rem(row + offset, T), v, 0.0), axis=1)

    @plgpu.inline_mgpu(arg_types=(WG,) * 3, return_type=plgpu.ShapeDtypeStruct((T,), jnp.float32, layout=WG.reduce(1)))
    def inline(ctx, v, row, column):
        assert v.registers.shape[:5] == (1, T // 8, 1, 1, 2) and v.registers.size == T // 4, v.registers.shape
        layout = v.layout.reduce((1,))
        out = np.empty(layout.registers_shape((T,)), object)
        first, column = (vector.extract(r.registers.flat[0], [], [0]) for r in (row, column))
        warp, in_eight = arith.shrui(first, _int(4)), arith.andi(first, _int(7))
        odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(first, _int(1)), _int(0))
        of_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, _int(k)) for k in range(3)]
        # Four threads share eight columns; of a row's, the one with column i mod 8 has it.
        lane = arith.addi(arith.muli(in_eight, _int(4)), arith.shrui(in_eight, _int(1)))
        for half, (place, _) in enumerate(np.ndenumerate(out)):
            picked = None
            for k in reversed(range(4)):
                register = v.registers[(0, (2 * k + half + offset // 8) % (T // 8), 0, 0, half)].flat[0]
                picked = register if picked is None else arith.select(of_warp[k], register, picked)
            one = arith.select(odd, *(vector.extract(picked, [], [element]) for element in (1, 0)))
            one = nvvm.shfl_sync(_int(-1), one, lane, _int(31), nvvm.ShflKind.idx)
            out[place] = vector.from_elements(ir.VectorType.get((1,), ir.F32Type.get()), [one])
        return type(v)(_registers=out, _layout=layout, _is_signed=None)

    return inline(v, row, column)


def stash(ref, v: jax.Array, simulated: bool) -> None:
    """float32 [64, w] to shared memory of that shape, in an order that only `unstash` understands.

    Every thread gets back its own numbers, or a thread of another warpgroup those of its like.
    """
    if simulated:
        ref[...] = v
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WG))
    def inline(ctx, ref, array):
        pairs = [(vector.extract(r, [], [0]), vector.extract(r, [], [1])) for r in array.registers.flat]
        four = ir.VectorType.get((4,), ir.F32Type.get())
        for first, second, at in zip(pairs[::2], pairs[1::2], _places(ref), strict=True):
            llvm.store(vector.from_elements(four, [*first, *second]), at, alignment=16)

    inline(ref, v)


def unstash(ref, simulated: bool) -> jax.Array:
    """What `stash` put there."""
    if simulated:
        return load_tile(ref)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(ref.shape, jnp.float32, layout=WG)
    )
    def inline(ctx, ref):
        f32 = ir.F32Type.get()
        two, four = (ir.VectorType.get((n,), f32) for n in (2, 4))
        registers = []
        for at in _places(ref):
            numbers = llvm.load(four, at, alignment=16)
            numbers = [vector.extract(numbers, [], [k]) for k in range(4)]
            registers += [vector.from_elements(two, numbers[:2]), vector.from_elements(two, numbers[2:])]
        layout = WG.to_mgpu()
        shape = layout.registers_shape(tuple(ir.MemRefType(ref.type).shape))
        out = np.empty(shape, object)
        out.flat = registers
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return inline(ref)


def _places(ref) -> list[ir.Value]:
    """Addresses of this thread's fours of numbers in shared memory: of neighbouring threads, neighbouring ones."""
    size = math.prod(ir.MemRefType(ref.type).shape)
    i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.F32Type.get())
    thread = arith.andi(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), _int(127))
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [thread], four)
    return [mgpu.utils.getelementptr(base, [first], four) for first in range(0, size // 4, 128)]


def publish(simulated: bool) -> None:
    """Makes this thread's stores to shared memory visible to copies and products; a barrier has to follow."""
    if simulated:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def inline(ctx):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    inline()


def meet(simulated: bool, warpgroup: int | None = None) -> None:
    """A barrier of the warpgroup; `warpgroup`: its number, if it is known, which takes fewer instructions."""
    if simulated:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def inline(ctx):
        if warpgroup is None:
            mgpu.warpgroup_barrier()
        else:
            code = f"bar.sync {warpgroup + 1}, 128;"  # the number that jax gives it, too
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], code, "", has_side_effects=True)

    inline()


def read_out(simulated: bool, warpgroup: int) -> None:
    """Waits until copies from shared memory have read it, and for the warpgroup."""
    if simulated:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return

    @plgpu.inline_mgpu()
    def inline(ctx):
        nvvm.cp_async_bulk_wait_group(0, read=True)

    inline()
    meet(simulated, warpgroup)


def opaque_zero(simulated: bool) -> jax.Array:
    """0, of which the compiler's optimizer does not know; what translates its result to machine code does."""
    if simulated:
        return jnp.int32(0)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def inline(ctx):
        i32 = ir.IntegerType.get_signless(32)
        zero = llvm.inline_asm(i32, [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(zero, shape=(), is_signed=True)

    return inline()


def hidden(number: int) -> ir.Value:
    """The number as an int32 of which neither compiler nor assembler know the value, so that it stays in a register.

    What is added to it is 0, which they cannot tell: a grid's second axis is shorter than 2^16.
    """
    i32 = ir.IntegerType.get_signless(32)
    code = f"{{ .reg .b32 v; mov.u32 v, %nctaid.y; shr.u32 v, v, 16; add.u32 $0, v, {number}; }}"
    return llvm.inline_asm(i32, [], code, "=r", has_side_effects=True)


def uniform(v: jax.Array, simulated: bool) -> jax.Array:
    """An int32 that is the same in all threads, which the compiler does not know of what was loaded."""
    if simulated:
        return v
    out = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=out)
    def inline(ctx, v):
        first = nvvm.shfl_sync(_int(-1), v.registers.flat[0], _int(0), _int(31), nvvm.ShflKind.idx)
        return mgpu.FragmentedArray.splat(first, shape=(), is_signed=True)

    return inline(v)


def _int(value: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


class _Below:
    """Whether i - j ≥ bound at an element of a [T, T] array, compared once per distinct bound of a thread.

    A thread's registers are [1, k, 1, 1, r, ...]: column block of 8, half of 16 rows; each holds two columns.
    """

    def __init__(self, row, column):
        assert row.registers.shape[:5] == (1, T // 8, 1, 1, 2) and row.registers.size == T // 4, row.registers.shape
        first = [vector.extract(v.registers.flat[0], [], [0]) for v in (row, column)]
        self._difference = arith.subi(*first)  # of this thread's first element
        self._made = {}

    def __call__(self, index: tuple[int, ...], element: int, bound: int) -> ir.Value:
        bound += 8 * index[1] + element - 8 * index[4]
        if bound not in self._made:
            self._made[bound] = arith.cmpi(arith.CmpIPredicate.sge, self._difference, _int(bound))
        return self._made[bound]


def _causal_ones(row: jax.Array, column: jax.Array, simulated: bool) -> jax.Array:
    """bfloat16 [T, T]: 1 where i ≥ j, else 0."""
    if simulated:
        return jnp.where(row >= column, 1.0, 0.0).astype(jnp.bfloat16)

    @plgpu.inline_mgpu(arg_types=(WG, WG), return_type=plgpu.ShapeDtypeStruct((T, T), jnp.bfloat16, layout=WG))
    def inline(ctx, row, column):
        below = _Below(row, column)
        both, first, neither = (_int(v) for v in (0x3F803F80, 0x3F80, 0))
        out = np.empty_like(row.registers)
        for index, _ in np.ndenumerate(row.registers):
            bits = arith.select(below(index, 0, 0), first, neither)
            bits = arith.select(below(index, 1, 0), both, bits)
            bits = vector.from_elements(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), [bits])
            out[index] = vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), bits)
        return type(row)(_registers=out, _layout=row.layout, _is_signed=None)

    return inline(row, column)


def _causal_exponent(row, column, below: jax.Array, diagonal: jax.Array, simulated: bool) -> jax.Array:
    """float32 [T, T]: `below` where i > j, `diagonal` where i = j, else -inf."""
    if simulated:
        return jnp.where(row > column, below, jnp.where(row == column, diagonal, -jnp.inf))

    @plgpu.inline_mgpu(arg_types=(WG,) * 4, return_type=plgpu.ShapeDtypeStruct((T, T), jnp.float32, layout=WG))
    def inline(ctx, row, column, low, diagonal):
        f32 = ir.F32Type.get()
        below = _Below(row, column)
        never = arith.constant(f32, ir.FloatAttr.get(f32, -math.inf))
        out = np.empty_like(low.registers)
        for index, _ in np.ndenumerate(low.registers):
            pair = []
            for element in range(2):
                strict, own = (vector.extract(v.registers[index], [], [element]) for v in (low, diagonal))
                own = arith.select(below(index, element, 0), own, never)
                pair.append(arith.select(below(index, element, 1), strict, own))
            out[index] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return type(row)(_registers=out, _layout=low.layout, _is_signed=None)

    return inline(row, column, below, diagonal)


def accumulate(add, start: tuple[jax.Array, ...], simulated: bool) -> tuple[jax.Array, ...]:
    """add(accumulators, read) issues products onto accumulators that begin as `start`; returns them when all are done.

    read(k, n) gives accumulator k once at most n groups of products are in flight. The interpreter's begin at 0.
    """

    def with_start(accs):
        add(accs, lambda k, n: plgpu.wgmma_accumulator_load(accs[k], wait_n=n))

    def from_zero(*accs):
        add(accs, lambda k, n: plgpu.wgmma_accumulator_load(accs[k], wait_n=n) + start[k])
        return tuple(acc[...] + v for acc, v in zip(accs, start, strict=True))

    if simulated:
        return pl.run_scoped(from_zero, *(plgpu.ACC(v.shape, jnp.float32) for v in start))
    return pl.run_state(with_start)(tuple(plgpu.ACC.init(v) for v in start))
