"""What the scan's kernels need of every position and head, found once: the phase and the coefficients of its chunk.

Phases are the scan's only long running sums. A program walks the tiles of a segment of the sequence; with several
segments a first pass (TOTALS_ONLY) finds what each adds to the phase.
"""

import triton
import triton.language as tl

from .pieces import load_omega, running_sums, turn_steps, within


@triton.jit
def _sums_in_turns(steps, TILE: tl.constexpr):
    """Running sums over axis 0 of fractions of a turn (int32), float32 in turns, accurate to 2^-18.

    By a product with a triangle of ones: a step is split into two float16 parts, of which sums of the first are exact.
    """
    turns = steps.to(tl.float32) * (1 / 4294967296.0)
    high = tl.floor(turns * 256.0 + 0.5) * (1 / 256.0)
    row = tl.arange(0, TILE)
    triangle = (row[:, None] >= row[None, :]).to(tl.float16)
    sums = tl.dot(triangle, (turns - high).to(tl.float16))
    return tl.dot(triangle, high.to(tl.float16), sums)


@triton.jit
def prepare(
    dt_ptr, decay_ptr, omega_ptr, start_phase_ptr, length, tiles,
    phase_ptr, sum_ptr, fine_sum_ptr, total_ptr,
    H: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, EXACT: tl.constexpr, TOTALS_ONLY: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of TILE positions, a multiple of T. dt and decay are [b, h, l].

    Writes the phase at every position (int16, or int32 if EXACT), the running sums of the decay in each chunk, and the phase
    after each segment.
    """
    segment = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    row_head = batch * H + head
    s_column = tl.arange(0, SP)
    phase = tl.zeros((SP,), tl.int32)
    segment_at = (row_head * SEGMENTS + segment) * S
    if S > 0 and not TOTALS_ONLY:
        phase = tl.load(start_phase_ptr + segment_at + s_column, mask=s_column < S, other=0)
    for tile in range(segment * tiles, tl.minimum((segment + 1) * tiles, tl.cdiv(length, TILE))):
        t = tile * TILE + tl.arange(0, TILE)
        valid = t < length
        at = row_head * length + t
        if S > 0:
            dt = tl.load(dt_ptr + at, mask=valid, other=0.0)
            omega = load_omega(omega_ptr, batch, head, t, length, s_column, H, S, SP, OMEGA_HEADS)
            steps = turn_steps(dt[:, None], omega)
            if not TOTALS_ONLY:
                if EXACT:
                    phases = phase[None, :] + tl.cumsum(steps, 0)
                else:
                    sums = phase.to(tl.float32)[None, :] * (1 / 4294967296.0) + _sums_in_turns(steps, TILE)
                    sums = sums - tl.floor(sums + 0.5)
                    phases = tl.floor(sums * 65536.0 + 0.5).to(tl.int32)
                phase_at = (row_head.to(tl.int64) * length + t) * S
                tl.store(phase_ptr + phase_at[:, None] + s_column[None, :], phases.to(phase_ptr.dtype.element_ty),
                         mask=within(valid, s_column, S, SP))  # fmt: skip
            phase += tl.sum(steps, 0)
        if not TOTALS_ONLY:
            decay = tl.load(decay_ptr + at, mask=valid, other=0.0)
            coarse, fine = running_sums(tl.reshape(decay, (TILE // T, T)), EXACT)
            tl.store(sum_ptr + at, tl.reshape(coarse, (TILE,)), mask=valid)
            if EXACT:
                tl.store(fine_sum_ptr + at, tl.reshape(fine, (TILE,)), mask=valid)
    if S > 0:
        tl.store(total_ptr + segment_at + s_column, phase, mask=s_column < S)
