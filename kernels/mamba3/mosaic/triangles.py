"""Triangles of [T, T] arrays that the gradients' kernel multiplies: what is below, on and above the diagonal.

A thread picks the halves of each pair of bfloat16 numbers by one instruction, from the pair itself and from a word that
is the same along a row. Which it picks is known before any head: a selector for each distance of 8 · 8 blocks.

What is written by hand has a plain twin for the interpreter (`simulated`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .pieces import WG, T, _int, rows
from .wgmma import word

_ABOVE, _BELOW = 0x7676, 0x3210  # both halves of the row's word or of the pair
# Of the first and of the second number: which half.
_HALVES = ((0x10, 0x54, 0x76), (0x3200, 0x5400, 0x7600))


def selectors(row: jax.Array, column: jax.Array, simulated: bool) -> jax.Array:
    """What `triangle` picks by; `row` and `column`: numbers, int32 [T, T]."""
    if simulated:
        return row - column

    @plgpu.inline_mgpu(arg_types=(WG, WG), return_type=plgpu.ShapeDtypeStruct((T, T), jnp.bfloat16, layout=WG))
    def inline(ctx, row, column):
        assert row.registers.shape[:5] == (1, T // 8, 1, 1, 2) and row.registers.size == T // 4, row.registers.shape
        first, column = (vector.extract(r.registers.flat[0], [], [0]) for r in (row, column))
        warp = arith.shrui(first, _int(4))
        within = arith.subi(arith.andi(first, _int(7)), arith.andi(column, _int(7)))  # in a block on the diagonal
        mixed = None
        for element, (below, own, above) in enumerate(_HALVES):
            is_below, is_own = (
                arith.cmpi(kind, within, _int(element)) for kind in (arith.CmpIPredicate.sgt, arith.CmpIPredicate.eq)
            )
            half = arith.select(is_below, _int(below), arith.select(is_own, _int(own), _int(above)))
            mixed = half if mixed is None else arith.ori(mixed, half)
        made = {}
        out = np.empty_like(row.registers)
        for index, _ in np.ndenumerate(row.registers):
            blocks = index[1] - index[4]
            if blocks not in made:
                # 2 warp blocks of rows are above the warp's own.
                kinds = (
                    arith.cmpi(kind, arith.addi(warp, warp), _int(blocks))
                    for kind in (arith.CmpIPredicate.sgt, arith.CmpIPredicate.eq)
                )
                is_below, is_mixed = kinds
                bits = arith.select(is_below, _int(_BELOW), arith.select(is_mixed, mixed, _int(_ABOVE)))
                made[blocks] = _as_pair(bits)
            out[index] = made[blocks]
        return type(row)(_registers=out, _layout=row.layout, _is_signed=None)

    return inline(row, column)


def triangle(below: jax.Array, own: jax.Array | None, selectors: jax.Array, simulated: bool) -> jax.Array:
    """bfloat16 [T, T]: `below` where i > j; own_i, float32 [T], where i = j, or 0 without; 0 above.

    `below` is bfloat16 [T, T]. What is not picked may be anything, infinite or no number.
    """
    if simulated:
        own = 0 if own is None else rows(own, T).astype(jnp.bfloat16)
        return jnp.where(selectors > 0, below, jnp.where(selectors == 0, own, 0)).astype(jnp.bfloat16)
    out = plgpu.ShapeDtypeStruct((T, T), jnp.bfloat16, layout=WG)

    def inline(ctx, below, selectors, *own):
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        words = [_int(0)] * 2
        if own:
            pairs = [vector.from_elements(ir.VectorType.get((2,), f32), [vector.extract(r, [], [0]), zero])
                     for r in own[0].registers.flat]  # fmt: skip
            words = [word(arith.truncf(ir.VectorType.get((2,), ir.BF16Type.get()), pair)) for pair in pairs]
        result = np.empty_like(selectors.registers)
        for index, selector in np.ndenumerate(selectors.registers):
            result[index] = _pick(word(below.registers[index]), words[index[4]], word(selector))
        return type(selectors)(_registers=result, _layout=selectors.layout, _is_signed=None)

    types = (WG, WG) + (() if own is None else (WG.reduce(1),))
    inline = plgpu.inline_mgpu(arg_types=types, return_type=out)(inline)
    return inline(below, selectors, *(() if own is None else (own,)))


def causal_ones(selectors: jax.Array, simulated: bool) -> jax.Array:
    """bfloat16 [T, T]: 1 where i ≥ j, else 0."""
    if simulated:
        return jnp.where(selectors >= 0, 1.0, 0.0).astype(jnp.bfloat16)
    return _picked(selectors, 0x3F803F80, 0x3F80)


def anticausal_ones(selectors: jax.Array, simulated: bool) -> jax.Array:
    """bfloat16 [T, T]: 1 where i ≤ j, else 0."""
    if simulated:
        return jnp.where(selectors <= 0, 1.0, 0.0).astype(jnp.bfloat16)
    return _picked(selectors, 0, 0x3F803F80)


def _picked(selectors: jax.Array, pair: int, other: int) -> jax.Array:
    @plgpu.inline_mgpu(arg_types=(WG,), return_type=plgpu.ShapeDtypeStruct((T, T), jnp.bfloat16, layout=WG))
    def inline(ctx, selectors):
        result = np.empty_like(selectors.registers)
        for index, selector in np.ndenumerate(selectors.registers):
            result[index] = _pick(_int(pair), _int(other), word(selector))
        return type(selectors)(_registers=result, _layout=selectors.layout, _is_signed=None)

    return inline(selectors)


def _pick(pair: ir.Value, other: ir.Value, selector: ir.Value) -> ir.Value:
    code = "prmt.b32 $0, $1, $2, $3;"
    i32 = ir.IntegerType.get_signless(32)
    return _as_pair(llvm.inline_asm(i32, [pair, other, selector], code, "=r,r,r,r", asm_dialect=0))


def _as_pair(bits: ir.Value) -> ir.Value:
    """An integer as two bfloat16 numbers."""
    bits = vector.from_elements(ir.VectorType.get((1,), bits.type), [bits])
    return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), bits)
