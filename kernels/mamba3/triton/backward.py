"""The backward scan in Triton: G, the gradient of H, chunk by chunk from the end; then every other gradient at once.

With g = ∂/∂y before skip and gate, M_ij = g_i·x_j, mix_ij as in `mixing`, w_j = e^{L_end - L_j} s_j:

    G_in  = e^{L_end} G_out + Σ_i e^{L_i} g_i ⊗ C_i                                           (`state_gradients`)
    dx_j  = Σ_i mix_ij (C_i·B_j) g_i + w_j G_out B_j + D g_j
    dB_j  = Σ_i mix_ij M_ij C_i + w_j G_outᵀ x_j        dC_i = Σ_j mix_ij M_ij B_j + e^{L_i} H_inᵀ g_i

(`input_gradients`). Decays: what L_i scales is g_i·y_i and x_i·dx_i, less their parts from γ_i, D; a step of the decay or of
the phase reaches every later one, so these are summed from the end of the chunk, and what lies beyond the chunk is in two
contractions of G_out and H_out. Those of the chunk before are found here, from G_in and H_in.
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
    pair_up,
    per_rank,
    rotated,
    sigmoid,
    unpair,
    within,
)


@triton.jit
def _load_cotangent(ptr, x_at, rank, p_column, mask, R: tl.constexpr, P: tl.constexpr, ROW_OUTPUT: tl.constexpr):
    at = x_at * R + rank * P if ROW_OUTPUT else x_at
    return tl.load(ptr + at[:, None] + p_column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def state_gradients(
    z_ptr, c_ptr, c_bias_ptr, mimo_z_ptr, mimo_o_ptr, doc_ptr, phase_ptr, decay_ptr, fine_decay_ptr, scale_ptr,
    dy_ptr, last_grad_ptr, segment_grad_ptr, segment_decay_ptr, length, chunks,
    chunk_grad_ptr, first_grad_ptr, first_decay_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_C_BIAS: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_Z: tl.constexpr,
    ROW_OUTPUT: tl.constexpr, HAS_DOC: tl.constexpr, STATES_ONLY: tl.constexpr,
    EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G after every chunk of one segment, and before its first (segment 0). STATES_ONLY: as in `forward`."""
    ROWS: tl.constexpr = T * R
    segment = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    operand = z_ptr.dtype.element_ty
    row_head = batch * H + head
    group = head // (H // G)
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
            more, more_rest = load_state(
                segment_grad_ptr, later, p_column, turned_column, rest_column, P, N, S, PP, UP
            )
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
            store_state(chunk_grad_ptr, chunk_at, turned, rest, p_column, turned_column, rest_column, P, N, S, UP)
        _, _, _, _, _, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        x_at = ((batch * length + t) * H + head) * P
        x_mask = within(valid, p_column, P, PP)
        g = _load_cotangent(dy_ptr, x_at, rank, p_column, x_mask, R, P, ROW_OUTPUT)
        if HAS_Z:
            gate = tl.load(z_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0).to(tl.float32)
            if HAS_MIMO_Z:
                gate *= per_rank(mimo_z_ptr + head * R * P, rank, p_column, P, PP, R, P)
            g *= gate * sigmoid(gate, FAST)
        if HAS_MIMO_O:
            g *= per_rank(mimo_o_ptr + head * R * P, rank, p_column, P, PP, R, P)
        added = tl.trans((g * from_start[:, None]).to(operand))

        row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
        bias_at = head * R * N
        if S > 0:
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
            c_turned = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                               HAS_C_BIAS, R, N, S, SP)  # fmt: skip
            turned = tl.dot(added, c_turned, turned * end_decay, input_precision=PRECISION)
        if UP > 0:
            c_rest = load_rows(
                c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_C_BIAS, R, N,
            ).to(operand)  # fmt: skip
            rest = tl.dot(added, c_rest, rest * end_decay, input_precision=PRECISION)
        segment_decay *= end_decay

    if STATES_ONLY or segment == 0:
        out = row_head
        if STATES_ONLY:
            out = row_head * SEGMENTS + segment
            tl.store(first_decay_ptr + out, segment_decay)
        store_state(first_grad_ptr, out, turned, rest, p_column, turned_column, rest_column, P, N, S, UP)


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
def input_gradients(
    x_ptr, z_ptr, dt_ptr, omega_ptr, b_ptr, c_ptr, b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr, d_ptr,
    doc_ptr, phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, chunk_ssm_ptr, chunk_grad_ptr, dy_ptr, length,
    dx_ptr, dz_ptr, db_ptr, dc_ptr, domega_ptr, dscale_ptr, dgamma_ptr, ddecay_ptr, dturn_ptr, decay_flow_ptr,
    phase_flow_ptr, db_bias_ptr, dc_bias_ptr, dd_ptr, dmimo_x_ptr, dmimo_z_ptr, dmimo_o_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, HEADS: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr,
    HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    ROW_OUTPUT: tl.constexpr, HAS_DOC: tl.constexpr,
    EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of HEADS heads of one group: gradients of B, C and ω are summed over them before they are written.

    Writes, per position and head: dx, dz, ds, dγ, and the sums from the end of the chunk for the decay and for Δ through
    the phase; per block of heads: dB, dC, dω; per chunk: the flows into it, and its share of the weights' gradients.
    """
    ROWS: tl.constexpr = T * R
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2)
    batches = tl.num_programs(2)
    chunks = tl.cdiv(length, T)
    operand = x_ptr.dtype.element_ty
    group = block * HEADS // (H // G)

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

    if S > 0:
        sum_b_real = tl.zeros((ROWS, SP), tl.float32)
        sum_b_imag = tl.zeros((ROWS, SP), tl.float32)
        sum_c_real = tl.zeros((ROWS, SP), tl.float32)
        sum_c_imag = tl.zeros((ROWS, SP), tl.float32)
        sum_omega = tl.zeros((T, SP), tl.float32)
    if UP > 0:
        sum_b_rest = tl.zeros((ROWS, UP), tl.float32)
        sum_c_rest = tl.zeros((ROWS, UP), tl.float32)

    for in_block in range(0, HEADS):
        head = block * HEADS + in_block
        row_head = batch * H + head
        chunk_at = row_head * chunks + chunk
        share = ((batch * chunks + chunk) * H + head).to(tl.int64)
        bias_at = head * R * N
        x_at = ((batch * length + t) * H + head) * P
        coarse, fine, scale, doc, to_end, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)

        x_own = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
        x = x_own
        if HAS_MIMO_X:
            weight_x = per_rank(mimo_x_ptr + head * R * P, rank, p_column, P, PP, R, P)
            x = (x_own.to(tl.float32) * weight_x).to(operand)
        dy = _load_cotangent(dy_ptr, x_at, rank, p_column, x_mask, R, P, ROW_OUTPUT)
        g = dy
        if HAS_Z:
            z = tl.load(z_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0).to(tl.float32)
            gate = z
            if HAS_MIMO_Z:
                gate = z * per_rank(mimo_z_ptr + head * R * P, rank, p_column, P, PP, R, P)
            open_share = sigmoid(gate, FAST)
            g *= gate * open_share
        if HAS_MIMO_O:
            g *= per_rank(mimo_o_ptr + head * R * P, rank, p_column, P, PP, R, P)
        g_operand = g.to(operand)

        scores = tl.zeros((ROWS, ROWS), tl.float32)
        y = tl.zeros((ROWS, PP), tl.float32)
        dx = tl.zeros((ROWS, PP), tl.float32)
        ssm, ssm_rest = load_state(chunk_ssm_ptr, chunk_at, p_column, turned_column, rest_column, P, N, S, PP, UP)
        grad, grad_rest = load_state(chunk_grad_ptr, chunk_at, p_column, turned_column, rest_column, P, N, S, PP, UP)
        overlap = 0.0
        if S > 0:
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, s_column, S, SP, FAST)
            b_turned = rotated(b_ptr, b_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                               HAS_B_BIAS, R, N, S, SP)  # fmt: skip
            c_turned = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, s_column, operand,
                               HAS_C_BIAS, R, N, S, SP)  # fmt: skip
            scores = tl.dot(c_turned, tl.trans(b_turned), scores, input_precision=PRECISION)
            y = tl.dot(c_turned, tl.trans(ssm), y, input_precision=PRECISION)
            dx = tl.dot(b_turned, tl.trans(grad), dx, input_precision=PRECISION)
            ssm_real, ssm_imag = unpair(ssm.to(tl.float32))
            grad_real, grad_imag = unpair(grad.to(tl.float32))
            overlap += tl.sum(ssm_real * grad_real + ssm_imag * grad_imag)
            phase_flow = end_decay * tl.sum(grad_imag * ssm_real - grad_real * ssm_imag, 0)
        if UP > 0:
            b_rest = load_rows(
                b_ptr + 2 * S, b_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_B_BIAS, R, N,
            ).to(operand)  # fmt: skip
            c_rest = load_rows(
                c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, rest_column, N - 2 * S, UP,
                HAS_C_BIAS, R, N,
            ).to(operand)  # fmt: skip
            scores = tl.dot(c_rest, tl.trans(b_rest), scores, input_precision=PRECISION)
            y = tl.dot(c_rest, tl.trans(ssm_rest), y, input_precision=PRECISION)
            dx = tl.dot(b_rest, tl.trans(grad_rest), dx, input_precision=PRECISION)
            overlap += tl.sum(ssm_rest.to(tl.float32) * grad_rest.to(tl.float32))
        y *= from_start[:, None]
        dx *= to_end[:, None]
        decay_flow = end_decay * overlap + tl.sum(y * g)

        mix = mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)
        overlaps = tl.dot(g_operand, tl.trans(x), input_precision=PRECISION)
        same = (row // R)[:, None] == (row // R)[None, :]
        dgamma = tl.sum(tl.where(same, overlaps * scores, 0.0), 1)
        mixed = (scores * mix).to(operand)
        dscores = (overlaps * mix).to(operand)
        y = tl.dot(mixed, x, y, input_precision=PRECISION)
        dx = tl.dot(tl.trans(mixed), g_operand, dx, input_precision=PRECISION)

        x_wide = x.to(tl.float32)
        by_key = tl.sum(dx * x_wide, 1) - gamma * dgamma
        by_query = tl.sum(y * g, 1) - gamma * dgamma
        at = row_head * length + position
        dgamma = _over_ranks(dgamma, T, R)
        by_key_position = _over_ranks(by_key, T, R)
        own = _over_ranks(by_query - by_key, T, R)
        scale_position = tl.load(scale_ptr + at, mask=in_sequence, other=1.0)
        tl.store(dgamma_ptr + at, dgamma, mask=in_sequence)
        tl.store(dscale_ptr + at, by_key_position / scale_position, mask=in_sequence)
        tl.store(ddecay_ptr + at, tl.cumsum(own, 0, reverse=True), mask=in_sequence)
        tl.store(decay_flow_ptr + chunk_at, decay_flow)

        if HAS_D:
            skip = tl.load(d_ptr + head).to(tl.float32)
            tl.store(dd_ptr + share, tl.sum(x_wide * g))
            y += skip * x_wide
            dx += skip * g
        if HAS_MIMO_X:
            _store_over_positions(dmimo_x_ptr + share * R * P, dx * x_own.to(tl.float32), p_column, P, P, T, R)
            dx *= weight_x
        dx_at = ((batch * length + position) * H + head) * P
        _store_rows(dx_ptr, dx_at, _over_ranks(dx, T, R), in_sequence, p_column, P, PP)
        if HAS_MIMO_O:
            silu = dy
            if HAS_Z:
                silu = dy * gate * open_share
            _store_over_positions(dmimo_o_ptr + share * R * P, silu * y, p_column, P, P, T, R)
        if HAS_Z:
            dgate = dy * y * open_share * (1 + gate * (1 - open_share))
            if HAS_MIMO_O:
                dgate *= per_rank(mimo_o_ptr + head * R * P, rank, p_column, P, PP, R, P)
            if HAS_MIMO_Z:
                _store_over_positions(dmimo_z_ptr + share * R * P, dgate * z, p_column, P, P, T, R)
                dgate *= per_rank(mimo_z_ptr + head * R * P, rank, p_column, P, PP, R, P)
            _store_rows(dz_ptr, dx_at, _over_ranks(dgate, T, R), in_sequence, p_column, P, PP)

        from_grad = (x_wide * to_end[:, None]).to(operand)
        from_ssm = (g * from_start[:, None]).to(operand)
        if S > 0:
            c_real, c_imag = unpair(c_turned.to(tl.float32))
            dc_turned = tl.dot(from_ssm, ssm, input_precision=PRECISION)
            dc_real, dc_imag = unpair(dc_turned)
            phase_flow -= tl.sum(dc_imag * c_real - dc_real * c_imag, 0)
            dc_turned = tl.dot(dscores, b_turned, dc_turned, input_precision=PRECISION)
            dc_real, dc_imag = unpair(dc_turned)
            db_turned = tl.dot(from_grad, grad, input_precision=PRECISION)
            db_turned = tl.dot(tl.trans(dscores), c_turned, db_turned, input_precision=PRECISION)
            db_real, db_imag = unpair(db_turned)
            b_real, b_imag = unpair(b_turned.to(tl.float32))
            # Only differences of phases matter, so these cancel in long sums: as they are, not rounded.
            dphase = dc_imag * c_real - dc_real * c_imag + db_imag * b_real - db_real * b_imag
            dphase = tl.cumsum(_over_ranks(dphase, T, R), 0, reverse=True)
            tl.store(phase_flow_ptr + chunk_at * S + s_column, phase_flow, mask=s_column < S)
            omega = load_omega(omega_ptr, batch, head, position, length, s_column, H, S, SP, OMEGA_HEADS)
            tl.store(dturn_ptr + at, tl.sum(dphase * omega, 1), mask=in_sequence)
            dt = tl.load(dt_ptr + (batch * length + position) * H + head, mask=in_sequence, other=0.0)
            domega = dphase * dt[:, None]
            if OMEGA_HEADS:
                omega_at = ((batch * length + position) * H + head) * S
                _store_rows(domega_ptr, omega_at, domega, in_sequence, s_column, S, SP)
            else:
                sum_omega += domega
            back_real = dc_real * cos + dc_imag * sin
            back_imag = dc_imag * cos - dc_real * sin
            if HAS_C_BIAS:
                _store_over_positions(dc_bias_ptr + share * R * N, back_real, s_column, S, N, T, R)
                _store_over_positions(dc_bias_ptr + share * R * N + S, back_imag, s_column, S, N, T, R)
            sum_c_real += back_real
            sum_c_imag += back_imag
            back_real = db_real * cos + db_imag * sin
            back_imag = db_imag * cos - db_real * sin
            if HAS_B_BIAS:
                _store_over_positions(db_bias_ptr + share * R * N, back_real, s_column, S, N, T, R)
                _store_over_positions(db_bias_ptr + share * R * N + S, back_imag, s_column, S, N, T, R)
            sum_b_real += back_real
            sum_b_imag += back_imag
        if UP > 0:
            dc_rest = tl.dot(from_ssm, ssm_rest, input_precision=PRECISION)
            dc_rest = tl.dot(dscores, b_rest, dc_rest, input_precision=PRECISION)
            db_rest = tl.dot(from_grad, grad_rest, input_precision=PRECISION)
            db_rest = tl.dot(tl.trans(dscores), c_rest, db_rest, input_precision=PRECISION)
            if HAS_C_BIAS:
                _store_over_positions(dc_bias_ptr + share * R * N + 2 * S, dc_rest, rest_column, N - 2 * S, N, T, R)
            if HAS_B_BIAS:
                _store_over_positions(db_bias_ptr + share * R * N + 2 * S, db_rest, rest_column, N - 2 * S, N, T, R)
            sum_c_rest += dc_rest
            sum_b_rest += db_rest

    sum_at = (((block * batches + batch) * length + t) * R + rank).to(tl.int64) * N
    if S > 0:
        _store_rows(db_ptr, sum_at, sum_b_real, valid, s_column, S, SP)
        _store_rows(db_ptr + S, sum_at, sum_b_imag, valid, s_column, S, SP)
        _store_rows(dc_ptr, sum_at, sum_c_real, valid, s_column, S, SP)
        _store_rows(dc_ptr + S, sum_at, sum_c_imag, valid, s_column, S, SP)
        if not OMEGA_HEADS:
            omega_at = ((block * batches + batch) * length + position) * S
            _store_rows(domega_ptr, omega_at, sum_omega, in_sequence, s_column, S, SP)
    if UP > 0:
        _store_rows(db_ptr + 2 * S, sum_at, sum_b_rest, valid, rest_column, N - 2 * S, UP)
        _store_rows(dc_ptr + 2 * S, sum_at, sum_c_rest, valid, rest_column, N - 2 * S, UP)
