"""The public functions of the gated delta rule."""

import jax
import jax.numpy as jnp

from ..choice import require_known, takes_triton
from ..gpu import no_triton_here
from . import reference, step, xla
from .inputs import Sequence, check_inputs, of_unit_length
from .walk import walk_in_jax

try:
    from . import triton_step, triton_walk
except ImportError:  # jax-triton comes with the extra "cuda"
    triton_step, triton_walk = None, None

_IMPLEMENTATIONS = ("reference", "triton", "xla")


def gated_delta_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    unit_eps: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The gated delta rule over a sequence (arXiv 2412.06464, equation 10).

    S ← e^g S (I - β k kᵀ) + β v kᵀ;  o = S q.

    Letters: b batch, l length, h heads, n width of keys, p width of values. Gradients flow to every float argument and
    from every output.

    Args:
      q: queries, [b, l, h, n], scaled as they are to be, unless `unit_eps` is given.
      k: keys, [b, l, h, n], of length 1, unless `unit_eps` is given.
      v: values, [b, l, h, p].
      log_decay: g ≤ 0, [b, l, h].
      beta: write strength, [b, l, h]: in [0, 1], or up to 2 for eigenvalues down to -1 (arXiv 2411.12537).
      initial_state: S before the first token, [b, h, p, n]; None = zeros.
      segment_ids: integers, [b, l]; where they change, a new document starts from S = 0. The first token continues
        `initial_state`.
      unit_eps: given, q and k are first divided by their lengths √(|.|² + unit_eps), and q by √n too.
      chunk_size: positions per chunk of the chunked implementations; None = 64.
      implementation: "reference" (token by token), "xla" (chunked matrix products, any device), "triton" (the same
        with a kernel for NVIDIA GPUs that takes the state through the chunks), or None for the fastest that can run
        here.
      return_state: also return S after the last token.

    Returns:
      o [b, l, h, p] in v's dtype, or (o, S in float32 or better).

    Raises:
      ValueError: a shape that does not fit (the argument is named), a chunk size under 1, an unknown implementation or
        one that cannot run here (with the reason).
      TypeError: an argument that is not floating point.
    """
    seq = Sequence(q, k, v, log_decay, beta)
    check_inputs(seq, initial_state, segment_ids)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}; expected at least 1.")
    require_known(implementation, _IMPLEMENTATIONS)
    seq = of_unit_length(seq, unit_eps)
    state = _state(seq, initial_state)
    if implementation == "reference":
        o, state = reference.scan(seq, state, segment_ids)
        return (o, state) if return_state else o
    chunk = min(chunk_size or xla.CHUNK, seq.v.shape[1])
    in_triton = takes_triton(implementation, no_triton_here() or triton_walk.unsupported(seq, chunk))
    o, state = xla.scan(chunk, triton_walk.walk_in_triton if in_triton else walk_in_jax, seq, state, segment_ids)
    return (o, state) if return_state else o


def gated_delta_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    unit_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token; arguments as in `gated_delta_scan` without the length axis.

    "xla" reads S twice and writes it once, "triton" is one kernel that reads it once (n up to 512).

    Returns:
      o [b, h, p] in v's dtype, and the next S in the dtype it came in.

    Raises:
      ValueError: a shape that does not fit (the argument is named), an unknown implementation or one that cannot run
        here (with the reason).
      TypeError: an argument that is not floating point.
    """
    token = Sequence(q, k, v, log_decay, beta)
    check_inputs(token, state, None)
    require_known(implementation, _IMPLEMENTATIONS)
    if implementation == "reference":
        o, new_state = reference.step(of_unit_length(token, unit_eps, wide=True), _state(token, state))
    elif takes_triton(implementation, no_triton_here() or triton_step.unsupported(token, state)):
        o, new_state = triton_step.step(token, state, unit_eps)
    else:
        o, new_state = step.step(of_unit_length(token, unit_eps, wide=True), state)
    return o, new_state.astype(state.dtype)


def _state(seq: Sequence, state: jax.Array | None) -> jax.Array:
    acc = jnp.promote_types(seq.v.dtype, jnp.float32)
    if state is not None:
        return state.astype(acc)
    return jnp.zeros((seq.v.shape[0], *seq.v.shape[-2:], seq.k.shape[-1]), acc)
