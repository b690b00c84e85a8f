"""What the SISO gradients' kernel leaves, made into gradients of the inputs: one Triton kernel, as launches cost."""

import triton
import triton.language as tl

from ..cotangents import LEAST_LOG_DECAY
from .prepare import LEAST_SCALE

_LEAST_LOG_DECAY = tl.constexpr(LEAST_LOG_DECAY)


@triton.jit
def _rows(vector_ptr, base, t, mask, row: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr):
    """A row of the vectors at positions t of some heads, [positions, heads]; base: of each head."""
    at = (t // T) * (VECTORS * T) + row * T + t % T
    return tl.load(vector_ptr + base[None, :] + at[:, None], mask=mask, other=0.0)


@triton.jit
def of_coefficients(
    chunk, batch, chunks, head, dt_ptr, a_ptr, lam_ptr, doc_ptr, last_ptr, length, ddt_ptr, da_ptr, dlam_ptr,
    query, key, key_before, gamma, turn, beyond,
    H: tl.constexpr, T: tl.constexpr, HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of Δ, A and λ, [b, l, h], of a chunk of T positions and some heads.

    A step of the decay reaches every later position of its chunk, and beyond it what H passes on. last, if HAS_LAST: of
    the log decay beyond the last token, [b, h]. The others are found, [T, heads]: of the log decay by a position as a
    query and as a key, the latter of the position before, too, of γ, of Δ by phases; and of the decay beyond the
    chunk, [heads].
    """
    t = chunk * T + tl.arange(0, T)
    mask = (t < length)[:, None] & (head < H)[None, :]
    before = mask & (t > 0)[:, None]
    after = mask & (t + 1 < length)[:, None]
    at = (batch * length + t)[:, None] * H + head[None, :]
    dt = tl.load(dt_ptr + at, mask=mask, other=0.0)
    a = tl.load(a_ptr + at, mask=mask, other=0.0)
    lam = tl.load(lam_ptr + at, mask=mask, other=0.0)
    dt_before = tl.load(dt_ptr + at - H, mask=before, other=0.0)
    lam_before = tl.load(lam_ptr + at - H, mask=before, other=0.0)
    dt_after = tl.load(dt_ptr + at + H, mask=after, other=0.0)
    lam_after = tl.load(lam_ptr + at + H, mask=after, other=0.0)

    half_step = (1.0 - lam) * dt
    half_step_after = (1.0 - lam_after) * dt_after
    begins = t < 0
    if HAS_DOC:
        doc_at = doc_ptr + batch * length + t
        doc = tl.load(doc_at, mask=t < length, other=0)
        begins = (t > 0) & (doc != tl.load(doc_at - 1, mask=(t > 0) & (t < length), other=0))
        ends = doc != tl.load(doc_at + 1, mask=t + 1 < length, other=0)
        half_step_after = tl.where(ends[:, None], 0.0, half_step_after)
    scale = key / tl.maximum(lam * dt + half_step_after, LEAST_SCALE)
    # What a document's first token adds by halves to the token before is nothing.
    scale_before = key_before / tl.maximum(lam_before * dt_before + half_step, LEAST_SCALE)
    scale_before = tl.where(begins[:, None], 0.0, scale_before)
    beyond = tl.where(chunk + 1 < chunks, beyond, 0.0)  # the kernel saw no H after the last chunk
    if HAS_LAST:
        last = tl.load(last_ptr + batch * H + head, mask=head < H, other=0.0)
        beyond = tl.where(chunk + 1 < chunks, beyond, last)
    decay = tl.cumsum(query - key, 0, reverse=True) + beyond[None, :]
    # Nothing enters a document's first token; and what too little passes is only rounding.
    decay = tl.where(begins[:, None] | (dt * a < _LEAST_LOG_DECAY), 0.0, decay)

    own = scale + gamma
    tl.store(ddt_ptr + at, a * decay + lam * own + (1.0 - lam) * scale_before + turn, mask=mask)
    tl.store(da_ptr + at, dt * decay, mask=mask)
    tl.store(dlam_ptr + at, dt * (own - scale_before), mask=mask)


@triton.jit
def _coefficients(
    chunk, block, batch, chunks,
    dt_ptr, a_ptr, lam_ptr, doc_ptr, vector_ptr, last_ptr, length,
    ddt_ptr, da_ptr, dlam_ptr,
    H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, VECTORS: tl.constexpr,
    OVERLAP: tl.constexpr, SCORE: tl.constexpr, FLOW: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    TURN: tl.constexpr, HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """`of_coefficients` of HEADS heads. vectors: [b, h, chunks, VECTORS, T] (gradients.py)."""
    head = block * HEADS + tl.arange(0, HEADS)
    t = chunk * T + tl.arange(0, T)
    base = (batch * H + head).to(tl.int64) * (chunks * VECTORS * T)
    here = tl.broadcast_to((head < H)[None, :], (T, HEADS))
    overlap = _rows(vector_ptr, base, t, here, OVERLAP, T, VECTORS)
    score = _rows(vector_ptr, base, t, here, SCORE, T, VECTORS)
    flow = _rows(vector_ptr, base, t, here, FLOW, T, VECTORS)
    query = _rows(vector_ptr, base, t, here, QUERY, T, VECTORS)
    key = _rows(vector_ptr, base, t, here, KEY, T, VECTORS)
    key_before = _rows(vector_ptr, base, t - 1, here & (t > 0)[:, None], KEY, T, VECTORS)
    turn = _rows(vector_ptr, base, t, here, TURN, T, VECTORS)
    of_coefficients(
        chunk, batch, chunks, head, dt_ptr, a_ptr, lam_ptr, doc_ptr, last_ptr, length, ddt_ptr, da_ptr, dlam_ptr,
        query, key, key_before, score * overlap, turn, tl.sum(flow, 0), H, T, HAS_DOC, HAS_LAST,
    )  # fmt: skip


@triton.jit
def _weights(
    head, part, rows, chunks,
    bias_ptr, vector_ptr,
    b_ptr, c_ptr, d_ptr,
    H: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of B's and C's biases, [h, N], and of D, [h], from parts of so many rows, chunks of sequences.

    biases: [rows, h, 2, N], sums over the heads of a block of BLOCK up to each. A program has one head and PART columns
    of both biases side by side, of which its part is one.
    """
    column = part * PART + tl.arange(0, PART)
    is_first = head % BLOCK == 0
    total = tl.zeros((PART,), tl.float32)
    overlaps = tl.zeros((T,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        here = row < rows
        at = (row * H + head) * (2 * N)
        own = tl.load(bias_ptr + at[:, None] + column[None, :], mask=here[:, None], other=0.0)
        mask = (here & (not is_first))[:, None]
        before = tl.load(bias_ptr + at[:, None] - 2 * N + column[None, :], mask=mask, other=0.0)
        total += tl.sum(own - before, 0)
        if part == 0:
            number = ((row // chunks * H + head) * chunks + row % chunks).to(tl.int64)
            place = number[:, None] * (VECTORS * T) + (OVERLAP * T + tl.arange(0, T))[None, :]
            overlaps += tl.sum(tl.load(vector_ptr + place, mask=here[:, None], other=0.0), 0)
    if part == 0:
        tl.store(d_ptr + head, tl.sum(overlaps, 0))
    if part < N // PART:
        tl.store(b_ptr + head * N + column, total)
    else:
        tl.store(c_ptr + head * N - N + column, total)


@triton.jit
def _sum(ptr, first, size, at, BLOCKS: tl.constexpr):
    total = tl.load(ptr + first * size + at).to(tl.float32)
    for block in tl.static_range(1, BLOCKS):
        total += tl.load(ptr + (first + block) * size + at).to(tl.float32)
    return total


@triton.jit
def _blocks(
    number, group, rows,
    b_ptr, c_ptr, omega_ptr,
    sum_b_ptr, sum_c_ptr, sum_omega_ptr,
    G: tl.constexpr, PER: tl.constexpr, N: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of heads: B and C, [G · PER, rows, N], over those of each group, [rows, G, N]; ω over all.

    ω: [G · PER, rows, S] → [rows, S]. A program has ROWS rows, by which their number can be divided, of one group.
    """
    row = (number * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, N)[None, :]
    to = (row * G + group) * N + column
    db = _sum(b_ptr, group * PER, rows * N, row * N + column, PER)
    dc = _sum(c_ptr, group * PER, rows * N, row * N + column, PER)
    tl.store(sum_b_ptr + to, db.to(sum_b_ptr.dtype.element_ty))
    tl.store(sum_c_ptr + to, dc.to(sum_c_ptr.dtype.element_ty))
    if group == 0:
        at = row * S + tl.arange(0, S)[None, :]
        tl.store(sum_omega_ptr + at, _sum(omega_ptr, 0, rows * S, at, G * PER))


@triton.jit
def finish(
    dt_ptr, a_ptr, lam_ptr, doc_ptr, vector_ptr, last_ptr, bias_ptr, b_ptr, c_ptr, omega_ptr,
    length, chunks, batches,
    ddt_ptr, da_ptr, dlam_ptr, b_bias_ptr, c_bias_ptr, d_ptr, sum_b_ptr, sum_c_ptr, sum_omega_ptr,
    H: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, VECTORS: tl.constexpr,
    OVERLAP: tl.constexpr, SCORE: tl.constexpr, FLOW: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
    TURN: tl.constexpr, HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    G: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr, HAS_BLOCKS: tl.constexpr,
):  # fmt: skip
    """All of it: programs for weights, which take longest, then for coefficients, then for sums over blocks, if any."""
    number = tl.program_id(0)
    parts: tl.constexpr = 2 * N // BIAS_COLUMNS
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    others = number - H * parts
    if others < 0:
        _weights(
            number // parts, number % parts, batches * chunks, chunks, bias_ptr, vector_ptr, b_bias_ptr, c_bias_ptr,
            d_ptr, H, T, VECTORS, OVERLAP, BLOCK, N, BIAS_ROWS, BIAS_COLUMNS,
        )  # fmt: skip
    elif others < chunks * blocks * batches:
        _coefficients(
            others % chunks, others // chunks % blocks, others // (chunks * blocks), chunks,
            dt_ptr, a_ptr, lam_ptr, doc_ptr, vector_ptr, last_ptr, length, ddt_ptr, da_ptr, dlam_ptr,
            H, T, HEADS, VECTORS, OVERLAP, SCORE, FLOW, QUERY, KEY, TURN, HAS_DOC, HAS_LAST,
        )  # fmt: skip
    elif HAS_BLOCKS:
        others -= chunks * blocks * batches
        _blocks(
            others // G, others % G, batches * chunks * T, b_ptr, c_ptr, omega_ptr, sum_b_ptr, sum_c_ptr,
            sum_omega_ptr, G, PER, N, S, ROWS,
        )  # fmt: skip
