"""What the Triton kernels share: phases as integers, rotation, and the coefficients of one chunk.

Notation: a chunk has T positions and R ranks, so ROWS = T·R rows; row i is rank i % R of position i // R. A phase is a
fraction of a turn, int32 (2^32 to a turn) or int16 (2^16): sums wrap by themselves. Decays are in powers of two:
L is a running sum of Δ A log₂e. Rotated coordinates come as [ROWS, 2S], real and imaginary part of each pair side by
side: a permutation of the n coordinates that B, C and the state share, so products over n do not see it.
"""

import triton
import triton.language as tl

# 1 / 2π in two parts; the first has few enough bits for the second to repair its rounding.
_TURNS_HIGH = tl.constexpr(0.15917968750)
_TURNS_LOW = tl.constexpr(-2.4744408106e-05)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def turn_steps(dt, omega):
    """Δω in radians as an int32 fraction of a turn."""
    angle = dt * omega
    turns = angle * _TURNS_HIGH + angle * _TURNS_LOW
    turns = turns - tl.floor(turns + 0.5)
    return (turns * 4294967296.0).to(tl.int32)


@triton.jit
def running_sums(v, EXACT: tl.constexpr):
    """Running sums over axis 1 of v, -152 ≤ v ≤ 0, in two parts; if EXACT, differences of the first are exact."""
    if EXACT:
        # A chunk's sum stays under 2^15: multiples of 2^-8 need 23 bits. The rest, under 2^-9 a term, adds up small.
        coarse = tl.floor(v * 256.0 + 0.5) * (1 / 256.0)
        return tl.cumsum(coarse, 1), tl.cumsum(v - coarse, 1)
    else:
        return tl.cumsum(v, 1), v


@triton.jit
def exp2(v, FAST: tl.constexpr):
    """2^v; FAST: the hardware's approximation, denormals flushed to 0."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    else:
        return tl.exp2(v)


@triton.jit
def sigmoid(v, FAST: tl.constexpr):
    """1 / (1 + e^-v); FAST: through the hardware's tanh, relative error 2^-11."""
    if FAST:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * v], tl.float32, True, 1)
        return 0.5 * tanh + 0.5
    else:
        return tl.sigmoid(v)


@triton.jit
def cos_sin(phase, FAST: tl.constexpr):
    """Cosine and sine of a phase, int16 or int32 to a turn. FAST: the hardware's, absolute error 2^-20."""
    angle = phase.to(tl.float32) * (_TWO_PI / (65536.0 if phase.dtype == tl.int16 else 4294967296.0))
    if FAST:
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return cos, sin


