"""The gated delta rule as chunked matrix products in plain JAX: runs everywhere, differentiates by autodiff.

Notation: L_i is the running sum of the log decay in a chunk of c positions, S [p, n] the state entering it. What a
token writes, u_i, depends on what those before it in the chunk wrote:

    u_i = β_i (v_i - e^{L_i} S k_i - Σ_{j<i} e^{L_i - L_j} (k_j·k_i) u_j)

a triangular system (I + A) U = diag(β) (V - e^L K Sᵀ), solved for all chunks at once but for S (the WY form, arXiv
2406.06484, section 3.2, with decay as in arXiv 2412.06464). Then

    o_i   = e^{L_i} S q_i + Σ_{j≤i} e^{L_i - L_j} (k_j·q_i) u_j
    S_out = e^{L_end} S + Σ_j e^{L_end - L_j} u_j k_jᵀ

which a loop over the chunks finds. A new document is a decay to 0, by masks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..documents import number_documents
from ..products import matmul, operand_dtype
from .inputs import Sequence

CHUNK = 64  # positions


class _Chunk(NamedTuple):
    """Of every chunk; c positions."""

    q: jax.Array  # [b, h, m, c, n], times e^L, 0 where S is of another document
    k: jax.Array  # [b, h, m, c, n], times e^{L_end - L}, 0 where S_out is of another document
    own: jax.Array  # [b, h, m, c, p], U as it is for S = 0
    erase: jax.Array  # [b, h, m, c, n], U = own - erase Sᵀ
    scores: jax.Array  # [b, h, m, c, c], q·k with decay
    decay: jax.Array  # [b, h, m], e^{L_end}, or 0


@functools.partial(jax.jit, static_argnums=0)
def scan(chunk: int, seq: Sequence, state: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """o [b, l, h, p] and S after the last token."""
    length, operand = seq.v.shape[1], operand_dtype(seq.v.dtype)
    chunk = min(chunk, length)
    document = None if segment_ids is None else number_documents(segment_ids)
    prepared = _prepare(seq, document, chunk, state.dtype, operand)

    def body(state: jax.Array, here: _Chunk) -> tuple[jax.Array, jax.Array]:
        update = here.own - matmul("bhcn,bhpn->bhcp", here.erase, state, operand)
        o = matmul("bhcn,bhpn->bhcp", here.q, state, operand) + matmul("bhcj,bhjp->bhcp", here.scores, update, operand)
        return here.decay[..., None, None] * state + matmul("bhcp,bhcn->bhpn", update, here.k, operand), o

    state, o = jax.lax.scan(body, state, jax.tree.map(lambda v: jnp.moveaxis(v, 2, 0), prepared))
    o = jnp.moveaxis(o, (0, 3), (1, 2))  # [m, b, h, c, p] → [b, m, c, h, p]
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length].astype(seq.v.dtype), state


def _prepare(seq: Sequence, document: jax.Array | None, chunk: int, acc: jnp.dtype, operand: jnp.dtype) -> _Chunk:
    def chunked(v: jax.Array) -> jax.Array:  # [b, l, h, ...] → [b, h, m, c, ...]; what is added writes nothing
        v = jnp.pad(v.astype(acc), [(0, 0), (0, -v.shape[1] % chunk)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(v.shape[0], -1, chunk, *v.shape[2:]), 3, 1)

    q, k, v, log_decay, beta = (chunked(t) for t in seq)
    within, enters, leaves = _masks(document, chunk)
    total = jnp.cumsum(log_decay, axis=-1)  # L
    lower = jnp.tri(chunk, dtype=bool)[None, None, None] & within
    # Masked before the exponential, which could overflow.
    between = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
    from_start = jnp.where(enters, jnp.exp(total), 0)
    to_end = jnp.where(leaves, jnp.exp(total[..., -1:] - total), 0)
    strictly = jnp.tri(chunk, k=-1, dtype=acc)[None, None, None]
    system = strictly * beta[..., None] * between * matmul("bhmcn,bhmjn->bhmcj", k, k, operand)
    right = beta[..., None] * jnp.concatenate([v, from_start[..., None] * k], axis=-1)
    solved = jax.scipy.linalg.solve_triangular(system, right, lower=True, unit_diagonal=True)
    own, erase = jnp.split(solved, [v.shape[-1]], axis=-1)
    return _Chunk(
        q=from_start[..., None] * q, k=to_end[..., None] * k, own=own, erase=erase,
        scores=between * matmul("bhmcn,bhmjn->bhmcj", q, k, operand), decay=from_start[..., -1],
    )  # fmt: skip


def _masks(document: jax.Array | None, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether two positions [b, 1, m, c, c], a position and S [b, 1, m, c], or S_out, are of one document."""
    if document is None:
        everything = jnp.ones((1, 1, 1, 1), bool)
        return everything[..., None], everything, everything
    document = jnp.pad(document, ((0, 0), (0, -document.shape[1] % chunk)), mode="edge")
    document = document.reshape(document.shape[0], 1, -1, chunk)
    before = jnp.pad(document[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0)))  # the first token continues the state: 0
    same = document[..., :, None] == document[..., None, :]
    return same, document == before[..., None], document == document[..., -1:]
