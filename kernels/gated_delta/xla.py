"""The gated delta rule as chunked matrix products: in plain JAX everywhere, but for the walk through the chunks.

Notation: L_i is the running sum of the log decay in a chunk of c positions, S [p, n] the state entering it. What a
token writes, u_i, depends on what those before it in the chunk wrote:

    u_i = β_i (v_i - e^{L_i} S k_i - Σ_{j<i} e^{L_i - L_j} (k_j·k_i) u_j)

a triangular system (I + A) U = diag(β) (V - e^L K Sᵀ), solved for all chunks at once but for S (the WY form, arXiv
2406.06484, section 3.2, with decay as in arXiv 2412.06464). Then

    S_out = e^{L_end} S + Σ_j e^{L_end - L_j} u_j k_jᵀ                                                     (walk.py)
    o_i   = e^{L_i} S q_i + Σ_{j≤i} e^{L_i - L_j} (k_j·q_i) u_j

A new document is a decay to 0, by masks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..decay import min_log_decay
from ..documents import number_documents
from ..products import matmul, operand_dtype
from .inputs import Sequence
from .inverse import unit_triangular_inverse
from .walk import Chunks, states

CHUNK = 64  # positions


@functools.partial(jax.jit, static_argnums=(0, 1))
def scan(
    chunk: int, walk: Callable, seq: Sequence, state: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """o [b, l, h, p] and S after the last token; `walk` as in walk.py."""
    length, operand = seq.v.shape[1], operand_dtype(seq.v.dtype)
    document = None if segment_ids is None else number_documents(segment_ids)
    q, scores, chunks = _prepare(seq, document, chunk, state.dtype, operand)
    updates, entering, state = states(walk, chunks, state)
    o = matmul("mbhcn,mbhpn->mbhcp", q, entering.astype(q.dtype), operand)
    o = o + matmul("mbhcj,mbhjp->mbhcp", scores, updates.astype(q.dtype), operand)
    o = jnp.moveaxis(o, (0, 3), (1, 2))  # [m, b, h, c, p] → [b, m, c, h, p]
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length].astype(seq.v.dtype), state


def _prepare(
    seq: Sequence, document: jax.Array | None, chunk: int, acc: jnp.dtype, operand: jnp.dtype
) -> tuple[jax.Array, jax.Array, Chunks]:
    """q times e^L [m, b, h, c, n], 0 where S is of another document; q·k with decay [m, b, h, c, c]; and the chunks."""

    def chunked(v: jax.Array) -> jax.Array:  # [b, l, h, ...] → [m, b, h, c, ...]; what is added writes nothing
        v = jnp.pad(v, [(0, 0), (0, -v.shape[1] % chunk)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(v.shape[0], -1, chunk, *v.shape[2:]), (1, 3), (0, 2))

    narrow_k, v = (chunked(t.astype(operand)) for t in (seq.k, seq.v))
    q, log_decay, beta = (chunked(t).astype(acc) for t in (seq.q, seq.log_decay, seq.beta))
    k = narrow_k.astype(acc)
    within, enters, leaves = _masks(document, chunk)
    # No lower than what leaves nothing of S: differences of large sums would be of few digits.
    total = jnp.cumsum(jnp.maximum(log_decay, min_log_decay(acc)), axis=-1)  # L
    lower = jnp.tri(chunk, dtype=bool)[None, None, None] & within
    # Masked before the exponential, which could overflow.
    between = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
    from_start = jnp.where(enters, jnp.exp(total), 0)
    to_end = jnp.where(leaves, jnp.exp(total[..., -1:] - total), 0)
    strictly = jnp.tri(chunk, k=-1, dtype=acc)[None, None, None]
    system = strictly * beta[..., None] * between * matmul("mbhcn,mbhjn->mbhcj", k, k, operand)
    solve = unit_triangular_inverse(system) * beta[..., None, :]
    chunks = Chunks(
        own=matmul("mbhcj,mbhjp->mbhcp", solve.astype(operand), v, operand),
        write=matmul(
            "mbhcj,mbhjn->mbhcn", (-solve * from_start[..., None, :]).astype(operand), narrow_k, operand
        ),
        read=(to_end[..., None] * k).astype(operand),
        decay=from_start[..., -1],
    )  # fmt: skip
    return from_start[..., None] * q, between * matmul("mbhcn,mbhjn->mbhcj", q, k, operand), chunks


def _masks(document: jax.Array | None, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether two positions [m, b, 1, c, c], a position and S [m, b, 1, c], or S_out, are of one document."""
    if document is None:
        everything = jnp.ones((1, 1, 1, 1), bool)
        return everything[..., None], everything, everything
    document = jnp.pad(document, ((0, 0), (0, -document.shape[1] % chunk)), mode="edge")
    document = jnp.moveaxis(document.reshape(document.shape[0], -1, chunk), 1, 0)[:, :, None]
    before = jnp.pad(document[:-1, ..., -1:], ((1, 0), *3 * [(0, 0)]))  # the first token continues the state: 0
    same = document[..., :, None] == document[..., None, :]
    return same, document == before, document == document[..., -1:]
