"""The public function: argument checks and the choice of implementation."""

import jax
import jax.numpy as jnp

from ..choice import require_known, takes_triton
from ..gpu import no_triton_here
from ..rms_norm import rms_norm
from . import xla
from .form import Form
from .sums import Sums

try:
    from . import triton_product, triton_rows, triton_sums
except ImportError:  # jax-triton comes with the extra "cuda"
    triton_product, triton_rows, triton_sums = None, None, None

_IMPLEMENTATIONS = ("triton", "xla")


def few_rows_product(
    x: jax.Array,
    weight: jax.Array,
    *,
    scale: jax.Array | None = None,
    epsilon: float = 0.0,
    residual: jax.Array | None = None,
    gated: bool = False,
    pending: bool = False,
    implementation: str | None = None,
) -> jax.Array | Sums:
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
      pending: where there is a kernel that adds the residual on the way to the norm that follows, leave it to
        `add_and_norm`.
      implementation: "xla" runs on any device; "triton", kernels for NVIDIA GPUs, takes one row, [1, in], and on Hopper
        GPUs up to 128; None is the fastest that can run here.

    Returns:
      [..., out] in the residual's dtype, else in the weight's; or, if pending, what that will be.

    Raises:
      ValueError: a shape that does not fit (the argument is named), an unknown implementation or one that cannot run
        here (with the reason).
      TypeError: an argument of the wrong kind of dtype.
    """
    form = Form(epsilon, gated)
    args = {"x": x, "weight": weight, "scale": scale, "residual": residual}
    _check_inputs(**args, form=form)
    require_known(implementation, _IMPLEMENTATIONS)
    one = x.ndim == 2 and x.shape[0] == 1
    if not takes_triton(implementation, no_triton_here() or _why_not_triton(one, x, weight, residual, form)):
        return xla.product(**args, form=form)
    if one:
        return triton_product.product(**args, form=form)
    x = x.astype(weight.dtype) if scale is None else rms_norm(x, scale, epsilon, weight.dtype)
    sums = Sums(residual, triton_rows.product(x, weight, gated))
    return sums if pending and residual is not None else sums.added(weight.dtype)


def add_and_norm(sums: Sums, scale: jax.Array, epsilon: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """What a pending product will be, and its norm, in one launch.

    Args:
      sums: from `few_rows_product`.
      scale: [out], as for the norm there.
      epsilon: of the norm.
      dtype: of the product's weight, to which the product is rounded before it is added.

    Returns:
      [rows, out] in the residual's dtype, and [rows, out] in `dtype`. Gradients flow to what is pending and to scale.

    Raises:
      ValueError: scale has another shape than [out].
    """
    if scale.shape != sums.parts.shape[-1:]:
        raise ValueError(f"scale has shape {scale.shape}; expected [out] = {sums.parts.shape[-1:]}.")
    return triton_sums.add_and_norm(sums, scale, epsilon, jnp.dtype(dtype))


def _why_not_triton(one: bool, x: jax.Array, weight: jax.Array, residual: jax.Array | None, form: Form) -> str | None:
    if one:
        return triton_product.unsupported(x, weight, residual, form)
    return triton_rows.unsupported(x, weight, form)


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
