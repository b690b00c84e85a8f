"""The backward scan in Triton: G, the gradient of H, chunk by chunk from the end; then the rest, chunks in parallel.

With g = ∂/∂y before skip and gate, M_ij = g_i·x_j, mix_ij as in `mixing`, w_j = e^{L_end - L_j} s_j:

    G_in  = e^{L_end} G_out + Σ_i e^{L_i} g_i ⊗ C_i                                           (`state_gradients`)
    dx_j  = Σ_i mix_ij (C_i·B_j) g_i + w_j G_out B_j + D g_j
    dB_j  = Σ_i mix_ij M_ij C_i + w_j G_outᵀ x_j        dC_i = Σ_j mix_ij M_ij B_j + e^{L_i} H_inᵀ g_i

(`value_gradients`, `key_gradients`). Decays: what L_i scales is g_i·y_i, and x_i·dx_i, less their parts from γ_i and D. A step
of the decay or of the phase reaches every later position, so their gradients are sums from the end of the chunk; what lies
beyond the chunk is in two contractions of G_out and H_out, found by the next chunk's program from its G_in and H_in.
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
    per_rank,
    rotated,
    sigmoid,
    unpair,
    within,
)


@triton.jit
def _gate(z, mimo_z_ptr, rank, column, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
          FAST: tl.constexpr):  # fmt: skip
    """z·mimo_z in float32, and its sigmoid."""
    gate = z.to(tl.float32)
    if HAS_MIMO_Z:
        gate *= per_rank(mimo_z_ptr, rank, column, P, PP, R, P)
    return gate, sigmoid(gate, FAST)


@triton.jit
def _gated_cotangent(dy, z, mimo_z_ptr, mimo_o_ptr, rank, column, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr,
                     HAS_Z: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
                     FAST: tl.constexpr):  # fmt: skip
    """g, float32, from the output's cotangent and z as loaded."""
    g = dy.to(tl.float32)
    if HAS_MIMO_O:
        g *= per_rank(mimo_o_ptr, rank, column, P, PP, R, P)
    if HAS_Z:
        gate, opening = _gate(z, mimo_z_ptr, rank, column, P, PP, R, HAS_MIMO_Z, FAST)
        g *= gate * opening
    return g


