"""One token of the gated delta rule, for decoding: S is read for both of its products at once, then once to change it.

    o = S' q = e^g S q + u (k·q)    with    u = β (v - e^g S k),    S' = e^g S + u kᵀ

The definition (reference.py) reads S' again for o, and first writes e^g S.
"""

import jax
import jax.numpy as jnp

from .inputs import Sequence


def step(token: Sequence, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `reference.step`, of a state of any dtype; computes in float32 or better and returns S' in it."""
    acc = jnp.promote_types(token.v.dtype, jnp.float32)
    q, k, v, log_decay, beta = (t.astype(acc) for t in token)
    state, decay = state.astype(acc), jnp.exp(log_decay)[..., None]
    # A sum and not a product of the compiler's library, which would first copy a narrow S into a wide one; and one sum,
    # on which S' depends: nothing reads S after it, so that it can change where it is.
    pair = jnp.stack([k, q], axis=-2)[..., None, :, :]
    known, read = jnp.moveaxis(decay[..., None] * jnp.sum(state[..., None, :] * pair, axis=-1), -1, 0)
    update = beta[..., None] * (v - known)
    o = read + update * jnp.sum(k * q, axis=-1, keepdims=True)
    state = decay[..., None] * state + update[..., :, None] * k[..., None, :]
    return o.astype(token.v.dtype), state
