"""What the Mosaic GPU kernels need of every chunk and head, found by two small Triton kernels.

Phases are the scan's only sums over the whole sequence. They are int32 fractions of a turn, 2^32 to one turn: sums wrap
by themselves and are exact in any order.

Documents need nothing else of the main kernels: at the first token of one the state decays by 2^-200, so that nothing
crosses in float32, and the last token gets no half step of the next. Phases run on, as only differences within a
document count. Every boundary adds 200 to |L|, and float32 then holds L_i - L_j to 2^-24 of that: ten in a chunk cost
2^-13 of a weight, less than bfloat16 does.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# 2 to the power of anything lower is 0 in float32, and bounded terms keep running sums accurate.
_MIN_LOG2_DECAY = tl.constexpr(-152.0)
# Of a document's first token. 2^-200 times s or γ is still 0.
_LOG2_DECAY_BETWEEN_DOCUMENTS = tl.constexpr(-200.0)
# Never 0, so that its gradient can be found by dividing by it.
LEAST_SCALE = tl.constexpr(1e-20)
# 1 / 2π in two parts; the first has few enough bits for the second to repair its rounding.
_TURNS_HIGH = tl.constexpr(0.15917968750)
_TURNS_LOW = tl.constexpr(-2.4744408106e-05)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it to |v| < 2^22 rounds v to an integer
_TURN = tl.constexpr(4294967296.0)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def _turns(angle):
    """Radians as an int32 fraction of a turn; rounds by additions, of which a GPU does eight in the time of a floor."""
    turns = angle * _TURNS_HIGH + angle * _TURNS_LOW
    turns = turns - ((turns + _TO_INTEGER) - _TO_INTEGER)
    return (turns * _TURN).to(tl.int32)


@triton.jit
def _high_part(v):
    """v rounded to eight bits, which bfloat16 holds."""
    bits = v.to(tl.int32, bitcast=True)
    return ((bits + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def coefficients(
    dt_ptr, a_ptr, lam_ptr, omega_ptr, doc_ptr, length,
    coefficient_ptr, rate_ptr, step_ptr,
    H: tl.constexpr, S: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    HAS_DOC: tl.constexpr,
):  # fmt: skip
    """Coefficients of a chunk of T positions for HEADS heads, [b, h, chunks, ROWS, T], and what else needs Δ or ω.

    Rows: L in powers of two; L - log2 s; log2 γ; Δ in two parts that bfloat16 holds; 2^(L_end - L) s. Positions beyond
    the length get Δ = 0. Also ω in two parts of bfloat16, [b, l, 2S], and by how much the chunk turns each phase,
    [b, h, chunks, S]. dt, a and lam are [b, l, h], omega [b, l, S], doc (int32, if HAS_DOC) [b, l]. Steps of PART
    positions are added in float32.
    """
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2)
    chunks = tl.num_programs(0)
    position = tl.arange(0, T)
    head = block * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, S)
    here = head < H
    t = chunk * T + position
    at = (batch * length + t)[:, None] * H + head[None, :]
    mask = (t < length)[:, None] & here[None, :]
    dt = tl.load(dt_ptr + at, mask=mask, other=0.0)
    lam = tl.load(lam_ptr + at, mask=mask, other=0.0)
    a = tl.load(a_ptr + at, mask=mask, other=0.0)
    next_mask = (t + 1 < length)[:, None] & here[None, :]
    next_dt = tl.load(dt_ptr + at + H, mask=next_mask, other=0.0)
    next_lam = tl.load(lam_ptr + at + H, mask=next_mask, other=0.0)

    decay = tl.maximum(dt * a * _LOG2_E, _MIN_LOG2_DECAY)
    half_step = (1.0 - next_lam) * next_dt
    if HAS_DOC:
        doc_at = doc_ptr + batch * length + t
        doc = tl.load(doc_at, mask=t < length, other=0)
        begins = doc != tl.load(doc_at - 1, mask=(t > 0) & (t < length), other=0)
        ends = doc != tl.load(doc_at + 1, mask=t + 1 < length, other=0)
        # A sequence's first token is no beginning, as a state may enter. The half step after its last one is 0 anyway.
        decay = tl.where((begins & (t > 0))[:, None], _LOG2_DECAY_BETWEEN_DOCUMENTS, decay)
        half_step = tl.where(ends[:, None], 0.0, half_step)
    decay = tl.cumsum(decay, 0)
    gamma = lam * dt
    scale = tl.maximum(gamma + half_step, LEAST_SCALE)
    to_end = tl.exp2(tl.min(decay, 0)[None, :] - decay) * scale  # terms are ≤ 0: the last sum is the least
    high = _high_part(dt)

    row_head = batch * H + head
    base = (row_head.to(tl.int64) * chunks + chunk) * (ROWS * T)
    out = coefficient_ptr + base[None, :] + position[:, None]
    mask = here[None, :] & (position < T)[:, None]
    tl.store(out, decay, mask=mask)
    tl.store(out + T, decay - tl.log2(scale), mask=mask)
    tl.store(out + 2 * T, tl.log2(gamma), mask=mask)
    tl.store(out + 3 * T, high, mask=mask)
    tl.store(out + 4 * T, dt - high, mask=mask)
    tl.store(out + 5 * T, to_end, mask=mask)

    omega_at = (batch * length + t)[:, None] * S + column[None, :]
    omega = tl.load(omega_ptr + omega_at, mask=(t < length)[:, None], other=0.0)
    # A few steps are added before they become integers, which takes ten times as long.
    turned = tl.reshape(dt[:, :, None] * omega[:, None, :], (T // PART, PART, HEADS, S))
    steps = tl.sum(_turns(tl.sum(turned, 1)), 0)
    if block == 0:
        high_rate = _high_part(omega)
        rate = rate_ptr + (batch * chunks * T + t)[:, None] * (2 * S) + column[None, :]
        tl.store(rate, high_rate.to(rate_ptr.dtype.element_ty))
        tl.store(rate + S, (omega - high_rate).to(rate_ptr.dtype.element_ty))
    step = step_ptr + (row_head * chunks + chunk)[:, None] * S + column[None, :]
    tl.store(step, steps, mask=here[:, None])


@triton.jit
def phases(
    angle_ptr, step_ptr, coefficient_ptr, chunks,
    start_ptr, last_ptr, total_ptr,
    H: tl.constexpr, S: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, MANY: tl.constexpr, PART: tl.constexpr,
    HAS_ANGLE: tl.constexpr,
):  # fmt: skip
    """Sums over chunks: of phases and of decays.

    The phase before every chunk, [b, h, chunks, S] in [-π, π), and after the last, [b, h, S] in [0, 2π); log2 of the
    decay from the sequence's start to every chunk's end, [b, h, chunks], from what `coefficients` left. A program has
    PART angles of one head and walks MANY chunks at a time. angle is the phase before the first, [b, h, S], or 0.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row_head = batch * H + head
    part = tl.program_id(2)
    column = part * PART + tl.arange(0, PART)
    number = tl.arange(0, MANY)
    phase = tl.zeros((PART,), tl.int32)
    total = 0.0
    if HAS_ANGLE:
        phase = _turns(tl.load(angle_ptr + row_head * S + column))
    for first in range(0, chunks, MANY):
        at = (row_head * chunks + first + number[:, None]) * S + column[None, :]
        mask = (first + number < chunks)[:, None]
        steps = tl.load(step_ptr + at, mask=mask, other=0)
        before = phase[None, :] + tl.cumsum(steps, 0) - steps
        tl.store(start_ptr + at, before.to(tl.float32) * (_TWO_PI / _TURN), mask=mask)
        phase += tl.sum(steps, 0)
        if part == 0:
            here = first + number < chunks
            chunk = row_head * chunks + first + number
            decay = tl.load(coefficient_ptr + chunk.to(tl.int64) * (ROWS * T) + T - 1, mask=here, other=0.0)
            tl.store(total_ptr + chunk, total + tl.cumsum(decay, 0), mask=here)
            total += tl.sum(decay, 0)
    angle = phase.to(tl.float32) * (_TWO_PI / _TURN)
    angle = tl.where(phase < 0, angle + _TWO_PI, angle)
    angle = tl.where(angle >= _TWO_PI, 0.0, angle)  # a tiny negative number plus 2π rounds to 2π
    tl.store(last_ptr + row_head * S + column, angle)
