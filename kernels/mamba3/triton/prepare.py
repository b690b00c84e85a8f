"""What the scan's kernels need of every position and head, found once: the phase and the coefficients of its chunk.

Phases are the scan's only long running sums. A program walks the tiles of a segment of the sequence; with several
segments a first pass (TOTALS_ONLY) finds what each adds to the phase.
"""

import triton
import triton.language as tl

from .pieces import load_omega, running_sums, turn_steps, within

# Adding and subtracting 1.5·2^(23 - k) rounds a float32 to multiples of 2^-k, faster than the conversion unit does.
_TO_UNITS = tl.constexpr(12582912.0)
_TO_256THS = tl.constexpr(49152.0)
_TO_65536THS = tl.constexpr(192.0)


@triton.jit
def _split_turns(dt, omega):
    """Δω in turns less whole turns, as a multiple of 2^-8 and a rest under 2^-9; ω in turns per unit of Δ."""
    turns = dt * omega
    turns = turns - ((turns + _TO_UNITS) - _TO_UNITS)
    high = (turns + _TO_256THS) - _TO_256THS
    return high, turns - high


@triton.jit
def prepare(
    dt_ptr, decay_ptr, omega_ptr, start_phase_ptr, length, tiles,
    phase_ptr, sum_ptr, fine_sum_ptr, total_ptr,
    H: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, EXACT: tl.constexpr, TOTALS_ONLY: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of TILE positions, a multiple of T. dt and decay are [b, h, l].

    Writes the phase at every position, the running sums of the decay in each chunk, and the phase after each segment.
    EXACT: ω in radians, phases in int32, every sum exact. Else ω and the phases between segments are turns in float32,
    and the phases int16: sums in a tile are products with a triangle of ones, exact in their first part, good to 2^-18.
    """
    segment = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    row_head = batch * H + head
    s_column = tl.arange(0, SP)
    row = tl.arange(0, TILE)
    segment_at = (row_head * SEGMENTS + segment) * S
    phase = tl.zeros((SP,), total_ptr.dtype.element_ty)
    if S > 0 and not TOTALS_ONLY:
        phase = tl.load(start_phase_ptr + segment_at + s_column, mask=s_column < S, other=0)
    for tile in range(segment * tiles, tl.minimum((segment + 1) * tiles, tl.cdiv(length, TILE))):
        t = tile * TILE + row
        valid = t < length
        at = row_head * length + t
        if S > 0:
            dt = tl.load(dt_ptr + at, mask=valid, other=0.0)
            omega = load_omega(omega_ptr, batch, head, t, length, s_column, H, S, SP, OMEGA_HEADS)
            if EXACT:
                steps = turn_steps(dt[:, None], omega)
                phases = phase[None, :] + tl.cumsum(steps, 0)
                phase += tl.sum(steps, 0)
            else:
                high, low = _split_turns(dt[:, None], omega)
                if not TOTALS_ONLY:
                    triangle = (row[:, None] >= row[None, :]).to(tl.float16)
                    sums = tl.dot(triangle, low.to(tl.float16))
                    sums = tl.dot(triangle, high.to(tl.float16), sums) + phase[None, :]
                    # The last 16 bits of the sum are multiples of 2^-16 of a turn.
                    phases = (sums + _TO_65536THS).to(tl.int32, bitcast=True)
                phase += tl.sum(high, 0) + tl.sum(low, 0)
                phase -= (phase + _TO_UNITS) - _TO_UNITS
            if not TOTALS_ONLY:
                phase_at = (row_head.to(tl.int64) * length + t) * S
                tl.store(phase_ptr + phase_at[:, None] + s_column[None, :], phases.to(phase_ptr.dtype.element_ty),
                         mask=within(valid, s_column, S, SP))  # fmt: skip
        if not TOTALS_ONLY:
            decay = tl.load(decay_ptr + at, mask=valid, other=0.0)
            coarse, fine = running_sums(tl.reshape(decay, (TILE // T, T)), EXACT)
            tl.store(sum_ptr + at, tl.reshape(coarse, (TILE,)), mask=valid)
            if EXACT:
                tl.store(fine_sum_ptr + at, tl.reshape(fine, (TILE,)), mask=valid)
    if S > 0:
        tl.store(total_ptr + segment_at + s_column, phase, mask=s_column < S)