@triton.jit
def within(valid, column, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Mask of a [rows, PADDED] tile of which only WIDTH columns exist."""
    if WIDTH == PADDED:
        return valid[:, None]
    else:
        return valid[:, None] & (column < WIDTH)[None, :]


@triton.jit
def load_omega(omega_ptr, batch, head, t, length, column, H: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
               OMEGA_HEADS: tl.constexpr):  # fmt: skip
    """ω per row, [ROWS, SP]."""
    at = (batch * length + t) * S
    if OMEGA_HEADS:
        at = ((batch * length + t) * H + head) * S
    return tl.load(omega_ptr + at[:, None] + column[None, :], mask=within(t < length, column, S, SP), other=0.0)


@triton.jit
def chunk_rotation(phase_ptr, row_head, t, length, column, S: tl.constexpr, SP: tl.constexpr, FAST: tl.constexpr):
    """Cosine and sine of every row's phases, [ROWS, SP]."""
    at = (row_head.to(tl.int64) * length + t) * S
    mask = within(t < length, column, S, SP)
    return cos_sin(tl.load(phase_ptr + at[:, None] + column[None, :], mask=mask, other=0), FAST)


@triton.jit
def chunk_decays(decay_ptr, fine_decay_ptr, scale_ptr, doc_ptr, batch, row_head, start, length, R: tl.constexpr,
                 T: tl.constexpr, HAS_DOC: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Of one chunk, per row: L in two parts, s, document, e^{L_end - L} s, e^L; and e^{L_end}.

    The last three are 0 where the document differs from that of H_out or of H_in.
    """
    t = start + tl.arange(0, T * R) // R
    at = row_head * length + tl.minimum(t, length - 1)
    end = row_head * length + tl.minimum(start + T, length) - 1
    coarse = tl.load(decay_ptr + at)
    fine = tl.zeros_like(coarse)
    end_coarse = tl.load(decay_ptr + end)
    end_fine = 0.0
    if EXACT:
        fine = tl.load(fine_decay_ptr + at)
        end_fine = tl.load(fine_decay_ptr + end)
    scale = tl.load(scale_ptr + at, mask=t < length, other=1e-20)
    to_end = exp2((end_coarse - coarse) + (end_fine - fine), FAST) * scale
    from_start = exp2(coarse + fine, FAST)
    end_decay = tl.exp2(end_coarse + end_fine)
    doc = tl.zeros_like(t)
    if HAS_DOC:
        doc = tl.load(doc_ptr + batch * length + tl.minimum(t, length - 1))
        before = tl.load(doc_ptr + batch * length + tl.maximum(start - 1, 0))
        last = tl.load(doc_ptr + batch * length + tl.minimum(start + T, length) - 1)
        to_end = tl.where(doc == last, to_end, 0.0)
        from_start = tl.where(doc == before, from_start, 0.0)
        end_decay = tl.where(before == last, end_decay, 0.0)
    return coarse, fine, scale, doc, to_end, from_start, end_decay


@triton.jit
def mixing(coarse, fine, gamma, scale, doc, R: tl.constexpr, HAS_DOC: tl.constexpr, EXACT: tl.constexpr,
           FAST: tl.constexpr):  # fmt: skip
    """What multiplies (C_i·B_j) x_j in y_i: e^{L_i - L_j} s_j below the diagonal, γ_i on it, 0 above: [ROWS, ROWS]."""
    position = tl.arange(0, coarse.shape[0]) // R
    coupled = position[:, None] > position[None, :]
    if HAS_DOC:
        coupled = coupled & (doc[:, None] == doc[None, :])
    difference = coarse[:, None] - coarse[None, :]
    if EXACT:
        difference += fine[:, None] - fine[None, :]
    # Masked before the exponential, which could overflow.
    mix = exp2(tl.where(coupled, difference, float("-inf")), FAST) * scale[None, :]
    return tl.where(position[:, None] == position[None, :], gamma[:, None], mix)


@triton.jit
def pair_up(real, imag):
    """Two [ROWS, S] → [ROWS, 2S], parts side by side."""
    return tl.reshape(tl.join(real, imag), (real.shape[0], 2 * real.shape[1]))


@triton.jit
def unpair(v):
    """[ROWS, 2S], parts side by side → two of [ROWS, S]."""
    return tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))


@triton.jit
def per_rank(ptr, rank, column, WIDTH: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr):
    """WIDTH columns of a head's [R, STRIDE] weight at every row: float32, [ROWS, PADDED], or [1, PADDED] if R is 1."""
    if R == 1:
        return tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    else:
        mask = (column < WIDTH)[None, :]
        return tl.load(ptr + rank[:, None] * STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(ptr, bias_ptr, row, rank, valid, column, WIDTH: tl.constexpr, PADDED: tl.constexpr,
              HAS_BIAS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """WIDTH columns of B or C, plus bias: float32 [ROWS, PADDED]. `row` is the offset of each row's group, [ROWS]."""
    mask = within(valid, column, WIDTH, PADDED)
    v = tl.load(ptr + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += per_rank(bias_ptr, rank, column, WIDTH, PADDED, R, N)
    return v


@triton.jit
def operand_of(v, operand: tl.constexpr, PRECISION: tl.constexpr):
    """v as an operand of a product; float32 for the tensor cores' tf32 is rounded: they would cut it off."""
    if operand == tl.float32 and PRECISION == "tf32":
        return ((v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return v.to(operand)


@triton.jit
def rotated(ptr, bias_ptr, row, rank, valid, cos, sin, column, operand: tl.constexpr, HAS_BIAS: tl.constexpr,
            R: tl.constexpr, N: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The rotated coordinates of B or C, [ROWS, 2 SP]."""
    real = load_rows(ptr, bias_ptr, row, rank, valid, column, S, SP, HAS_BIAS, R, N)
    imag = load_rows(ptr + S, bias_ptr + S, row, rank, valid, column, S, SP, HAS_BIAS, R, N)
    return operand_of(pair_up(real * cos - imag * sin, real * sin + imag * cos), operand, PRECISION)
