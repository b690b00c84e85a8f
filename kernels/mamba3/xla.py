"""The recurrence as chunked matrix products in plain JAX: runs everywhere, differentiates by autodiff.

Notation: a chunk has c positions and r ranks, so c·r rows; a block is m chunks; the sequence is a scan over blocks.
With L_i the running sum of Δ A inside a chunk and s_j = γ_j + (1 - λ_{j+1}) Δ_{j+1} (0 after the last token),

    y_i   = e^{L_i} H_in C_i + Σ_{j<i} e^{L_i - L_j} s_j (C_i·B_j) x_j + γ_i (C_i·B_i) x_i
    H_out = e^{L_end} H_in + Σ_j e^{L_end - L_j} s_j x_j ⊗ B_j

where s_j already holds the next token's half step, so that H_in of a chunk needs no previous token. The same two lines,
one level up, pass H between the chunks of a block. Rotated B and C exist per head only inside a block, whose backward
recomputes them: what a training step keeps of the sequence is H at each block's start.

Documents: positions carry a document number that never decreases; every coupling is masked by equality of numbers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..decay import min_log_decay
from ..documents import number_documents
from ..products import matmul, operand_dtype
from .ends import entering_ssm, leaving_state
from .inputs import Sequence, Weights, accumulator_dtype
from .narrow import rotate_rounded, round_backward, round_forward
from .phases import reduce_turns, running_sums, sum_turns
from .readout import per_rank, readout
from .rotary import TWO_PI, wrap_angle
from .state import Mamba3State

_EXACT = jax.lax.Precision.HIGHEST
# Elements of rotated B in one block: enough to fill a large GPU, small beside its memory.
_BLOCK_ELEMENTS = 2**26
_MAX_CHUNKS_PER_BLOCK = 64


class _Carry(NamedTuple):
    ssm: jax.Array  # [b, h, p, n], with the next token's half step folded in
    turns: jax.Array  # [b, h, s], φ / 2π in [-½, ½]
    document: jax.Array | None  # [b], number of the document it belongs to


class _Block(NamedTuple):
    """A block's inputs; t = m·c positions."""

    x: jax.Array  # [b, t, h, p]
    z: jax.Array | None  # [b, t, h, p]
    b: jax.Array  # [b, t, r, g, n]
    c: jax.Array  # [b, t, r, g, n]
    log_decay: jax.Array  # [b, t, h], Δ A
    gamma: jax.Array  # [b, t, h], λ Δ
    scale: jax.Array  # [b, t, h], s_j
    dt: jax.Array  # [b, t, h]
    omega: jax.Array  # [b, t, s] or [b, t, h, s]
    document: jax.Array | None  # [b, t]; None = one document


class _Masks(NamedTuple):
    """Which couplings exist; without documents the leading axes b and m are absent or 1."""

    same: jax.Array  # [c, c] or [b, m, c, c]: j ≤ i in one document
    ends_same: jax.Array  # [m + 1, m + 1] or [b, 1, m + 1, m + 1]: the same between the ends of chunks
    continues: jax.Array  # [b, 1, m, c] or 1s: position of the document H_in belongs to
    reaches_end: jax.Array  # [b, 1, m, c] or 1s: position of the document H_out belongs to


@functools.partial(jax.jit, static_argnames=("chunk_size", "norm_eps"))
def scan(
    chunk_size: int | None,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State,
    segment_ids: jax.Array | None,
    norm_eps: float,
) -> tuple[jax.Array, Mamba3State]:
    """Same contract as `reference.scan`, chunk_size first (None = 64 rows per chunk)."""
    acc = accumulator_dtype(seq.x)
    batch, length, heads, _ = seq.x.shape
    rank = seq.b.shape[2]
    chunk = min(chunk_size or max(1, 64 // rank), length)
    chunks_per_block = _chunks_per_block(batch, length, heads, rank * seq.b.shape[-1], chunk)

    document = None
    if segment_ids is not None:
        document = number_documents(segment_ids)
    inputs = _coefficients(seq, document, acc)
    blocks = _split_blocks(inputs, length, chunk * chunks_per_block)

    carry = _Carry(
        ssm=entering_ssm(seq, weights, state, acc),
        turns=reduce_turns(state.angle.astype(acc) / TWO_PI),
        document=None if document is None else jnp.zeros(batch, jnp.int32),
    )
    single = blocks.x.shape[0] == 1
    # Inside a scan nothing can merge the recomputation with the forward, so the barrier against it is not needed.
    body = jax.checkpoint(
        functools.partial(_block, weights=weights, chunk=chunk, norm_eps=norm_eps), prevent_cse=single
    )
    if single:
        carry, y = body(carry, jax.tree.map(lambda v: v[0], blocks))
    else:
        carry, y = jax.lax.scan(body, carry, blocks)  # y [blocks, b, t, h, p]
        y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])
    return y[:, :length], leaving_state(wrap_angle(carry.turns * TWO_PI), carry.ssm, seq, weights, acc)


