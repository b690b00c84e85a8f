"""The product of one row in Triton: the weight W [in, out] is read once, at the rate of memory.

    y = residual + gate(norm(x) W),   norm(x)_k = r x_k s_k,   r = 1 / √(mean(x²) + ε),   gate([v | g]) = v silu(g)

A program takes some columns of W and walks down their rows; every thread adds up the products of its own weights, and
threads meet once, at the end. What counts is how many bytes are on their way at any time. So nothing precedes the walk:
r multiplies the sums at the end, and Σ x² is found on the way, by every program for itself from x, which is in the
cache. With that, x s is rounded where r x s is otherwise: the same relative error. The residual and the gate cost no
launches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from .. import triton_by_xla
from ..triton_by_xla import wait_and_let_next_start
from ..triton_launch import MAX_ELEMENTS, launch
from . import xla
from .form import Form

_NARROW = (jnp.float32, jnp.bfloat16)
_ALIGNMENT = 16  # bytes that a thread reads at one time
_PROGRAMS = 96  # that a weight is shared out to at least, if it is wide enough
_MOST_DEPTH, _WARPS = 256, 4


class Tiling(NamedTuple):
    """How a weight is laid over programs and threads."""

    columns: int  # of a program
    depth: int  # rows of the weight that a program reads at one time
    warps: int
    stages: int  # of the walk, of which all but one are on their way


def default_tiling(outer: int, itemsize: int, gated: bool) -> Tiling:
    """The tiling for a result of so many columns (experiments/latency/few_rows.py); it has up to 64 KB on their way."""
    columns, stages, tile = (32, 3, 2**15) if outer >= 32 * _PROGRAMS else (16, 8, 2**13)
    return Tiling(columns, min(tile // (columns * (1 + gated) * itemsize), _MOST_DEPTH), _WARPS, stages)


def unsupported(x: jax.Array, weight: jax.Array, residual: jax.Array | None, form: Form) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    if x.ndim != 2 or x.shape[0] != 1:  # of more, XLA's product on tensor cores is faster
        return f"x has shape {x.shape}; the Triton product takes one row, [1, in]"
    dtypes = {"x": x.dtype, "weight": weight.dtype}
    for name, dtype in (dtypes if residual is None else dtypes | {"residual": residual.dtype}).items():
        if dtype not in _NARROW:
            return f"{name} has dtype {dtype}; the Triton product takes float32 and bfloat16"
    row = weight.shape[1] // (1 + form.gated) * weight.dtype.itemsize
    if row % _ALIGNMENT:
        return f"a row of weight, or of its half if gated, has {row} bytes; the Triton product takes multiples of 16"
    if weight.size >= MAX_ELEMENTS:
        return f"weight has {weight.size} numbers; the Triton product takes fewer than 2^31"
    return None


@functools.partial(jax.jit, static_argnames=("form", "tiling"))
def product(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, residual: jax.Array | None, form: Form,
    tiling: Tiling | None = None,
) -> jax.Array:  # fmt: skip
    """As `api.few_rows_product`, on a GPU, of what `unsupported` allows; derivatives are those of XLA's product.

    `tiling`: None = `default_tiling`.
    """
    if tiling is None:
        tiling = default_tiling(weight.shape[1] // (1 + form.gated), weight.dtype.itemsize, form.gated)
    return _product(x, weight, scale, residual, form, tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x, weight, scale, residual, form, tiling):
    inner, outer = weight.shape[0], weight.shape[1] // (1 + form.gated)
    # What is not there is never read, but needs an address.
    others = [x if v is None else v for v in (scale, residual)]
    (y,) = launch(
        _add_up, [x, weight, *others], {"epsilon": np.float32(form.epsilon)},
        [jax.ShapeDtypeStruct((1, outer), (weight if residual is None else residual).dtype)],
        (triton.cdiv(outer, tiling.columns), 1, 1), tiling.warps,
        {"K": inner, "N": outer, "BN": tiling.columns, "BK": tiling.depth, "NORM": scale is not None,
         "GATED": form.gated, "RESIDUAL": residual is not None, "STAGES": tiling.stages,
         "EARLY": triton_by_xla.available()},
    )  # fmt: skip
    return y


def _product_forward(x, weight, scale, residual, form, tiling):
    return _product(x, weight, scale, residual, form, tiling), (x, weight, scale, residual)


def _product_backward(form: Form, tiling: Tiling, saved: tuple[jax.Array | None, ...], cotangent: jax.Array):
    del tiling
    return jax.vjp(lambda *args: xla.product(*args, form), *saved)[1](cotangent)


_product.defvjp(_product_forward, _product_backward)


@triton.jit
def _add_up(
    x_ptr, weight_ptr, scale_ptr, residual_ptr, epsilon, y_ptr, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BN of the N columns."""
    if EARLY:
        wait_and_let_next_start()
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    in_columns = column < N
    y = tl.zeros((BK, BN), tl.float32)
    gate = tl.zeros((BK, BN), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inner = start + tl.arange(0, BK)
        there = inner < K
        weight_at = weight_ptr + inner[:, None] * (N * (1 + GATED)) + column[None, :]
        in_weight = there[:, None] & in_columns[None, :]
        weight = tl.load(weight_at, mask=in_weight, other=0.0)
        x = tl.load(x_ptr + inner, mask=there, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(scale_ptr + inner, mask=there, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)[:, None]
        y += weight.to(tl.float32) * x
        if GATED:
            gate += tl.load(weight_at + N, mask=in_weight, other=0.0).to(tl.float32) * x
    y = tl.sum(y, 0)
    gate = tl.sum(gate, 0)
    if NORM:
        unit = tl.rsqrt(tl.sum(squares, 0) / K + epsilon)
        y *= unit
        gate *= unit
    # What is rounded between products and other things in a narrow dtype is rounded here.
    if GATED:
        y = y.to(dtype).to(tl.float32)
        gate = gate.to(dtype).to(tl.float32)
        y = y * gate / (1 + tl.exp(-gate))
    if RESIDUAL:
        y = y.to(dtype).to(tl.float32)
        y += tl.load(residual_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=in_columns)
