"""The public function: argument checks and the choice of implementation."""

import jax
import jax.numpy as jnp

from ..choice import require_known, takes_triton
from ..gpu import no_triton_here
from . import xla
from .form import Form

try:
    from . import triton_product
except ImportError:  # jax-triton comes with the extra "cuda"
    triton_product = None

_IMPLEMENTATIONS = ("triton", "xla")


def few_rows_product(
    x: jax.Array,
    weight: jax.Array,
    *,
    scale: jax.Array | None = None,
    epsilon: float = 0.0,
    residual: jax.Array | None = None,
    gated: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """residual + gate(norm(x) @ weight), each of norm, gate and residual only where it is asked for.

    Of few rows the weight is all the work: it is read once, and what surrounds the product of a single row costs no
    launch of its own. Gradients flow to x, weight, scale and residual.

    Args:
      x: [..., in], rounded to the weight's dtype, after the norm if there is one.
      weight: [in, out].
      scale: [in]; x is first divided by √(mean(x²) + epsilon) over its last axis and multiplied with this.
      epsilon: of the norm.
      residual: [..., out], added in its dtype, which is that of the result.
      gated: the first half of the product's columns times silu of the second; out is then half as wide.
      implementation: "xla" runs on any device; "triton", a kernel for NVIDIA GPUs, takes one row, [1, in];
        None is the fastest that can run here.

    Returns:
      [..., out] in the residual's dtype, else in the weight's.

    Raises:
      ValueError: a shape that does not fit (the argument is named), an unknown implementation or one that cannot run
        here (with the reason).
      TypeError: an argument of the wrong kind of dtype.
    """
    form = Form(epsilon, gated)
    args = {"x": x, "weight": weight, "scale": scale, "residual": residual}
    _check_inputs(**args, form=form)
    require_known(implementation, _IMPLEMENTATIONS)
    in_triton = takes_triton(implementation, no_triton_here() or triton_product.unsupported(x, weight, residual, form))
    return (triton_product if in_triton else xla).product(**args, form=form)


def _check_inputs(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, residual: jax.Array | None, form: Form
) -> None:
    for name, value in {"x": x, "weight": weight, "scale": scale, "residual": residual}.items():
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating point dtype.")
    inner, outer = weight.shape
    if x.shape[-1] != inner:
        raise ValueError(f"x has shape {x.shape}; expected [..., {inner}], as weight has shape {weight.shape}.")
    if scale is not None and scale.shape != (inner,):
        raise ValueError(f"scale has shape {scale.shape}; expected [in] = ({inner},).")
    if form.gated and outer % 2:
        raise ValueError(f"weight has shape {weight.shape}; expected an even number of columns, as gated = True.")
    out = (*x.shape[:-1], outer // 2 if form.gated else outer)
    if residual is not None and residual.shape != out:
        raise ValueError(f"residual has shape {residual.shape}; expected {out}, that of the product.")
