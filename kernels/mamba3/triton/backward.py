"""The backward scan in Triton: G, the gradient of H, chunk by chunk from the end; then the rest, chunks in parallel.

With g = ∂/∂y (before the gate), M_ij = g_i·x_j, mix_ij as in `mixing`, w_j = e^{L_end - L_j} s_j:

    G_in  = e^{L_end} G_out + Σ_i e^{L_i} g_i ⊗ C_i                                           (`state_gradients`)
    dx_j  = Σ_i mix_ij (C_i·B_j) g_i + w_j G_out B_j + D g_j                                  (`value_gradients`)
    dB_j  = Σ_i mix_ij M_ij C_i + w_j G_outᵀ x_j                                              (`key_gradients`)
    dC_i  = Σ_j mix_ij M_ij B_j + e^{L_i} H_inᵀ g_i

What L_i scales is g_i·y_i, and x_i·dx_i, less their parts from γ_i and D. A step of the decay or of the phase reaches
every later position, so their gradients are sums from the end of the chunk; what lies beyond the chunk is in two
contractions of G_out and H_out (`flows`).
"""

import triton
import triton.language as tl

from .forward import load_state, store_state
from .pieces import (
    chunk_decays,
    chunk_rotation,
    load_omega,
    load_rows,
    mixing,
    operand_of,
    per_rank,
    rotated,
    unpair,
    within,
)


