"""A product's parts, its residual and the norm that follows in one kernel, a program for a row.

y = residual + Σ parts,   norm(y)_k = r y_k s_k,   r = 1 / √(mean(y²) + ε)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from ..triton_launch import launch
from .sums import Sums

_WARPS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def add_and_norm(sums: Sums, scale: jax.Array, epsilon: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """y in the residual's dtype, and its norm in `dtype`; derivatives are those of XLA's."""
    parts, rows, outer = sums.parts.shape
    like = jax.ShapeDtypeStruct((rows, outer), sums.residual.dtype)
    return tuple(launch(
        _add, [sums.residual, sums.parts, scale], {"epsilon": np.float32(epsilon)},
        [like, jax.ShapeDtypeStruct((rows, outer), dtype)], (rows, 1, 1), _WARPS,
        {"PARTS": parts, "M": rows, "N": outer, "NP": triton.next_power_of_2(outer)},
    ))  # fmt: skip


def _forward(sums, scale, epsilon, dtype):
    return add_and_norm(sums, scale, epsilon, dtype), (sums, scale)


def _backward(epsilon: float, dtype: jnp.dtype, saved: tuple[Sums, jax.Array], cotangents: tuple):
    return jax.vjp(lambda sums, *args: sums.added_and_normed(*args, epsilon, dtype), *saved)[1](cotangents)


add_and_norm.defvjp(_forward, _backward)


@triton.jit
def _add(
    residual_ptr, parts_ptr, scale_ptr, epsilon, y_ptr, norm_ptr, PARTS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """One row."""
    column = tl.arange(0, NP)
    there = column < N
    at = tl.program_id(0) * N + column
    residual = tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + column, mask=there, other=0.0).to(tl.float32)
    y = tl.load(parts_ptr + at, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        y += tl.load(parts_ptr + part * (M * N) + at, mask=there, other=0.0).to(tl.float32)
    y = residual + y.to(norm_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=there)
    y *= tl.rsqrt(tl.sum(y * y, 0) / N + epsilon)
    tl.store(norm_ptr + at, (y * scale).to(norm_ptr.dtype.element_ty), mask=there)
