"""What the scan's kernels need of every position and head, found once: the phase and the coefficients of its chunk.

Phases are the scan's only long running sums. A program walks the tiles of a segment of the sequence; with several
segments a first pass (TOTALS_ONLY) finds what each adds to the phase.
"""

import triton
import triton.language as tl

from .pieces import load_omega, log2_decay, running_sums, turn_steps, within


@triton.jit
def prepare(
    dt_ptr, a_ptr, lam_ptr, omega_ptr, doc_ptr, start_phase_ptr, length, tiles,
    phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, total_ptr,
    H: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, HAS_DOC: tl.constexpr, EXACT: tl.constexpr, TOTALS_ONLY: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of TILE positions, a multiple of T; phases are written as int16, or int32 if EXACT."""
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
        at = (batch * length + t) * H + head
        dt = tl.load(dt_ptr + at, mask=valid, other=0.0)
        if S > 0:
            omega = load_omega(omega_ptr, batch, head, t, length, s_column, H, S, SP, OMEGA_HEADS)
            steps = turn_steps(dt[:, None], omega)
            if not TOTALS_ONLY:
                phases = phase[None, :] + tl.cumsum(steps, 0)
                if not EXACT:
                    phases = (phases + 32768) >> 16
                phase_at = (row_head.to(tl.int64) * length + t) * S
                tl.store(phase_ptr + phase_at[:, None] + s_column[None, :], phases.to(phase_ptr.dtype.element_ty),
                         mask=within(valid, s_column, S, SP))  # fmt: skip
            phase += tl.sum(steps, 0)
        if not TOTALS_ONLY:
            lam = tl.load(lam_ptr + at, mask=valid, other=0.0)
            follows = t + 1 < length
            half_step = 1 - tl.load(lam_ptr + at + H, mask=follows, other=0.0)
            half_step *= tl.load(dt_ptr + at + H, mask=follows, other=0.0)
            if HAS_DOC:
                doc_at = doc_ptr + batch * length
                same = tl.load(doc_at + tl.minimum(t, length - 1)) == tl.load(doc_at + tl.minimum(t + 1, length - 1))
                half_step = tl.where(same, half_step, 0.0)
            decay = log2_decay(dt, tl.load(a_ptr + at, mask=valid, other=0.0))
            coarse, fine = running_sums(tl.reshape(decay, (TILE // T, T)), EXACT)
            out = row_head * length + t
            tl.store(decay_ptr + out, tl.reshape(coarse, (TILE,)), mask=valid)
            if EXACT:
                tl.store(fine_decay_ptr + out, tl.reshape(fine, (TILE,)), mask=valid)
            tl.store(gamma_ptr + out, lam * dt, mask=valid)
            # Never 0, so that the backward pass can divide by it.
            tl.store(scale_ptr + out, tl.maximum(lam * dt + half_step, 1e-20), mask=valid)
    if S > 0:
        tl.store(total_ptr + segment_at + s_column, phase, mask=s_column < S)