def _chunks_per_block(batch: int, length: int, heads: int, width: int, chunk: int) -> int:
    fitting = _BLOCK_ELEMENTS // (batch * heads * width * chunk)
    wanted = math.ceil(length / chunk)
    return max(1, min(fitting, wanted, _MAX_CHUNKS_PER_BLOCK))


def _coefficients(seq: Sequence, document: jax.Array | None, acc: jnp.dtype) -> _Block:
    dt, a, lam = (v.astype(acc) for v in (seq.dt, seq.a, seq.lam))
    # exp of anything lower is 0, and bounded terms keep the running sums exact (running_sums).
    log_decay = jnp.maximum(dt * a, min_log_decay(acc))
    next_half_step = ((1 - lam) * dt)[:, 1:]
    if document is not None:
        next_half_step = jnp.where((document[:, 1:] == document[:, :-1])[..., None], next_half_step, 0)
    scale = lam * dt + jnp.pad(next_half_step, ((0, 0), (0, 1), (0, 0)))
    return _Block(
        x=seq.x, z=seq.z, b=seq.b, c=seq.c, log_decay=log_decay, gamma=lam * dt, scale=scale, dt=dt,
        omega=seq.omega.astype(acc), document=document,
    )  # fmt: skip


def _split_blocks(inputs: _Block, length: int, block: int) -> _Block:
    """[b, l, ...] → [blocks, b, block, ...], padded with Δ = 0, which changes no state, in the last document."""
    padding = -length % block

    def split(v: jax.Array) -> jax.Array:
        mode = "edge" if v is inputs.document else "constant"
        v = jnp.pad(v, [(0, 0), (0, padding)] + [(0, 0)] * (v.ndim - 2), mode=mode)
        return jnp.moveaxis(v.reshape(v.shape[0], v.shape[1] // block, block, *v.shape[2:]), 1, 0)

    return jax.tree.map(split, inputs)


def _block(carry: _Carry, inputs: _Block, *, weights: Weights, chunk: int, norm_eps: float) -> tuple[_Carry, jax.Array]:
    """m chunks in parallel; returns the next carry and y [b, t, h, p]."""
    acc = inputs.dt.dtype
    heads, rank = inputs.x.shape[2], inputs.b.shape[2]
    operand = operand_dtype(inputs.x.dtype)

    def chunked(v: jax.Array) -> jax.Array:  # [b, t, h, ...] → [b, h, m, c, ...]
        v = v.reshape(v.shape[0], -1, chunk, *v.shape[2:])
        return jnp.moveaxis(v, 3, 1)

    masks = _masks(carry.document, inputs.document, chunk, inputs.dt.shape[1])
    turns, end_turns = _phases(carry.turns, inputs, chunk, masks)
    angle = (turns * TWO_PI)[..., None, :]  # [b, h, m, c, 1, s]
    end_angle = (end_turns * TWO_PI)[..., None, :]  # [b, h, m + 1, 1, s]
    b = rotate_rounded(_per_head(inputs.b, weights.b_bias, heads, chunk, acc), angle, operand)
    c = rotate_rounded(_per_head(inputs.c, weights.c_bias, heads, chunk, acc), angle, operand)
    b, c = (v.reshape(*v.shape[:3], -1, v.shape[-1]) for v in (b, c))  # [b, h, m, c·r, n]
    x = per_rank(chunked(inputs.x).astype(acc)[..., None, :], weights.mimo_x, rank)  # [b, h, m, c, r, p]
    x_rows = x.reshape(*x.shape[:3], -1, x.shape[-1])  # [b, h, m, c·r, p]

    decay, between = _decays(chunked(inputs.log_decay), masks.same)  # [b, h, m, c], [b, h, m, c, c]
    to_end = jnp.where(masks.reaches_end, between[..., -1, :], 0) * chunked(inputs.scale)  # [b, h, m, c]
    diagonal = jnp.eye(chunk, dtype=bool)[None, None, None]
    mix = jnp.where(diagonal, chunked(inputs.gamma)[..., None], between * chunked(inputs.scale)[..., None, :])

    update = matmul("bhmkp,bhmkn->bhmpn", (x * to_end[..., None, None]).reshape(x_rows.shape), b, operand)
    update = round_backward(update, end_angle[:, :, 1:], operand)
    states = _pass_states(carry.ssm, update, decay[..., -1], masks.ends_same)  # [b, h, m + 1, p, n]
    entering = round_forward(states[:, :, :-1], end_angle[:, :, :-1], operand)
    scores = matmul("bhmkn,bhmjn->bhmkj", c, b, operand)
    mix = jnp.repeat(jnp.repeat(mix, rank, axis=-2), rank, axis=-1)
    y = matmul("bhmkj,bhmjp->bhmkp", scores * mix, x_rows, operand)
    from_start = jnp.where(masks.continues, jnp.exp(decay), 0)  # [b, h, m, c]
    y_in = matmul("bhmkn,bhmpn->bhmkp", c, entering, operand)
    y = y.reshape(x.shape) + from_start[..., None, None] * y_in.reshape(x.shape)

    out = _read_out(y, x, inputs.z if inputs.z is None else chunked(inputs.z), weights, norm_eps)
    out = jnp.moveaxis(out, 1, 3).reshape(inputs.x.shape).astype(inputs.x.dtype)
    document = None if inputs.document is None else inputs.document[:, -1]
    return _Carry(ssm=states[:, :, -1], turns=end_turns[:, :, -1], document=document), out


def _masks(previous: jax.Array | None, document: jax.Array | None, chunk: int, length: int) -> _Masks:
    """From the document number before the block [b] and those inside it [b, t]."""
    if document is None:
        everything = jnp.ones((1, 1, 1, 1), bool)
        return _Masks(jnp.tri(chunk, dtype=bool), jnp.tri(length // chunk + 1, dtype=bool), everything, everything)
    document = document.reshape(document.shape[0], -1, chunk)  # [b, m, c]
    ends = jnp.concatenate([previous[:, None], document[:, :, -1]], axis=1)  # [b, m + 1]

    def same(number: jax.Array) -> jax.Array:
        return jnp.tril(number[..., :, None] == number[..., None, :])

    return _Masks(
        same=same(document),
        ends_same=same(ends)[:, None],
        continues=(document == ends[:, :-1, None])[:, None],
        reaches_end=(document == ends[:, 1:, None])[:, None],
    )


def _phases(start: jax.Array, inputs: _Block, chunk: int, masks: _Masks) -> tuple[jax.Array, jax.Array]:
    """Phases in turns, in [-½, ½]: at every position [b, h, m, c, s] and at the ends of chunks [b, h, m + 1, s]."""
    omega = inputs.omega if inputs.omega.ndim == 4 else inputs.omega[:, :, None, :]
    step = reduce_turns(inputs.dt[..., None] * omega / TWO_PI)
    step = jnp.moveaxis(step.reshape(step.shape[0], step.shape[1] // chunk, chunk, *step.shape[2:]), 3, 1)
    inside = sum_turns(step, masks.same)  # [b, h, m, c, s]
    entries = jnp.concatenate([start[:, :, None], inside[:, :, :, -1]], axis=2)  # [b, h, m + 1, s]
    ends = sum_turns(entries[:, :, None], masks.ends_same)[:, :, 0]
    turns = inside + jnp.where(masks.continues[..., None], ends[:, :, :-1, None, :], 0)
    return reduce_turns(turns), ends


def _pass_states(start: jax.Array, update: jax.Array, decay: jax.Array, ends_same: jax.Array) -> jax.Array:
    """H entering each chunk and after the last: [b, h, m + 1, p, n]. `decay` [b, h, m] is L_end of each chunk."""
    decay = jnp.pad(jnp.maximum(decay, min_log_decay(decay.dtype)), ((0, 0), (0, 0), (1, 0)))
    _, between = _decays(decay[:, :, None], ends_same)  # [b, h, 1, m + 1, m + 1]
    terms = jnp.concatenate([start[:, :, None], update], axis=2)
    return jnp.einsum("bhij,bhjpn->bhipn", between[:, :, 0], terms, precision=_EXACT)


def _decays(log_decay: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L [b, h, m, c], running sums of log_decay; and e^{L_i - L_j} where the mask allows, else 0, [b, h, m, c, c]."""
    coarse, fine = running_sums(
        log_decay[..., None], -min_log_decay(log_decay.dtype), jnp.tri(log_decay.shape[-1], dtype=bool)
    )
    difference = (coarse - jnp.swapaxes(coarse, -1, -2)) + (fine - jnp.swapaxes(fine, -1, -2))
    mask = mask[None, None, None] if mask.ndim == 2 else mask[:, None]
    # Masked before the exponential, which could overflow.
    return (coarse + fine)[..., 0], jnp.exp(jnp.where(mask, difference, -jnp.inf))


def _per_head(v: jax.Array, bias: jax.Array | None, heads: int, chunk: int, acc: jnp.dtype) -> jax.Array:
    """[b, t, r, g, n] → [b, h, m, c, r, n] with the bias [h, r, n] added."""
    batch, _, rank, groups, n = v.shape
    v = jnp.moveaxis(v.astype(acc).reshape(batch, -1, chunk, rank, groups, n), 4, 1)  # [b, g, m, c, r, n]
    v = jnp.repeat(v, heads // groups, axis=1)
    return v if bias is None else v + bias.astype(acc)[None, :, None, None]


def _read_out(y: jax.Array, x: jax.Array, z: jax.Array | None, weights: Weights, norm_eps: float) -> jax.Array:
    heads, rank, p = y.shape[1], y.shape[-2], y.shape[-1]

    def expand(w: jax.Array | None, *tail: int) -> jax.Array | None:
        return None if w is None else w.astype(y.dtype).reshape(1, heads, 1, 1, *tail)

    return readout(
        y, x, z, expand(weights.d, 1, 1), expand(weights.mimo_z, rank, p), expand(weights.mimo_o, rank, p),
        expand(weights.norm_weight, 1, p), norm_eps,
    )  # fmt: skip
