"""Matrix products whose operands are rounded and whose sums are not, and products of few rows as XLA has them fast."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST
_LEAST_ROWS = 8  # of a tensor core's product
_ROUNDING = ("default", "high", "bfloat16", "tensorfloat32")  # names of jax.default_matmul_precision


def operand_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What products of inputs of this dtype take: XLA's CPU backend lacks some of narrow numbers with wide results."""
    return jnp.promote_types(dtype, jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def rounds_float32() -> bool:
    """Whether the caller has chosen, by jax.default_matmul_precision, products that round operands of float32."""
    return jax.config.jax_default_matmul_precision in _ROUNDING


def chosen_precision() -> jax.lax.Precision | None:
    """Of products of float32: the one that the caller has chosen by jax.default_matmul_precision, else exact."""
    return None if jax.config.jax_default_matmul_precision else _EXACT


def enough_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The product of x [rows, in] with a weight; on a GPU one of few rows is computed with more, of zeros.

    Of one row XLA makes a sum instead, which on an H100 reads the weights at less than half the rate of a product.
    """
    rows = x.shape[0]
    if x.ndim != 2 or rows >= _LEAST_ROWS or jax.default_backend() != "gpu":
        return product(x)
    padded = product(jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0))))
    return jax.lax.optimization_barrier(padded)[:rows]  # lest XLA multiply only what is kept


def matmul(spec: str, left: jax.Array, right: jax.Array, operand: jnp.dtype) -> jax.Array:
    """An einsum of two arrays of one dtype, in which the result and the sums are too; operands are rounded first.

    Operands of that same dtype are multiplied exactly, unless the caller has chosen a jax.default_matmul_precision.
    """
    if operand == left.dtype:
        return jnp.einsum(spec, left, right, precision=chosen_precision())
    return _matmul(spec, operand, left, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(spec: str, operand: jnp.dtype, left: jax.Array, right: jax.Array) -> jax.Array:
    return _product(spec, left.astype(operand), right.astype(operand))


def _matmul_forward(spec: str, operand: jnp.dtype, left: jax.Array, right: jax.Array):
    rounded = left.astype(operand), right.astype(operand)
    return _product(spec, *rounded), rounded


def _matmul_backward(spec: str, operand: jnp.dtype, rounded: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    left, right = rounded
    inputs, out = spec.split("->")
    left_axes, right_axes = inputs.split(",")
    cotangent = cotangent.astype(operand)  # autodiff would multiply it in float32, off the fast units
    left_bar = _product(f"{out},{right_axes}->{left_axes}", cotangent, right)
    return left_bar, _product(f"{left_axes},{out}->{right_axes}", left, cotangent)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
