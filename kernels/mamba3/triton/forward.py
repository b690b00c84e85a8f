"""The forward scan in Triton: one program walks the chunks of a segment of the sequence, H in registers.

    y_i   = e^{L_i} H_in C_i + Σ_{j<i} e^{L_i - L_j} s_j (C_i·B_j) x_j + γ_i (C_i·B_i) x_i + D x_i
    H_out = e^{L_end} H_in + Σ_j e^{L_end - L_j} s_j x_j ⊗ B_j                       (letters as in ../xla.py)

Bias, rotation, skip, gate and the sum over ranks happen in registers; no array with every head's B or C exists. With
several segments, a first pass (STATES_ONLY) finds what each adds to H; every program then adds up those before its own.
"""

import triton
import triton.language as tl

from .pieces import chunk_decays, chunk_rotation, load_rows, mixing, operand_of, per_rank, rotated, sigmoid, within


@triton.jit
def load_state(ptr, at, p_column, turned_column, rest_column, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
               PP: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """H number `at`, coordinates in the kernels' order: the rotated ones, [PP, 2 SP], and the rest, [PP, UP]."""
    at = ptr + at.to(tl.int64) * P * N + p_column[:, None] * N
    in_p = p_column < P
    turned = tl.zeros((PP, 1), ptr.dtype.element_ty)
    rest = tl.zeros((PP, 1), ptr.dtype.element_ty)
    if S > 0:
        turned = tl.load(at + turned_column[None, :], mask=in_p[:, None] & (turned_column < 2 * S)[None, :], other=0.0)
    if UP > 0:
        mask = in_p[:, None] & (rest_column < N - 2 * S)[None, :]
        rest = tl.load(at + 2 * S + rest_column[None, :], mask=mask, other=0.0)
    return turned, rest


@triton.jit
def store_state(ptr, at, turned, rest, p_column, turned_column, rest_column, P: tl.constexpr, N: tl.constexpr,
                S: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """The converse of `load_state`."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    at = ptr + at.to(tl.int64) * P * N + p_column[:, None] * N
    in_p = p_column < P
    if S > 0:
        mask = in_p[:, None] & (turned_column < 2 * S)[None, :]
        tl.store(at + turned_column[None, :], turned.to(dtype), mask=mask)
    if UP > 0:
        mask = in_p[:, None] & (rest_column < N - 2 * S)[None, :]
        tl.store(at + 2 * S + rest_column[None, :], rest.to(dtype), mask=mask)


@triton.jit
def forward(
    x_ptr, z_ptr, b_ptr, c_ptr, b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr, d_ptr, doc_ptr,
    phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr,
    ssm_ptr, segment_ssm_ptr, segment_decay_ptr, length, chunks, rows,
    y_ptr, last_ssm_ptr, last_decay_ptr, chunk_ssm_ptr, y_row_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr,
    HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    ROW_OUTPUT: tl.constexpr, HAS_DOC: tl.constexpr, STATES_ONLY: tl.constexpr, SAVE: tl.constexpr,
    EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One segment of one head of one batch row: `chunks` chunks. Letters in pieces.py; PP, SP, UP: P, S, N - 2S padded.

    ROW_OUTPUT: y of every rank, [b, l, h, r, p], instead of their sum.
    STATES_ONLY: from a zero state; writes H and decay of every segment to last_*, and no y.
    SAVE: writes H entering every chunk, and y of every rank before the gate, [b, l, h, r, p].
    """
    ROWS: tl.constexpr = T * R
    segment = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    operand = x_ptr.dtype.element_ty
    row_head = batch * H + head
    group = head // (H // G)
    weights_of = batch // rows * H + head

    row = tl.arange(0, ROWS)
    rank = row % R
    p_column = tl.arange(0, PP)
    s_column = tl.arange(0, SP)
    turned_column = tl.arange(0, 2 * SP)
    rest_column = tl.arange(0, UP) if UP > 0 else tl.arange(0, 1)

    turned = tl.zeros((PP, 2 * SP), tl.float32)
    rest = tl.zeros((PP, UP if UP > 0 else 1), tl.float32)
    segment_decay = 1.0
    if not STATES_ONLY:
        turned, rest = load_state(ssm_ptr, row_head, p_column, turned_column, rest_column, P, N, S, PP, UP)
        for index in range(0, segment):
            earlier = row_head * SEGMENTS + index
            more, more_rest = load_state(
                segment_ssm_ptr, earlier, p_column, turned_column, rest_column, P, N, S, PP, UP
            )
            decay = tl.load(segment_decay_ptr + earlier)
            turned = decay * turned + more
            rest = decay * rest + more_rest

    first_chunk = segment * chunks
    stop = tl.minimum(first_chunk + chunks, tl.cdiv(length, T))
    for chunk in tl.range(first_chunk, stop, num_stages=STAGES):
        start = chunk * T
        t = start + row // R
        valid = t < length
        coarse, fine, scale, doc, to_end, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
        x_at = ((batch * length + t) * H + head) * P
        x_mask = within(valid, p_column, P, PP)
        x = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
        if HAS_MIMO_X:
            x = x.to(tl.float32) * per_rank(mimo_x_ptr + weights_of * R * P, rank, p_column, P, PP, R, P)
            x = operand_of(x, operand, PRECISION)

        if SAVE:
            chunk_at = row_head * tl.cdiv(length, T) + chunk
            entering = operand_of(turned, operand, PRECISION)
            entering_rest = operand_of(rest, operand, PRECISION)
            store_state(chunk_ssm_ptr, chunk_at, entering, entering_rest, p_column, turned_column, rest_column,
                        P, N, S, UP)  # fmt: skip

        bias_at = weights_of * R * N
        if S > 0:
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
            b_turned = rotated(b_ptr, b_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                               HAS_B_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
        if UP > 0:
            b_rest = load_rows(
                b_ptr + 2 * S, b_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_B_BIAS, R, N,
            )  # fmt: skip
            b_rest = operand_of(b_rest, operand, PRECISION)

        if not STATES_ONLY:
            scores = tl.zeros((ROWS, ROWS), tl.float32)
            y = tl.zeros((ROWS, PP), tl.float32)
            if S > 0:
                c_turned = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                                   HAS_C_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
                scores = tl.dot(c_turned, tl.trans(b_turned), scores, input_precision=PRECISION)
                y = tl.dot(c_turned, tl.trans(operand_of(turned, operand, PRECISION)), y, input_precision=PRECISION)
            if UP > 0:
                c_rest = load_rows(
                    c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                    HAS_C_BIAS, R, N,
                )  # fmt: skip
                c_rest = operand_of(c_rest, operand, PRECISION)
                scores = tl.dot(c_rest, tl.trans(b_rest), scores, input_precision=PRECISION)
                y = tl.dot(c_rest, tl.trans(operand_of(rest, operand, PRECISION)), y, input_precision=PRECISION)
            gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)
            mix = mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)
            scores = operand_of(scores * mix, operand, PRECISION)
            y = tl.dot(scores, x, y * from_start[:, None], input_precision=PRECISION)

            if HAS_D:
                y += tl.load(d_ptr + weights_of).to(tl.float32) * x.to(tl.float32)
            if SAVE:
                tl.store(y_row_ptr + (x_at * R + rank * P)[:, None] + p_column[None, :], y.to(operand), mask=x_mask)
            if HAS_Z:
                gate = tl.load(z_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0).to(tl.float32)
                if HAS_MIMO_Z:
                    gate *= per_rank(mimo_z_ptr + weights_of * R * P, rank, p_column, P, PP, R, P)
                y *= gate * sigmoid(gate, FAST)
            if HAS_MIMO_O:
                y *= per_rank(mimo_o_ptr + weights_of * R * P, rank, p_column, P, PP, R, P)
            if ROW_OUTPUT or R == 1:
                tl.store(y_ptr + (x_at * R + rank * P)[:, None] + p_column[None, :], y.to(operand), mask=x_mask)
            else:
                t_out = start + tl.arange(0, T)
                y_at = ((batch * length + t_out) * H + head) * P
                y = tl.sum(tl.reshape(y, (T, R, PP)), 1)
                tl.store(y_ptr + y_at[:, None] + p_column[None, :], y.to(operand),
                         mask=within(t_out < length, p_column, P, PP))  # fmt: skip

        added = tl.trans(operand_of(x.to(tl.float32) * to_end[:, None], operand, PRECISION))
        if S > 0:
            turned = tl.dot(added, b_turned, turned * end_decay, input_precision=PRECISION)
        if UP > 0:
            rest = tl.dot(added, b_rest, rest * end_decay, input_precision=PRECISION)
        segment_decay *= end_decay

    if STATES_ONLY or segment == SEGMENTS - 1:
        out = row_head
        if STATES_ONLY:
            out = row_head * SEGMENTS + segment
            tl.store(last_decay_ptr + out, segment_decay)
        store_state(last_ssm_ptr, out, turned, rest, p_column, turned_column, rest_column, P, N, S, UP)
