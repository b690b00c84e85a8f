"""What the MIMO gradients' kernel leaves, made into gradients of the inputs by one Triton kernel, as in finish.py.

A row of the kernel's vectors has 32 numbers, one for each position and pair of ranks; sums over pairs are made here.
What it has added up over a group's heads is in as many places as programs had some of them (mimo_gradients.py).
"""

import triton
import triton.language as tl

from .finish import of_coefficients


@triton.jit
def _rows(
    vector_ptr, batch, chunks, head, t, mask, row: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A row of the vectors at positions t of some heads, summed over pairs, [positions, heads]."""
    place = ((batch * chunks + t // T) * H)[:, None].to(tl.int64) + head[None, :]
    at = place * (VECTORS * WIDTH) + (row * WIDTH + t % T)[:, None]
    total = tl.load(vector_ptr + at, mask=mask, other=0.0)
    for pair in tl.static_range(1, WIDTH // T):
        total += tl.load(vector_ptr + at + pair * T, mask=mask, other=0.0)
    return total


@triton.jit
def _sums(ptr, at, head, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Of each head, the sum of the WIDTH numbers that begin at `at`."""
    column = tl.arange(0, WIDTH)
    return tl.sum(tl.load(ptr + at[:, None] + column[None, :], mask=(head < SIZE)[:, None], other=0.0), 1)


@triton.jit
def _beyond(
    chunk, batch, chunks, head, place, passing, flow_ptr, turned_ptr, last_phase_ptr, dphase_ptr,
    H: tl.constexpr, S: tl.constexpr, FLOWS: tl.constexpr, TURNED: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """What a step of the phases does beyond the chunk (cotangents.py), [heads, S]."""
    column = tl.arange(0, S)[None, :]
    here = (head < H)[:, None]
    real = flow_ptr + (place * (FLOWS * 2 * S) + TURNED * 2 * S)[:, None] + column
    turned = tl.load(real + S, mask=here, other=0.0) - tl.load(real, mask=here, other=0.0)
    flow = passing[:, None] * turned + tl.load(turned_ptr + (place * S)[:, None] + column, mask=here, other=0.0)
    flow = tl.where(chunk + 1 < chunks, flow, 0.0)
    if HAS_LAST:
        at = (batch * H + head)[:, None] * S + column
        last = tl.load(dphase_ptr + at, mask=here, other=0.0)
        return tl.where(chunk + 1 < chunks, last + tl.load(last_phase_ptr + at, mask=here, other=0.0), last) - flow
    return -flow


@triton.jit
def _first_from(step, LEAST: tl.constexpr, LONGER: tl.constexpr):
    """The first program whose first step is `step` or later (mimo_shares.py)."""
    early = tl.cdiv(step, LEAST + 1)
    return tl.where(early <= LONGER, early, LONGER + tl.cdiv(step - LONGER * (LEAST + 1), LEAST))


@triton.jit
def _gathered(
    ptr, group, groups, at, SIZE: tl.constexpr, PER: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr
):  # fmt: skip
    """What programs have added up of a group of a chunk, of so many in all: of SIZE numbers, those at `at`."""
    total = tl.load(ptr + group.to(tl.int64) * SIZE + at)
    last = _first_from((group + 1) * PER, LEAST, LONGER)
    for program in range(_first_from(group * PER + 1, LEAST, LONGER), last):
        total += tl.load(ptr + (groups + program).to(tl.int64) * SIZE + at)
    return total


@triton.jit
def _chunk(
    row, chunks, batches,
    dt_ptr, a_ptr, lam_ptr, given_omega_ptr, doc_ptr, coefficient_ptr, vector_ptr, flow_ptr, turned_ptr, omega_ptr,
    last_ptr, last_phase_ptr, dphase_ptr, length,
    ddt_ptr, da_ptr, dlam_ptr, domega_ptr,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, ALONG: tl.constexpr, THROUGH: tl.constexpr, WITHIN: tl.constexpr,
    SAME: tl.constexpr, TURN: tl.constexpr, FLOWS: tl.constexpr, FLOW: tl.constexpr, TURNED: tl.constexpr,
    G: tl.constexpr, PER: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr,
    HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of Δ, A, λ and ω of one chunk, HEADS heads at a time."""
    batch, chunk = row // chunks, row % chunks
    own = tl.arange(0, T)
    t = chunk * T + own
    column = tl.arange(0, S)[None, :]
    of_omega = (batch * length + t)[:, None] * S + column
    given_omega = tl.load(given_omega_ptr + of_omega, mask=(t < length)[:, None], other=0.0)
    domega = tl.zeros((T, S), tl.float32)
    for group in tl.static_range(G):
        for side in tl.static_range(2):
            of_side = (side * T + own)[:, None] * S + column
            domega += _gathered(
                omega_ptr, row * G + group, batches * chunks * G, of_side, 2 * T * S, PER, LEAST, LONGER
            )
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)
        here = tl.broadcast_to((head < H)[None, :], (T, HEADS))
        before = here & (t > 0)[:, None]
        place = (row * H + head).to(tl.int64)
        of_head = (batch * H + head).to(tl.int64) * chunks + chunk
        same = _rows(vector_ptr, batch, chunks, head, t, here, SAME, H, T, VECTORS, WIDTH)
        through = _rows(vector_ptr, batch, chunks, head, t, here, THROUGH, H, T, VECTORS, WIDTH)
        key = through + _rows(vector_ptr, batch, chunks, head, t, here, WITHIN, H, T, VECTORS, WIDTH)
        key_before = _rows(vector_ptr, batch, chunks, head, t - 1, before, THROUGH, H, T, VECTORS, WIDTH)
        key_before += _rows(vector_ptr, batch, chunks, head, t - 1, before, WITHIN, H, T, VECTORS, WIDTH)
        along = _rows(vector_ptr, batch, chunks, head, t, here, ALONG, H, T, VECTORS, WIDTH)
        turn = _rows(vector_ptr, batch, chunks, head, t, here, TURN, H, T, VECTORS, WIDTH)
        turn += _rows(vector_ptr, batch, chunks, head, t, here, TURN + 1, H, T, VECTORS, WIDTH)

        at = (batch * length + t)[:, None] * H + head[None, :]
        given = here & (t < length)[:, None]
        dt = tl.load(dt_ptr + at, mask=given, other=0.0)
        gamma = tl.load(lam_ptr + at, mask=given, other=0.0) * dt  # which no step of the decay scales
        decay = tl.load(coefficient_ptr + of_head * (ROWS * T) + DECAY * T + T - 1, mask=head < H, other=0.0)
        passing = tl.exp2(decay)
        flow = passing * _sums(flow_ptr, place * (FLOWS * 2 * S) + FLOW * 2 * S, head, H, 2 * S) + tl.sum(through, 0)
        later = _beyond(
            chunk, batch, chunks, head, place, passing, flow_ptr, turned_ptr, last_phase_ptr, dphase_ptr,
            H, S, FLOWS, TURNED, HAS_LAST,
        )  # fmt: skip
        domega += tl.dot(dt, later, input_precision="ieee")
        turn += tl.dot(given_omega, tl.trans(later), input_precision="ieee")
        of_coefficients(
            chunk, batch, chunks, head, dt_ptr, a_ptr, lam_ptr, doc_ptr, last_ptr, length, ddt_ptr, da_ptr, dlam_ptr,
            along - same * gamma, key, key_before, same, turn, flow, H, T, HAS_DOC, HAS_LAST,
        )  # fmt: skip
    tl.store(domega_ptr + of_omega, domega, mask=(t < length)[:, None])


@triton.jit
def _rows_of_group(
    group, side, chunks, batches, down_ptr, out_ptr, length,
    T: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, G: tl.constexpr, PER: tl.constexpr,
    LEAST: tl.constexpr, LONGER: tl.constexpr,
):  # fmt: skip
    """The gradient of C (side 0) or B of one group of a chunk, [b, l, r, g, N]."""
    row, column = tl.arange(0, WIDTH), tl.arange(0, N)[None, :]
    batch, chunk = group // G // chunks, group // G % chunks
    t = chunk * T + row % T
    for rank in tl.static_range(2):  # of a pair
        at = ((side * 2 + rank) * WIDTH + row)[:, None] * N + column
        total = _gathered(down_ptr, group, batches * chunks * G, at, 4 * WIDTH * N, PER, LEAST, LONGER)
        to = ((batch * length + t) * R + row // T * 2 + rank) * G + group % G
        to = out_ptr + to.to(tl.int64)[:, None] * N + column
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=(t < length)[:, None])


@triton.jit
def _of_weights(
    ptr, head, column, programs,
    H: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr,
):  # fmt: skip
    """Sums over the programs that have this head, [programs, h, SIZE] → of some columns; MANY programs at a time."""
    total = tl.zeros(column.shape, tl.float32)
    for before in range(0, programs, MANY):
        program = before + tl.arange(0, MANY)
        first = program * LEAST + tl.minimum(program, LONGER)
        steps = LEAST + (program < LONGER).to(tl.int32)
        here = (program < programs) & ((head + H - first % H) % H < steps)
        at = (program * H + head) * SIZE
        total += tl.sum(tl.load(ptr + at[:, None] + column[None, :], mask=here[:, None], other=0.0), 0)
    return total


@triton.jit
def _weights(
    head, part, rows, chunks, programs, bias_ptr, mimo_ptr, vector_ptr,
    b_ptr, c_ptr, o_ptr, z_ptr, x_ptr, d_ptr,
    H: tl.constexpr, VECTORS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, MANY: tl.constexpr, PART: tl.constexpr,
    LEAST: tl.constexpr, LONGER: tl.constexpr,
):  # fmt: skip
    """Gradients of weights of one head: PART columns of what programs have of it, or, the last part, that of D.

    biases: [programs, h, 2, N, RANKS], of C and B; mimo: [programs, h, 3, P, RANKS], of mimo_o, mimo_z and mimo_x. The
    gradients: [h, r, N or P] and [h].
    """
    column = tl.arange(0, PART)
    biases: tl.constexpr = 2 * N * RANKS // PART
    others: tl.constexpr = 3 * P * RANKS // PART
    if part < biases:
        column += part * PART
        total = _of_weights(bias_ptr, head, column, programs, H, 2 * N * RANKS, MANY, LEAST, LONGER)
        rank = column % RANKS
        at = (head * R + rank) * N + column // RANKS % N
        tl.store(tl.where(part < biases // 2, c_ptr, b_ptr) + at, total, mask=rank < R)
    elif part < biases + others:
        column += (part - biases) * PART
        total = _of_weights(mimo_ptr, head, column, programs, H, 3 * P * RANKS, MANY, LEAST, LONGER)
        rank = column % RANKS
        at = (head * R + rank) * P + column // RANKS % P
        kind = column // (P * RANKS)
        tl.store(o_ptr + at, total, mask=(rank < R) & (kind == 0))
        tl.store(z_ptr + at, total, mask=(rank < R) & (kind == 1))
        tl.store(x_ptr + at, total, mask=(rank < R) & (kind == 2))
    else:
        overlaps = tl.zeros((WIDTH,), tl.float32)
        for first in range(0, rows, MANY):
            row = first + tl.arange(0, MANY)
            place = (row * H + head).to(tl.int64) * (VECTORS * WIDTH)
            at = place[:, None] + (OVERLAP * WIDTH + tl.arange(0, WIDTH))[None, :]
            overlaps += tl.sum(tl.load(vector_ptr + at, mask=(row < rows)[:, None], other=0.0), 0)
        tl.store(d_ptr + head, tl.sum(overlaps, 0))


@triton.jit
def finish(
    dt_ptr, a_ptr, lam_ptr, given_omega_ptr, doc_ptr, coefficient_ptr, vector_ptr, flow_ptr, turned_ptr, down_ptr,
    omega_ptr, bias_ptr, mimo_ptr, last_ptr, last_phase_ptr, dphase_ptr,
    length, chunks, batches, programs,
    ddt_ptr, da_ptr, dlam_ptr, domega_ptr, db_ptr, dc_ptr, b_bias_ptr, c_bias_ptr, o_ptr, z_ptr, x_ptr, d_ptr,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    RANKS: tl.constexpr, G: tl.constexpr, PER: tl.constexpr, LEAST: tl.constexpr, LONGER: tl.constexpr,
    HEADS: tl.constexpr, MANY: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, ALONG: tl.constexpr, THROUGH: tl.constexpr, WITHIN: tl.constexpr,
    SAME: tl.constexpr, OVERLAP: tl.constexpr, TURN: tl.constexpr, FLOWS: tl.constexpr, FLOW: tl.constexpr,
    TURNED: tl.constexpr, HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """All of it: programs for weights, then for coefficients and ω, which take longest, then for rows of C and B."""
    number = tl.program_id(0)
    parts: tl.constexpr = (2 * N + 3 * P) * RANKS // PART + 1
    rows = batches * chunks
    others = number - H * parts
    if others < 0:
        _weights(
            number // parts, number % parts, rows, chunks, programs, bias_ptr, mimo_ptr, vector_ptr,
            b_bias_ptr, c_bias_ptr, o_ptr, z_ptr, x_ptr, d_ptr,
            H, VECTORS, WIDTH, OVERLAP, N, P, R, RANKS, MANY, PART, LEAST, LONGER,
        )  # fmt: skip
    elif others < rows:
        _chunk(
            others, chunks, batches,
            dt_ptr, a_ptr, lam_ptr, given_omega_ptr, doc_ptr, coefficient_ptr, vector_ptr, flow_ptr, turned_ptr,
            omega_ptr, last_ptr, last_phase_ptr, dphase_ptr, length, ddt_ptr, da_ptr, dlam_ptr, domega_ptr,
            H, T, S, HEADS, ROWS, DECAY, VECTORS, WIDTH, ALONG, THROUGH, WITHIN, SAME, TURN, FLOWS, FLOW, TURNED,
            G, PER, LEAST, LONGER, HAS_DOC, HAS_LAST,
        )  # fmt: skip
    else:
        others -= rows
        side = others % 2
        out = tl.where(side == 0, dc_ptr, db_ptr)
        _rows_of_group(others // 2, side, chunks, batches, down_ptr, out, length, T, N, WIDTH, R, G, PER, LEAST, LONGER)
