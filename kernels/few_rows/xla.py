"""Products of few rows as XLA compiles them."""

import jax
import jax.numpy as jnp

from ..products import enough_rows
from ..rms_norm import rms_norm
from .form import Form


def product(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, residual: jax.Array | None, form: Form
) -> jax.Array:
    """As `api.few_rows_product`, x [..., in]."""
    x = x.astype(weight.dtype) if scale is None else rms_norm(x, scale, form.epsilon, weight.dtype)
    y = enough_rows(lambda rows: rows @ weight, x)
    if form.gated:
        value, gate = jnp.split(y, 2, axis=-1)
        y = value * jax.nn.silu(gate)
    return y if residual is None else residual + y.astype(residual.dtype)