@triton.jit
def _load_cotangent(dy_ptr, z_ptr, x_at, rank, column, mask, R: tl.constexpr, P: tl.constexpr, HAS_Z: tl.constexpr,
                    ROW_OUTPUT: tl.constexpr):  # fmt: skip
    """The output's cotangent and z (itself again if there is no gate) at every row."""
    at = x_at * R + rank * P if ROW_OUTPUT else x_at
    dy = tl.load(dy_ptr + at[:, None] + column[None, :], mask=mask, other=0.0)
    z = dy
    if HAS_Z:
        z = tl.load(z_ptr + x_at[:, None] + column[None, :], mask=mask, other=0.0)
    return dy, z


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
            store_state(chunk_grad_ptr, chunk_at, turned, rest, p_column, turned_column, rest_column, P, N, S, UP)
        _, _, _, _, _, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        x_at = ((batch * length + t) * H + head) * P
        x_mask = within(valid, p_column, P, PP)
        weight_at = head * R * P
        dy, z = _load_cotangent(dy_ptr, z_ptr, x_at, rank, p_column, x_mask, R, P, HAS_Z, ROW_OUTPUT)
        g = _gated_cotangent(
            dy, z, mimo_z_ptr + weight_at, mimo_o_ptr + weight_at, rank, p_column, P, PP, R, HAS_Z, HAS_MIMO_Z,
            HAS_MIMO_O, FAST,
        )  # fmt: skip
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
def value_gradients(
    x_ptr, z_ptr, b_ptr, c_ptr, b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr, d_ptr, doc_ptr,
    phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, chunk_ssm_ptr, chunk_grad_ptr, dy_ptr, length,
    dx_ptr, dz_ptr, dscale_ptr, dgamma_ptr, ddecay_ptr, decay_flow_ptr, dd_ptr, dmimo_x_ptr, dmimo_z_ptr, dmimo_o_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr,
    HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, ROW_OUTPUT: tl.constexpr,
    HAS_DOC: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dx, dz, ds, dγ, the decay's sums from the end of the chunk and its flow into the chunk.

    And the chunk's share of the gradients of D and the MIMO projections.
    """
    ROWS: tl.constexpr = T * R
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    chunks = tl.cdiv(length, T)
    operand = x_ptr.dtype.element_ty
    row_head = batch * H + head
    group = head // (H // G)
    chunk_at = row_head * chunks + chunk
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
    bias_at = head * R * N
    weight_at = head * R * P
    position = start + tl.arange(0, T)
    in_sequence = position < length

    # Every load before the first product: there are too few programs at a time to hide one wait after another.
    x_own = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
    dy, z = _load_cotangent(dy_ptr, z_ptr, x_at, rank, p_column, x_mask, R, P, HAS_Z, ROW_OUTPUT)
    ssm, ssm_rest = load_state(chunk_ssm_ptr, chunk_at, p_column, turned_column, rest_column, P, N, S, PP, UP)
    grad, grad_rest = load_state(chunk_grad_ptr, chunk_at, p_column, turned_column, rest_column, P, N, S, PP, UP)
    coarse, fine, scale, doc, to_end, from_start, end_decay = chunk_decays(
        decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
    )
    gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    y = tl.zeros((ROWS, PP), tl.float32)
    dx = tl.zeros((ROWS, PP), tl.float32)
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
        overlap += tl.sum(ssm.to(tl.float32) * grad.to(tl.float32))
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

    x = x_own
    if HAS_MIMO_X:
        x = (x_own.to(tl.float32) * per_rank(mimo_x_ptr + weight_at, rank, p_column, P, PP, R, P)).to(operand)
    g = _gated_cotangent(
        dy, z, mimo_z_ptr + weight_at, mimo_o_ptr + weight_at, rank, p_column, P, PP, R, HAS_Z, HAS_MIMO_Z,
        HAS_MIMO_O, FAST,
    ).to(operand)  # fmt: skip
    overlaps = tl.dot(g, tl.trans(x), input_precision=PRECISION)
    same = (row // R)[:, None] == (row // R)[None, :]
    on_diagonal = tl.sum(tl.where(same, overlaps * scores, 0.0), 1)
    mixed = (scores * mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)).to(operand)
    y *= from_start[:, None]
    flow = tl.sum(tl.sum(y * g.to(tl.float32), 1), 0)
    tl.store(decay_flow_ptr + chunk_at, end_decay * overlap + flow)
    y = tl.dot(mixed, x, y, input_precision=PRECISION)
    dx = tl.dot(tl.trans(mixed), g, dx * to_end[:, None], input_precision=PRECISION)

    # From here on in float32, on the rounded operands, so that what must cancel between rows does.
    g_wide = g.to(tl.float32)
    x_wide = x.to(tl.float32)
    by_key = _over_ranks(tl.sum(dx * x_wide, 1) - gamma * on_diagonal, T, R)
    by_query = _over_ranks(tl.sum(y * g_wide, 1) - gamma * on_diagonal, T, R)
    at = row_head * length + position
    tl.store(dgamma_ptr + at, _over_ranks(on_diagonal, T, R), mask=in_sequence)
    tl.store(dscale_ptr + at, by_key / tl.load(scale_ptr + at, mask=in_sequence, other=1.0), mask=in_sequence)
    tl.store(ddecay_ptr + at, tl.cumsum(by_query - by_key, 0, reverse=True), mask=in_sequence)

    if HAS_D:
        skip = tl.load(d_ptr + head).to(tl.float32)
        tl.store(dd_ptr + share, tl.sum(tl.sum(x_wide * g_wide, 1), 0))
        y += skip * x_wide
        dx += skip * g_wide
    if HAS_MIMO_X:
        _store_over_positions(dmimo_x_ptr + share * R * P, dx * x_own.to(tl.float32), p_column, P, P, T, R)
        dx *= per_rank(mimo_x_ptr + weight_at, rank, p_column, P, PP, R, P)
    dx_at = ((batch * length + position) * H + head) * P
    _store_rows(dx_ptr, dx_at, _over_ranks(dx, T, R), in_sequence, p_column, P, PP)
    passed = dy.to(tl.float32) * y
    if HAS_Z:
        gate, opening = _gate(z, mimo_z_ptr + weight_at, rank, p_column, P, PP, R, HAS_MIMO_Z, FAST)
        if HAS_MIMO_O:
            _store_over_positions(dmimo_o_ptr + share * R * P, passed * gate * opening, p_column, P, P, T, R)
            passed *= per_rank(mimo_o_ptr + weight_at, rank, p_column, P, PP, R, P)
        dgate = passed * opening * (1 + gate * (1 - opening))
        if HAS_MIMO_Z:
            _store_over_positions(dmimo_z_ptr + share * R * P, dgate * z.to(tl.float32), p_column, P, P, T, R)
            dgate *= per_rank(mimo_z_ptr + weight_at, rank, p_column, P, PP, R, P)
        _store_rows(dz_ptr, dx_at, _over_ranks(dgate, T, R), in_sequence, p_column, P, PP)
    elif HAS_MIMO_O:
        _store_over_positions(dmimo_o_ptr + share * R * P, passed, p_column, P, P, T, R)


@triton.jit
def key_gradients(
    x_ptr, z_ptr, dt_ptr, omega_ptr, b_ptr, c_ptr, b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr,
    doc_ptr, phase_ptr, decay_ptr, fine_decay_ptr, gamma_ptr, scale_ptr, chunk_ssm_ptr, chunk_grad_ptr, dy_ptr, length,
    db_ptr, dc_ptr, db_bias_ptr, dc_bias_ptr, domega_ptr, dturn_ptr, phase_flow_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, PP: tl.constexpr, SP: tl.constexpr, UP: tl.constexpr, HEADS: tl.constexpr, TURNED: tl.constexpr,
    OMEGA_HEADS: tl.constexpr, HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr,
    HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_Z: tl.constexpr, ROW_OUTPUT: tl.constexpr,
    HAS_DOC: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of HEADS heads of one group: dB and dC, summed over these heads, and the chunk's share of their biases'.

    TURNED: the rotated coordinates, [.., 2S], and dω, Δ's part in the phase (sums from the end of the chunk) and the phase's
    flow into the chunk; else the other coordinates, [.., N - 2S].
    """
    ROWS: tl.constexpr = T * R
    WIDTH: tl.constexpr = S if TURNED else N - 2 * S
    PADDED: tl.constexpr = SP if TURNED else UP
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2)
    chunks = tl.cdiv(length, T)
    operand = x_ptr.dtype.element_ty
    group = block * HEADS // (H // G)

    row = tl.arange(0, ROWS)
    rank = row % R
    p_column = tl.arange(0, PP)
    column = tl.arange(0, PADDED)
    start = chunk * T
    t = start + row // R
    valid = t < length
    x_mask = within(valid, p_column, P, PP)
    row_at = ((batch * length + t) * R + rank) * (G * N) + group * N
    position = start + tl.arange(0, T)
    in_sequence = position < length

    sum_b = tl.zeros((ROWS, PADDED), tl.float32)
    sum_c = tl.zeros((ROWS, PADDED), tl.float32)
    sum_b_imag = tl.zeros((ROWS, PADDED if TURNED else 1), tl.float32)
    sum_c_imag = tl.zeros((ROWS, PADDED if TURNED else 1), tl.float32)
    sum_omega = tl.zeros((T, PADDED if TURNED else 1), tl.float32)
    for in_block in tl.range(0, HEADS, num_stages=STAGES):
        head = block * HEADS + in_block
        row_head = batch * H + head
        share = ((batch * chunks + chunk) * H + head).to(tl.int64) * R * WIDTH
        weight_at = head * R * P
        x_at = ((batch * length + t) * H + head) * P
        coarse, fine, scale, doc, to_end, from_start, end_decay = chunk_decays(
            decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R, T, HAS_DOC, EXACT, FAST
        )
        x = tl.load(x_ptr + x_at[:, None] + p_column[None, :], mask=x_mask, other=0.0)
        if HAS_MIMO_X:
            x = (x.to(tl.float32) * per_rank(mimo_x_ptr + weight_at, rank, p_column, P, PP, R, P)).to(operand)
        dy, z = _load_cotangent(dy_ptr, z_ptr, x_at, rank, p_column, x_mask, R, P, HAS_Z, ROW_OUTPUT)
        g = _gated_cotangent(
            dy, z, mimo_z_ptr + weight_at, mimo_o_ptr + weight_at, rank, p_column, P, PP, R, HAS_Z, HAS_MIMO_Z,
            HAS_MIMO_O, FAST,
        ).to(operand)  # fmt: skip
        gamma = tl.load(gamma_ptr + row_head * length + t, mask=valid, other=0.0)
        overlaps = tl.dot(g, tl.trans(x), input_precision=PRECISION)
        dscores = (overlaps * mixing(coarse, fine, gamma, scale, doc, R, HAS_DOC, EXACT, FAST)).to(operand)
        from_grad = (x.to(tl.float32) * to_end[:, None]).to(operand)
        from_ssm = (g.to(tl.float32) * from_start[:, None]).to(operand)

        bias_at = head * R * N
        chunk_at = row_head * chunks + chunk
        state_at = chunk_at.to(tl.int64) * P * N + p_column[:, None] * N
        if TURNED:
            pair_column = tl.arange(0, 2 * SP)
            mask = (p_column < P)[:, None] & (pair_column < 2 * S)[None, :]
            ssm = tl.load(chunk_ssm_ptr + state_at + pair_column[None, :], mask=mask, other=0.0)
            grad = tl.load(chunk_grad_ptr + state_at + pair_column[None, :], mask=mask, other=0.0)
            cos, sin = chunk_rotation(phase_ptr, row_head, t, length, column, S, SP, FAST)
            b = rotated(b_ptr, b_bias_ptr + bias_at, row_at, rank, valid, cos, sin, column, operand,
                        HAS_B_BIAS, R, N, S, SP)  # fmt: skip
            c = rotated(c_ptr, c_bias_ptr + bias_at, row_at, rank, valid, cos, sin, column, operand,
                        HAS_C_BIAS, R, N, S, SP)  # fmt: skip
            ssm_real, ssm_imag = unpair(ssm.to(tl.float32))
            grad_real, grad_imag = unpair(grad.to(tl.float32))
            flow = end_decay * tl.sum(grad_imag * ssm_real - grad_real * ssm_imag, 0)
            c_real, c_imag = unpair(c.to(tl.float32))
            dc = tl.dot(from_ssm, ssm, input_precision=PRECISION)
            dc_real, dc_imag = unpair(dc)
            flow -= tl.sum(dc_imag * c_real - dc_real * c_imag, 0)
            tl.store(phase_flow_ptr + chunk_at * S + column, flow, mask=column < S)
            dc_real, dc_imag = unpair(tl.dot(dscores, b, dc, input_precision=PRECISION))
            # Only differences of phases matter, so these cancel in long sums: as they are, not rounded.
            dphase = dc_imag * c_real - dc_real * c_imag
            back_real = dc_real * cos + dc_imag * sin
            back_imag = dc_imag * cos - dc_real * sin
            sum_c += back_real
            sum_c_imag += back_imag
            if HAS_C_BIAS:
                _store_over_positions(dc_bias_ptr + 2 * share, back_real, column, S, 2 * S, T, R)
                _store_over_positions(dc_bias_ptr + 2 * share + S, back_imag, column, S, 2 * S, T, R)
            db = tl.dot(from_grad, grad, input_precision=PRECISION)
            db_real, db_imag = unpair(tl.dot(tl.trans(dscores), c, db, input_precision=PRECISION))
            b_real, b_imag = unpair(b.to(tl.float32))
            dphase += db_imag * b_real - db_real * b_imag
            back_real = db_real * cos + db_imag * sin
            back_imag = db_imag * cos - db_real * sin
            sum_b += back_real
            sum_b_imag += back_imag
            if HAS_B_BIAS:
                _store_over_positions(db_bias_ptr + 2 * share, back_real, column, S, 2 * S, T, R)
                _store_over_positions(db_bias_ptr + 2 * share + S, back_imag, column, S, 2 * S, T, R)

            dphase = tl.cumsum(_over_ranks(dphase, T, R), 0, reverse=True)
            omega = load_omega(omega_ptr, batch, head, position, length, column, H, S, SP, OMEGA_HEADS)
            tl.store(dturn_ptr + row_head * length + position, tl.sum(dphase * omega, 1), mask=in_sequence)
            dt = tl.load(dt_ptr + row_head * length + position, mask=in_sequence, other=0.0)
            domega = dphase * dt[:, None]
            if OMEGA_HEADS:
                omega_at = ((batch * length + position) * H + head) * S
                _store_rows(domega_ptr, omega_at, domega, in_sequence, column, S, SP)
            else:
                sum_omega += domega
        else:
            mask = (p_column < P)[:, None] & (column < WIDTH)[None, :]
            ssm = tl.load(chunk_ssm_ptr + 2 * S + state_at + column[None, :], mask=mask, other=0.0)
            grad = tl.load(chunk_grad_ptr + 2 * S + state_at + column[None, :], mask=mask, other=0.0)
            b = load_rows(b_ptr + 2 * S, b_bias_ptr + bias_at + 2 * S, row_at, rank, valid, column, WIDTH, PADDED,
                          HAS_B_BIAS, R, N).to(operand)  # fmt: skip
            c = load_rows(c_ptr + 2 * S, c_bias_ptr + bias_at + 2 * S, row_at, rank, valid, column, WIDTH, PADDED,
                          HAS_C_BIAS, R, N).to(operand)  # fmt: skip
            dc = tl.dot(from_ssm, ssm, input_precision=PRECISION)
            dc = tl.dot(dscores, b, dc, input_precision=PRECISION)
            sum_c += dc
            if HAS_C_BIAS:
                _store_over_positions(dc_bias_ptr + share, dc, column, WIDTH, WIDTH, T, R)
            db = tl.dot(from_grad, grad, input_precision=PRECISION)
            db = tl.dot(tl.trans(dscores), c, db, input_precision=PRECISION)
            sum_b += db
            if HAS_B_BIAS:
                _store_over_positions(db_bias_ptr + share, db, column, WIDTH, WIDTH, T, R)

    in_blocks = (block * tl.num_programs(2) + batch) * length
    sum_at = ((in_blocks + t) * R + rank).to(tl.int64) * (2 * S if TURNED else WIDTH)
    _store_rows(db_ptr, sum_at, sum_b, valid, column, WIDTH, PADDED)
    _store_rows(dc_ptr, sum_at, sum_c, valid, column, WIDTH, PADDED)
    if TURNED:
        _store_rows(db_ptr + S, sum_at, sum_b_imag, valid, column, S, SP)
        _store_rows(dc_ptr + S, sum_at, sum_c_imag, valid, column, S, SP)
        if not OMEGA_HEADS:
            _store_rows(domega_ptr, (in_blocks + position) * S, sum_omega, in_sequence, column, S, SP)
