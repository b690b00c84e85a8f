"""The product of up to 128 rows in Triton, on tensor cores: the weight W [in, out] is read once.

    y = residual + gate(x W),   gate([v | g]) = v silu(g)

A program takes some columns of W and walks down its rows, or down a part of them where the columns are too few for as
many programs as fill the device; sums.py adds up the parts, with the residual. The norm before the product is computed
before: here every program would have to do it for itself.

A tensor core's product has 64 rows. Of up to so many rows of x it is turned, y' = W' x': columns of W are many.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from ..gpu import compute_capability
from ..triton_launch import MAX_ELEMENTS, launch
from . import xla
from .form import Form

_MOST_ROWS, _LEAST_ROWS = 128, 16  # the second: of a product, which has more than x if need be
_TURNED_ROWS = 64
_CAPABILITY = 90  # whose shared memory the tilings fill
_ALIGNMENT = 16  # bytes that a thread copies at one time
_PROGRAMS = 66  # that a weight is shared out to at least: half of an H100's multiprocessors


class Tiling(NamedTuple):
    """How a weight is laid over programs."""

    columns: int  # of a program, of either half if gated
    depth: int  # rows of the weight that it multiplies at one time
    warps: int
    stages: int  # of the walk, of which all but one are on their way
    parts: int  # of the weight's rows


def default_tiling(rows: int, outer: int, gated: bool) -> Tiling:
    """The tiling that is fastest for a shape, as far as measured (experiments/latency/few_rows.py)."""
    if rows <= _TURNED_ROWS:
        columns, depth, warps, stages = 64, 64, 4, 5
    elif gated:
        columns, depth, warps, stages = 32, 64, 8, 6
    elif outer > 64 * _PROGRAMS:
        columns, depth, warps, stages = 128, 64, 8, 6
    else:
        columns, depth, warps, stages = 64, 64, 8, 5
    parts = 1 if gated else triton.next_power_of_2(triton.cdiv(_PROGRAMS, triton.cdiv(outer, columns)))
    return Tiling(columns, depth, warps, stages, parts)


def unsupported(x: jax.Array, weight: jax.Array, form: Form) -> str | None:
    """Why the kernel cannot take these inputs, or run here; None if it can."""
    if x.ndim != 2 or x.shape[0] > _MOST_ROWS:
        return f"x has shape {x.shape}; the Triton products take [rows, in] of up to {_MOST_ROWS} rows"
    if compute_capability() != _CAPABILITY:
        return "the Triton product of several rows is for Hopper GPUs"
    if weight.dtype != jnp.bfloat16:
        return f"weight has dtype {weight.dtype}; the Triton product of several rows takes bfloat16"
    widths = weight.shape[0] * weight.dtype.itemsize, weight.shape[1] // (1 + form.gated) * weight.dtype.itemsize
    if any(width % _ALIGNMENT for width in widths):
        return (
            f"rows of x and of weight, or of its half if gated, have {widths[0]} and {widths[1]} bytes; the Triton "
            "product takes multiples of 16"
        )
    if weight.size >= MAX_ELEMENTS:
        return f"weight has {weight.size} numbers; the Triton product takes fewer than 2^31"
    return None


@functools.partial(jax.jit, static_argnames=("gated", "tiling"))
def product(x: jax.Array, weight: jax.Array, gated: bool, tiling: Tiling | None = None) -> jax.Array:
    """gate(x W) in parts [parts, rows, out], one in the weight's dtype or several in float32; only one if gated.

    Of what `unsupported` allows; derivatives are those of XLA's product. `tiling`: None = `default_tiling`.
    """
    if tiling is None:
        tiling = default_tiling(x.shape[0], weight.shape[1] // (1 + gated), gated)
    return _product(x, weight, gated, tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, weight, gated, tiling):
    (rows, inner), outer = x.shape, weight.shape[1] // (1 + gated)
    depth = triton.cdiv(inner, tiling.depth * tiling.parts) * tiling.depth
    dtype = weight.dtype if tiling.parts == 1 else jnp.float32
    (y,) = launch(
        _multiply, [x, weight], {}, [jax.ShapeDtypeStruct((tiling.parts, rows, outer), dtype)],
        (triton.cdiv(outer, tiling.columns), tiling.parts, 1), tiling.warps,
        {"M": rows, "MP": max(triton.next_power_of_2(rows), _LEAST_ROWS), "K": inner, "N": outer,
         "BN": tiling.columns, "BK": tiling.depth, "PART": depth, "WHOLE": inner == depth * tiling.parts,
         "GATED": gated, "TURNED": rows <= _TURNED_ROWS, "STAGES": tiling.stages},
    )  # fmt: skip
    return y


def _product_forward(x, weight, gated, tiling):
    return _product(x, weight, gated, tiling), (x, weight)


def _product_backward(gated: bool, tiling: Tiling, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    del tiling
    one = cotangent[0].astype(saved[1].dtype)  # all parts have the same: they are only ever added up
    return jax.vjp(lambda *args: xla.product(*args, None, None, Form(0.0, gated)), *saved)[1](one)


_product.defvjp(_product_forward, _product_backward)


@triton.jit
def _multiply(
    x_ptr, weight_ptr, y_ptr, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BN of the N columns, of a part of the K rows."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    column = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    row = tl.arange(0, MP)[:, None]
    begin = tl.program_id(1) * PART
    in_columns, in_rows = column < N, row < M
    if TURNED:
        y = tl.zeros((BN, MP), tl.float32)
        gate = tl.zeros((BN, MP), tl.float32)
    else:
        y = tl.zeros((MP, BN), tl.float32)
        gate = tl.zeros((MP, BN), tl.float32)
    for start in tl.range(begin, begin + PART, BK, num_stages=STAGES):
        inner = start + tl.arange(0, BK)
        in_weight, in_x = in_columns, in_rows
        if not WHOLE:
            in_weight, in_x = in_weight & (inner < K)[:, None], in_x & (inner < K)[None, :]
        weight_at = weight_ptr + inner[:, None] * (N * (1 + GATED)) + column
        weight = tl.load(weight_at, mask=in_weight, other=0.0)
        x = tl.load(x_ptr + row * K + inner[None, :], mask=in_x, other=0.0)
        y = tl.dot(tl.trans(weight), tl.trans(x), y) if TURNED else tl.dot(x, weight, y)
        if GATED:
            weight = tl.load(weight_at + N, mask=in_weight, other=0.0)
            gate = tl.dot(tl.trans(weight), tl.trans(x), gate) if TURNED else tl.dot(x, weight, gate)
    # What is rounded between a product and a gate in a narrow dtype is rounded here.
    if GATED:
        y = y.to(dtype).to(tl.float32)
        gate = gate.to(dtype).to(tl.float32)
        y = y * gate / (1 + tl.exp(-gate))
    if TURNED:
        y = tl.trans(y)
    y_at = y_ptr + tl.program_id(1) * (M * N) + row * N + column
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_columns & in_rows)
