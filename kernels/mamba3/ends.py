"""Where a chunked scan begins and ends: the state that comes in and goes out, and the numbers of documents."""

import jax
import jax.numpy as jnp

from .inputs import Sequence, Weights
from .phases import reduce_turns, sum_turns
from .readout import per_rank
from .rotary import TWO_PI, rotate, wrap_angle
from .state import Mamba3State

_EXACT = jax.lax.Precision.HIGHEST


def entering_ssm(seq: Sequence, weights: Weights, state: Mamba3State, acc: jnp.dtype) -> jax.Array:
    """H before the first token, [b, h, p, n], with the half step due to the token before it folded in."""
    half_step = ((1 - seq.lam[:, 0].astype(acc)) * seq.dt[:, 0].astype(acc))[..., None, None]  # [b, h, 1, 1]
    x_prev = per_rank(state.x.astype(acc)[:, :, None, :], weights.mimo_x, state.b.shape[2])
    due = jnp.einsum("bhrp,bhrn->bhpn", x_prev, state.b.astype(acc), precision=_EXACT)
    return state.ssm.astype(acc) + half_step * due


def start_at_last_document(
    ssm: jax.Array, angle: jax.Array, seq: Sequence, state: Mamba3State, document: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """H and the phase after the last token as they are if its document's phase starts from 0.

    Kernels let the phase run on through documents, which does not show in y.
    """
    own_angle = _last_document_angle(seq, state, document)
    return rotate(ssm, (own_angle - angle)[:, :, None, :]), own_angle


def _last_document_angle(seq: Sequence, state: Mamba3State, document: jax.Array) -> jax.Array:
    """The phase after the last token, which starts from 0 at its document (or from the state's, in the first)."""
    last = document == document[:, -1:]  # [b, l]
    omega = seq.omega if seq.omega.ndim == 4 else seq.omega[:, :, None, :]
    steps = reduce_turns(jnp.swapaxes(seq.dt[..., None] * omega / TWO_PI, 1, 2))[:, :, None]  # [b, h, 1, l, s]
    turns = sum_turns(steps, last[:, None, None, :])[:, :, 0, 0]
    start = jnp.where((document[:, -1] == 0)[:, None, None], state.angle.astype(jnp.float32), 0)
    return wrap_angle(turns * TWO_PI + start)


def leaving_state(angle: jax.Array, ssm: jax.Array, seq: Sequence, weights: Weights, acc: jnp.dtype) -> Mamba3State:
    """The state after the last token, from its phase in radians and H."""
    last = jnp.moveaxis(seq.b[:, -1].astype(acc), 1, 2)  # [b, g, r, n]
    last = jnp.repeat(last, seq.x.shape[2] // last.shape[1], axis=1)
    if weights.b_bias is not None:
        last = last + weights.b_bias.astype(acc)[None]
    return Mamba3State(angle=angle, ssm=ssm, b=rotate(last, angle[:, :, None, :]), x=seq.x[:, -1])
