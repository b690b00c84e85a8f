"""The recurrence over a sequence that is divided over the devices of a mesh axis, each with one piece, in order.

A piece's tokens, from the zero state, leave H_0, and turn by φ_0 in all. From a state before it (H, φ, B, x) they leave

    e^{Σ Δ A} (H + (1 - λ_1) Δ_1 Σ_r x_r ⊗ B_r) + R(φ) H_0        φ + φ_0        R(φ) B_0

where R turns pairs of coordinates of n. So every device scans its piece once from zero, tells the others what that
left, finds by these lines from which state its piece begins, and scans again: twice the work of a scan, divided, and
three times forward where gradients are taken.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..decay import min_log_decay
from ..documents import continues_document
from .inputs import Sequence, Weights, accumulator_dtype
from .readout import per_rank
from .rotary import rotate, wrap_angle
from .state import Mamba3State

_EXACT = jax.lax.Precision.HIGHEST


class _Piece(NamedTuple):
    """What others need to know of a piece; its documents are None if there is one."""

    end: Mamba3State  # after it, from the zero state
    log_decay: jax.Array  # [b, h], Σ Δ A
    half_step: jax.Array  # [b, h], (1 - λ) Δ of its first token
    first: jax.Array | None  # [b], document of its first token
    last: jax.Array | None  # [b], of its last
    whole: jax.Array | None  # [b], whether all between is that document, too


def check_axis(axis: str) -> None:
    """Raises ValueError for an axis that there is none of here."""
    try:
        jax.lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"sequence_axis = {axis!r}; expected a mesh axis of the jax.shard_map in which mamba3_scan is called."
        ) from error


def scan(
    run: Callable[..., tuple[jax.Array, Mamba3State]],
    axis: str,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, Mamba3State]:
    """y of this device's piece, and the state after the last piece, the same on all devices.

    Args:
      run: a scan of (seq, weights, state, segment_ids).
      axis: the mesh axis, of a shard_map around.
      seq: the piece.
      weights: as in `reference.scan`.
      state: the state before the first piece, the same on all devices.
      segment_ids: of the piece, [b, l].
    """
    acc = accumulator_dtype(seq.x)
    state = state.accumulating(acc, seq.x.dtype)
    # Made again in the backward: its residuals would be as many as those of the scan below.
    _, end = jax.checkpoint(run)(seq, weights, jax.tree.map(jnp.zeros_like, state), segment_ids)
    pieces = jax.lax.all_gather(_piece(end, seq, segment_ids, acc), axis)
    before = state, None if segment_ids is None else pieces.first[0]
    (final, _), entering = jax.lax.scan(functools.partial(_pass, weights), before, pieces)
    own = jax.lax.axis_index(axis)
    y, _ = run(seq, weights, jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, own, keepdims=False), entering),
               segment_ids)  # fmt: skip
    return y, final


def _piece(end: Mamba3State, seq: Sequence, segment_ids: jax.Array | None, acc: jnp.dtype) -> _Piece:
    dt, a, lam = (v.astype(acc) for v in (seq.dt, seq.a, seq.lam))
    documents = None, None, None
    if segment_ids is not None:
        documents = segment_ids[:, 0], segment_ids[:, -1], jnp.all(continues_document(segment_ids), axis=1)
    log_decay = jnp.sum(jnp.maximum(dt * a, min_log_decay(acc)), axis=1)
    return _Piece(end, log_decay, (1 - lam[:, 0]) * dt[:, 0], *documents)


def _pass(
    weights: Weights, before: tuple[Mamba3State, jax.Array | None], piece: _Piece
) -> tuple[tuple[Mamba3State, jax.Array | None], Mamba3State]:
    """((the state after a piece, its document), the state with which the piece begins)."""
    state, document = before
    if document is not None:
        state = _where(piece.first == document, state, jax.tree.map(jnp.zeros_like, state))
    x = per_rank(state.x.astype(state.ssm.dtype)[:, :, None, :], weights.mimo_x, state.b.shape[2])
    due = jnp.einsum("bhrp,bhrn->bhpn", x * piece.half_step[..., None, None], state.b, precision=_EXACT)
    turned = functools.partial(rotate, angle=state.angle[:, :, None, :])
    after = Mamba3State(
        angle=wrap_angle(state.angle + piece.end.angle),
        ssm=jnp.exp(piece.log_decay)[..., None, None] * (state.ssm + due) + turned(piece.end.ssm),
        b=turned(piece.end.b),
        x=piece.end.x,
    )
    if document is not None:
        after = _where(piece.whole, after, piece.end)
    return (after, piece.last), state


def _where(rows: jax.Array, state: Mamba3State, other: Mamba3State) -> Mamba3State:
    """The rows [b] of one state, the others of another."""
    return jax.tree.map(lambda v, w: jnp.where(rows.reshape(-1, *[1] * (v.ndim - 1)), v, w), state, other)
