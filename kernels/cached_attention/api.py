"""The public function: argument checks and the choice of implementation."""

import jax
import jax.numpy as jnp

from ..choice import require_known, takes_triton
from ..gpu import no_triton_here
from . import xla

try:
    from . import triton_step
except ImportError:  # jax-triton comes with the extra "cuda"
    triton_step = None

_IMPLEMENTATIONS = ("triton", "xla")


def cached_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    start: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention of one new token to itself and the tokens before it in its document.

    Letters: b batch, h heads, d their width, m the tokens that the cache has room for. Head i reads key and value head
    i // (h / kv heads); scores are divided by √d. Gradients flow to every float argument and from every output.

    Args:
      q: the token's queries, [b, h, d].
      k: its keys, [b, kv heads, d].
      v: its values, [b, kv heads, d].
      keys: of the tokens so far, in their order, [b, kv heads, m, d].
      values: likewise.
      length: tokens so far, integers, [b]. At m or beyond, the token is neither kept nor seen.
      start: of them those before its document, integers, [b].
      implementation: "xla" reads all of the cache's room, on any device; "triton", a kernel for NVIDIA GPUs and widths
        of 16 to 256 that are powers of two, only what is filled; None is the fastest that can run here.

    Returns:
      [b, h, d] in q's dtype, and keys and values with the token's.

    Raises:
      ValueError: a shape that does not fit (the argument is named), an unknown implementation or one that cannot run
        here (with the reason).
      TypeError: an argument of the wrong kind of dtype.
    """
    args = {"q": q, "k": k, "v": v, "keys": keys, "values": values, "length": length, "start": start}
    _check_inputs(**args)
    require_known(implementation, _IMPLEMENTATIONS)
    in_triton = takes_triton(implementation, no_triton_here() or triton_step.unsupported(q, keys, values))
    return (triton_step if in_triton else xla).step(**args)


def _check_inputs(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array, start: jax.Array
) -> None:
    for name, value in {"q": q, "k": k, "v": v, "keys": keys, "values": values}.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating point dtype.")
    batch, heads, width = q.shape
    if keys.ndim != 4 or keys.shape[0] != batch or keys.shape[3] != width or heads % keys.shape[1]:
        raise ValueError(
            f"keys has shape {keys.shape}; expected [b, kv heads, m, d] where kv heads divides h, as q has shape "
            f"{q.shape}."
        )
    new = (batch, keys.shape[1], width)
    for name, value, shape in (("k", k, new), ("v", v, new), ("values", values, keys.shape)):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {shape}, as keys has shape {keys.shape}.")
    for name, value in (("length", length), ("start", start)):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {value.dtype}; expected integers.")
        if value.shape != (batch,):
            raise ValueError(f"{name} has shape {value.shape}; expected [b] = ({batch},).")