@triton.jit
def state_gradients(
    g_ptr, c_ptr, c_bias_ptr, doc_ptr, phase_ptr, decay_ptr, fine_decay_ptr, scale_ptr,
    last_grad_ptr, segment_grad_ptr, segment_decay_ptr, length, chunks, rows,
    chunk_grad_ptr, first_grad_ptr, first_decay_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_C_BIAS: tl.constexpr, HAS_DOC: tl.constexpr, STATES_ONLY: tl.constexpr,
    EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G after every chunk of one segment, and before its first (segment 0). STATES_ONLY: as in `forward`."""
    ROWS: tl.constexpr = T * R
    segment = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    operand = g_ptr.dtype.element_ty
    row_head = batch * H + head
    group = head // (H // G)
    weights_of = batch // rows * H + head
    all_chunks = tl.cdiv(length, T)

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
        turned, rest = load_state(last_grad_ptr, row_head, p_column, turned_column, rest_column, P, N, S, PP, UP)
        for back in range(0, SEGMENTS - 1 - segment):
            later = row_head * SEGMENTS + SEGMENTS - 1 - back
            more, more_rest = load_state(segment_grad_ptr, later, p_column, turned_column, rest_column, P, N, S, PP, UP)
            decay = tl.load(segment_decay_ptr + later)
            turned = decay * turned + more
            rest = decay * rest + more_rest

    first_chunk = segment * chunks
    stop = tl.minimum(first_chunk + chunks, all_chunks)
    for back in tl.range(0, stop - first_chunk, num_stages=STAGES):
        chunk = stop - 1 - back
        start = chunk * T
        t = start + row // R
        valid = t < length
        if not STATES_ONLY:
            chunk_at = row_head * all_chunks + chunk
            leaving = operand_of(turned, operand, PRECISION)
            leaving_rest = operand_of(rest, operand, PRECISION)
            store_state(chunk_grad_ptr, chunk_at, leaving, leaving_rest, p_column, turned_column, rest_column,
                        P, N, S, UP)  # fmt: skip
        _, _, _, _, _, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        g_at = (((batch * length + t) * H + head) * R + rank) * P
        g = tl.load(g_ptr + g_at[:, None] + p_column[None, :], mask=within(valid, p_column, P, PP), other=0.0)
        added = tl.trans(operand_of(g.to(tl.float32) * from_start[:, None], operand, PRECISION))
        row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
        bias_at = weights_of * R * N
        if S > 0:
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
            c_turned = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                               HAS_C_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
            turned = tl.dot(added, c_turned, turned * end_decay, input_precision=PRECISION)
        if UP > 0:
            c_rest = load_rows(
                c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_C_BIAS, R, N,
            )  # fmt: skip
            c_rest = operand_of(c_rest, operand, PRECISION)
            rest = tl.dot(added, c_rest, rest * end_decay, input_precision=PRECISION)
        segment_decay *= end_decay

    if STATES_ONLY or segment == 0:
        out = row_head
        if STATES_ONLY:
            out = row_head * SEGMENTS + segment
            tl.store(first_decay_ptr + out, segment_decay)
        store_state(first_grad_ptr, out, turned, rest, p_column, turned_column, rest_column, P, N, S, UP)


@triton.jit
def flows(
    chunk_ssm_ptr, chunk_grad_ptr, length, decay_flow_ptr, phase_flow_ptr,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr,
    UP: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """⟨G, H⟩ between a chunk and the next, and its derivative by each phase, of both as rounded for products."""
    chunk = tl.program_id(0)
    row_head = tl.program_id(2) * H + tl.program_id(1)
    at = row_head * tl.cdiv(length, T) + chunk
    p_column = tl.arange(0, PP)
    turned_column = tl.arange(0, 2 * SP)
    rest_column = tl.arange(0, UP) if UP > 0 else tl.arange(0, 1)
    grad, grad_rest = load_state(chunk_grad_ptr, at, p_column, turned_column, rest_column, P, N, S, PP, UP)
    ssm, ssm_rest = load_state(chunk_ssm_ptr, at + 1, p_column, turned_column, rest_column, P, N, S, PP, UP)
    decay_flow = tl.sum(tl.sum(grad_rest.to(tl.float32) * ssm_rest.to(tl.float32), 1), 0)
    if S > 0:
        s_column = tl.arange(0, SP)
        grad_real, grad_imag = unpair(grad.to(tl.float32))
        ssm_real, ssm_imag = unpair(ssm.to(tl.float32))
        decay_flow += tl.sum(tl.sum(grad_real * ssm_real + grad_imag * ssm_imag, 1), 0)
        phase_flow = tl.sum(grad_imag * ssm_real - grad_real * ssm_imag, 0)
        tl.store(phase_flow_ptr + at.to(tl.int64) * S + s_column, phase_flow, mask=s_column < S)
    tl.store(decay_flow_ptr + at, decay_flow)


@triton.jit
def _over_ranks(v, T: tl.constexpr, R: tl.constexpr):
    """Sums of the ranks of each position: [T·R, ...] → [T, ...]."""
    if R == 1:
        return v
    elif len(v.shape) == 1:
        return tl.sum(tl.reshape(v, (T, R)), 1)
    else:
        return tl.sum(tl.reshape(v, (T, R, v.shape[1])), 1)


@triton.jit
def _store_over_positions(ptr, v, column, WIDTH: tl.constexpr, STRIDE: tl.constexpr, T: tl.constexpr, R: tl.constexpr):
    """Sums of the positions of each rank: [T·R, columns] → [R, STRIDE] at ptr."""
    if R == 1:
        tl.store(ptr + column, tl.sum(v, 0), mask=column < WIDTH)
    else:
        sums = tl.sum(tl.reshape(v, (T, R, v.shape[1])), 0)
        tl.store(ptr + tl.arange(0, R)[:, None] * STRIDE + column[None, :], sums, mask=(column < WIDTH)[None, :])


@triton.jit
def _store_rows(ptr, at, v, valid, column, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    tl.store(ptr + at[:, None] + column[None, :], v.to(ptr.dtype.element_ty), mask=within(valid, column, WIDTH, PADDED))


@triton.jit
def value_gradients(
    x_ptr, b_ptr, c_ptr, b_bias_ptr, c_bias_ptr, mimo_x_ptr, d_ptr, doc_ptr,
    phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, chunk_grad_ptr, g_ptr, length, rows,
    dx_ptr, dscale_ptr, dgamma_ptr, dd_ptr, dmimo_x_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr,
    HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_D: tl.constexpr,
    HAS_DOC: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dx, ds, dγ, and the chunk's share of dD and dmimo_x."""
    ROWS: tl.constexpr = T * R
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    chunks = tl.cdiv(length, T)
    operand = x_ptr.dtype.element_ty
    row_head = batch * H + head
    group = head // (H // G)
    weights_of = batch // rows * H + head
    share = ((batch * chunks + chunk) * H + head).to(tl.int64)

    row = tl.arange(0, ROWS)
    rank = row % R
    p_column = tl.arange(0, PP)
    s_column = tl.arange(0, SP)
    turned_column = tl.arange(0, 2 * SP)
    rest_column = tl.arange(0, UP) if UP > 0 else tl.arange(0, 1)
    start = chunk * T
    t = start + row // R
    valid = t < length
    x_mask = within(valid, p_column, P, PP)
    x_at = ((batch * length + t) * H + head) * P
    row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
    bias_at = weights_of * R * N
    weight_at = weights_of * R * P
    position = start + tl.arange(0, T)
    in_sequence = position < length

    coarse, fine, scale, doc, to_end, _, _ = chunk_decays(
        decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
    )
    grad, grad_rest = load_state(
        chunk_grad_ptr, row_head * chunks + chunk, p_column, turned_column, rest_column, P, N, S, PP, UP
    )
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    dx = tl.zeros((ROWS, PP), tl.float32)
    if S > 0:
        cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
        b_turned = rotated(b_ptr, b_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                           HAS_B_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
        dx = tl.dot(b_turned, tl.trans(grad), dx, input_precision=PRECISION)
        c_turned = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                           HAS_C_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
        scores = tl.dot(c_turned, tl.trans(b_turned), scores, input_precision=PRECISION)
    if UP > 0:
        b_rest = load_rows(
            b_ptr + 2 * S, b_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
            HAS_B_BIAS, R, N,
        )  # fmt: skip
        b_rest = operand_of(b_rest, operand, PRECISION)
        dx = tl.dot(b_rest, tl.trans(grad_rest), dx, input_precision=PRECISION)
        c_rest = load_rows(
            c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
            HAS_C_BIAS, R, N,
        )  # fmt: skip
        c_rest = operand_of(c_rest, operand, PRECISION)
        scores = tl.dot(c_rest, tl.trans(b_rest), scores, input_precision=PRECISION)

    x_own = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
    g_at = (x_at * R + rank * P)[:, None] + p_column[None, :]
    g = tl.load(g_ptr + g_at, mask=x_mask, other=0.0)
    gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)
    x = x_own
    if HAS_MIMO_X:
        x = x_own.to(tl.float32) * per_rank(mimo_x_ptr + weight_at, rank, p_column, P, PP, R, P)
        x = operand_of(x, operand, PRECISION)
    overlaps = tl.dot(g, tl.trans(x), input_precision=PRECISION)
    same = (row // R)[:, None] == (row // R)[None, :]
    on_diagonal = tl.sum(tl.where(same, overlaps * scores, 0.0), 1)
    mixed = scores * mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)
    mixed = operand_of(mixed, operand, PRECISION)
    dx = tl.dot(tl.trans(mixed), g, dx * to_end[:, None], input_precision=PRECISION)

    g_wide = g.to(tl.float32)
    x_wide = x.to(tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + weights_of).to(tl.float32)
        tl.store(dd_ptr + share, tl.sum(tl.sum(x_wide * g_wide, 1), 0))
    at = row_head * length + position
    by_scale = _over_ranks(tl.sum(dx * x_wide, 1) - gamma * on_diagonal, T, R)
    tl.store(dscale_ptr + at, by_scale / tl.load(scale_ptr + at, mask=in_sequence, other=1.0), mask=in_sequence)
    tl.store(dgamma_ptr + at, _over_ranks(on_diagonal, T, R), mask=in_sequence)

    if HAS_D:
        dx += skip * g_wide
    if HAS_MIMO_X:
        _store_over_positions(dmimo_x_ptr + share * R * P, dx * x_own.to(tl.float32), p_column, P, P, T, R)
        dx *= per_rank(mimo_x_ptr + weight_at, rank, p_column, P, PP, R, P)
    dx_at = ((batch * length + position) * H + head) * P
    _store_rows(dx_ptr, dx_at, _over_ranks(dx, T, R), in_sequence, p_column, P, PP)


@triton.jit
def key_gradients(
    x_ptr, g_ptr, dt_ptr, omega_ptr, own_ptr, other_ptr, own_bias_ptr, other_bias_ptr, mimo_x_ptr, doc_ptr,
    phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, state_ptr, length, rows,
    down_ptr, dbias_ptr, domega_ptr, dturn_ptr, ddecay_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, HEADS: tl.constexpr, OF_B: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, HAS_OWN_BIAS: tl.constexpr, HAS_OTHER_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr,
    HAS_DOC: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of HEADS heads of one group: the gradient of B (OF_B) or of C, summed over these heads.

    `own` is B or C, `other` the other one, `state` is G_out for B, H_in for C. Writes, too, the chunk's share of the
    bias' gradient, and own's share of dω (summed over the heads), of Δ's in the phase and of the log decay's (that of B
    counts with the other sign): sums from the chunk's end. The last are of products rounded alike in both: they cancel.
    """
    ROWS: tl.constexpr = T * R
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2)
    chunks = tl.cdiv(length, T)
    operand = x_ptr.dtype.element_ty
    group = block * HEADS // (H // G)
    run = batch // rows

    row = tl.arange(0, ROWS)
    rank = row % R
    p_column = tl.arange(0, PP)
    s_column = tl.arange(0, SP)
    turned_column = tl.arange(0, 2 * SP)
    rest_column = tl.arange(0, UP) if UP > 0 else tl.arange(0, 1)
    start = chunk * T
    t = start + row // R
    valid = t < length
    x_mask = within(valid, p_column, P, PP)
    row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
    position = start + tl.arange(0, T)
    in_sequence = position < length

    sum_real = tl.zeros((ROWS, SP), tl.float32)
    sum_imag = tl.zeros((ROWS, SP), tl.float32)
    sum_rest = tl.zeros((ROWS, UP if UP > 0 else 1), tl.float32)
    sum_omega = tl.zeros((T, SP), tl.float32)
    if S > 0 and not OMEGA_HEADS:
        omega = load_omega(omega_ptr, batch, 0, position, length, s_column, H, S, SP, False)
    for in_block in tl.range(0, HEADS, num_stages=STAGES):
        head = block * HEADS + in_block
        row_head = batch * H + head
        weights_of = run * H + head
        share = ((batch * chunks + chunk) * H + head).to(tl.int64) * R * N
        x_at = ((batch * length + t) * H + head) * P
        coarse, fine, scale, doc, to_end, from_start, _ = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)
        x = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
        if HAS_MIMO_X:
            x = x.to(tl.float32) * per_rank(mimo_x_ptr + weights_of * R * P, rank, p_column, P, PP, R, P)
            x = operand_of(x, operand, PRECISION)
        g = tl.load(g_ptr + (x_at * R + rank * P)[:, None] + p_column[None, :], mask=x_mask, other=0.0)
        state, state_rest = load_state(
            state_ptr, row_head * chunks + chunk, p_column, turned_column, rest_column, P, N, S, PP, UP
        )
        mix = mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)
        dscores = operand_of(tl.dot(g, tl.trans(x), input_precision=PRECISION) * mix, operand, PRECISION)
        if OF_B:
            dscores = tl.trans(dscores)
            through_state = operand_of(x.to(tl.float32) * to_end[:, None], operand, PRECISION)
        else:
            through_state = operand_of(g.to(tl.float32) * from_start[:, None], operand, PRECISION)

        bias_at = weights_of * R * N
        along = tl.zeros((ROWS,), tl.float32)
        if UP > 0:
            other = load_rows(
                other_ptr + 2 * S, other_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_OTHER_BIAS, R, N,
            )  # fmt: skip
            other = operand_of(other, operand, PRECISION)
            down = tl.dot(through_state, state_rest, input_precision=PRECISION)
            down = tl.dot(dscores, other, down, input_precision=PRECISION)
            sum_rest += down
            own = load_rows(
                own_ptr + 2 * S, own_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_OWN_BIAS, R, N,
            )  # fmt: skip
            own = operand_of(own, operand, PRECISION)
            along += tl.sum(own.to(tl.float32) * down, 1)
            if HAS_OWN_BIAS:
                _store_over_positions(dbias_ptr + share + 2 * S, down, rest_column, N - 2 * S, N, T, R)
        if S > 0:
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
            other = rotated(other_ptr, other_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                            HAS_OTHER_BIAS, R, N, S, SP, PRECISION)  # fmt: skip
            down = tl.dot(through_state, state, input_precision=PRECISION)
            turned_real, turned_imag = unpair(tl.dot(dscores, other, down, input_precision=PRECISION))
            real = turned_real * cos + turned_imag * sin
            imag = turned_imag * cos - turned_real * sin
            sum_real += real
            sum_imag += imag
            if HAS_OWN_BIAS:
                _store_over_positions(dbias_ptr + share, real, s_column, S, N, T, R)
                _store_over_positions(dbias_ptr + share + S, imag, s_column, S, N, T, R)
            own_real = load_rows(
                own_ptr, own_bias_ptr + bias_at, row_at, rank, valid, s_column, S, SP, HAS_OWN_BIAS, R, N
            )
            own_imag = load_rows(
                own_ptr + S, own_bias_ptr + bias_at + S, row_at, rank, valid, s_column, S, SP, HAS_OWN_BIAS, R, N
            )
            turned_own = operand_of(own_real * cos - own_imag * sin, operand, PRECISION)
            along += tl.sum(turned_own.to(tl.float32) * turned_real, 1)
            turned_own = operand_of(own_real * sin + own_imag * cos, operand, PRECISION)
            along += tl.sum(turned_own.to(tl.float32) * turned_imag, 1)
            dphase = tl.cumsum(_over_ranks(imag * own_real - real * own_imag, T, R), 0, reverse=True)
            if OMEGA_HEADS:
                omega = load_omega(omega_ptr, batch, head, position, length, s_column, H, S, SP, True)
            tl.store(dturn_ptr + row_head * length + position, tl.sum(dphase * omega, 1), mask=in_sequence)
            domega = dphase * tl.load(dt_ptr + row_head * length + position, mask=in_sequence, other=0.0)[:, None]
            if OMEGA_HEADS:
                omega_at = ((batch * length + position) * H + head) * S
                _store_rows(domega_ptr, omega_at, domega, in_sequence, s_column, S, SP)
            else:
                sum_omega += domega
        ddecay = tl.cumsum(_over_ranks(along, T, R), 0, reverse=True)
        tl.store(ddecay_ptr + row_head * length + position, ddecay, mask=in_sequence)

    in_blocks = ((run * tl.num_programs(1) + block) * rows + batch % rows) * length
    sum_at = ((in_blocks + t) * R + rank).to(tl.int64) * N
    if UP > 0:
        _store_rows(down_ptr + 2 * S, sum_at, sum_rest, valid, rest_column, N - 2 * S, UP)
    if S > 0:
        _store_rows(down_ptr, sum_at, sum_real, valid, s_column, S, SP)
        _store_rows(down_ptr + S, sum_at, sum_imag, valid, s_column, S, SP)
        if not OMEGA_HEADS:
            _store_rows(domega_ptr, (in_blocks + position) * S, sum_omega, in_sequence, s_column, S, SP)
