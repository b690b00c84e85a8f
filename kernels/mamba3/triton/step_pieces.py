"""What the step's kernel is made of: functions of an angle and a decay, loads, H in a product's tile, the read-out.

The tensor cores' product [PP, NP] wants the numbers of a thread in rows and columns of its own choice. Which row of H
is called which row of the product, and which column which, is free as long as the other operands agree. So H is loaded
in pieces of 16 bytes a thread: V columns, W = 4·V side by side for the 4 threads of a row, a thread's pieces of one row
after another, so that memory comes in whole lines. And `tile` renames rows and columns such that every thread already
has what the product wants from it: nothing moves between threads.
"""

import triton
import triton.language as tl

from .pieces import sigmoid

# As ../rotary.py: k · _TWO_PI_HIGH is exact, and the rest of 2π is subtracted apart.
_TWO_PI = tl.constexpr(6.283185307179586)
_TWO_PI_HIGH = tl.constexpr(6.28125)
_TWO_PI_LOW = tl.constexpr(6.283185307179586 - 6.28125)
_ALL_GONE = tl.constexpr(-110.0)  # e to this power is 0 in float32


@triton.jit
def wrap(angle):
    """Radians to [0, 2π), as `rotary.wrap_angle`."""
    turns = tl.floor(angle * (1 / _TWO_PI))
    high, low = turns * _TWO_PI_HIGH, turns * _TWO_PI_LOW
    wrapped = tl.where(turns < 0, (angle - low) - high, (angle - high) - low)
    wrapped = tl.where(wrapped < 0, wrapped + _TWO_PI, tl.where(wrapped >= _TWO_PI, wrapped - _TWO_PI, wrapped))
    return tl.where(wrapped >= _TWO_PI, 0.0, wrapped)


@triton.jit
def cos_sin(angle):
    """Of an angle in [0, 2π), to float32 accuracy; the library's functions carry code for angles of any size."""
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = (angle - quarter * 1.5703125) - quarter * 4.838267948966e-4
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cos = (1.0 - 0.5 * square) + square * square * cos
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    return cos, tl.where((quarter == 2.0) | (quarter == 3.0), -sin, sin)


@triton.jit
def exp(v):
    """e^v for a v ≤ 0 to float32 accuracy: the hardware's 2^-22 would add up over the memory of a slow head."""
    v = tl.where(v < _ALL_GONE, _ALL_GONE, v)
    turns = tl.floor(v * 1.4426950408889634 + 0.5)
    rest = (v - turns * 0.693359375) + turns * 2.12194440e-4
    series = 8.3334519073e-3 + rest * (1.3981999507e-3 + rest * 1.9875691500e-4)
    series = 5.0000001201e-1 + rest * (1.6666665459e-1 + rest * (4.1665795894e-2 + rest * series))
    series = 1.0 + (rest + rest * rest * series)
    return series * tl.exp2(turns)


@triton.jit
def call_into_cache(ptr, wanted, COUNT: tl.constexpr):
    """Asks for COUNT numbers to come into the second-level cache, if wanted; nothing waits for them."""
    SIZE: tl.constexpr = COUNT * (ptr.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        """{
        .reg .pred asks;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 asks, thread, 0;
        setp.ne.and.s32 asks, $3, 0, asks;
        @asks cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r,r", [ptr.to(tl.int64), tl.full((), SIZE, tl.int32), wanted.to(tl.int32)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_wide(ptr, at, exists, EXISTS: tl.constexpr, absent: tl.constexpr):
    """In float32; `absent` instead of an array that is not there."""
    v = absent
    if EXISTS:
        v = tl.load(ptr + at, mask=exists, other=0.0).to(tl.float32)
    return v


@triton.jit
def request(ptr, scale_ptr, bias_ptr, at, bias_at, column, partner, exists, turns, HAS_BIAS: tl.constexpr,
            RAW: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """B or C of a rank, or of all, its norm's weight if RAW and its bias; and all three of what a column turns with."""
    v = load_wide(ptr, at + column, exists, True, 0.0)
    scale = load_wide(scale_ptr, column + 0 * at, exists, RAW, 1.0)
    bias = load_wide(bias_ptr, bias_at + column, exists, HAS_BIAS, 0.0)
    other, other_scale, other_bias = v, scale, bias
    if S > 0:
        other = load_wide(ptr, at + partner, turns, True, 0.0)
        other_scale = load_wide(scale_ptr, partner + 0 * at, turns, RAW, 1.0)
        other_bias = load_wide(bias_ptr, bias_at + partner, turns, HAS_BIAS, 0.0)
    return v, scale, bias, other, other_scale, other_bias


@triton.jit
def request_ranks(ptr, scale_ptr, bias_ptr, at, bias_at, column, partner, exists, turns, HAS_BIAS: tl.constexpr,
                  RAW: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """`request` of every rank apart."""
    found = ()
    for r in tl.static_range(R):
        found += (request(ptr, scale_ptr, bias_ptr, at + r * (G * N), bias_at + r * N, column, partner, exists, turns,
                          HAS_BIAS, RAW, S),)  # fmt: skip
    return found


@triton.jit
def ready(found, norm_eps, axis: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr, RAW: tl.constexpr):
    """What `request` found, with the bias; before that, if RAW, the norm over columns, rounded as by the reference."""
    v, scale, bias, other, other_scale, other_bias = found
    if RAW:
        inverse = tl.zeros_like(v)
        # Always so. Without a branch ptxas moves what is to come, and the wait for v, to before the loads of H.
        if norm_eps >= 0.0:
            inverse += tl.rsqrt(tl.sum(v * v, axis, keep_dims=True) / N + norm_eps)
        v = (v * inverse * scale).to(dtype).to(tl.float32)
        other = (other * inverse * other_scale).to(dtype).to(tl.float32)
    return v + bias, other + other_bias


@triton.jit
def ready_ranks(found, norm_eps, N: tl.constexpr, dtype: tl.constexpr, RAW: tl.constexpr, R: tl.constexpr):
    """`ready` of every rank apart."""
    all_ready = ()
    for r in tl.static_range(R):
        all_ready += (ready(found[r], norm_eps, 0, N, dtype, RAW),)
    return all_ready


@triton.jit
def request_readout(z_ptr, mimo_z_ptr, mimo_o_ptr, norm_ptr, d_ptr, head, p, token_at, rank_at, in_rank,
                    P: tl.constexpr, HAS_Z: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
                    HAS_NORM: tl.constexpr, HAS_D: tl.constexpr):  # fmt: skip
    """What `read_out` needs besides y and x: gate and mimo_o [PP, RP], the norm's weight [PP, 1] and D; 1 if absent."""
    gate, mimo_o, norm, d = 1.0, 1.0, 1.0, 1.0
    if HAS_Z:
        gate = tl.load(z_ptr + token_at, mask=in_rank, other=0.0).to(tl.float32)
        if HAS_MIMO_Z:
            gate *= tl.load(mimo_z_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
    if HAS_MIMO_O:
        mimo_o = tl.load(mimo_o_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm = tl.load(norm_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    if HAS_D:
        d = tl.load(d_ptr + head).to(tl.float32)
    return gate, mimo_o, norm, d


@triton.jit
def read_by_sums(h, cs, cos, sin, R: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr,
                 W: tl.constexpr, V: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """H C_r of every rank, [PP, RP], in float32. `cs`: from `ready_ranks`; TILED: whether H is as `tile` has it."""
    ys = ()
    for r in tl.static_range(R):
        c = cs[r][0] * cos + cs[r][1] * sin
        if TILED:
            ys += (tl.sum(h * tile_columns(tl.reshape(c, (1, NP)), 1, NP, W, V), 1),)
        else:
            ys += (tl.sum(tl.reshape(h * tl.reshape(c, (1, NP // W, W)), (PP, NP)), 1),)
    return stack(ys, R, RP)


@triton.jit
def read_out(y, x, gate, mimo_o, norm, d, norm_eps, in_rank, P: tl.constexpr, HAS_Z: tl.constexpr,
             HAS_MIMO_O: tl.constexpr, HAS_NORM: tl.constexpr, HAS_D: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """As ../readout.py: y and x [PP, RP] → [PP]."""
    scale = 1.0
    if HAS_Z:
        scale = gate * sigmoid(gate, FAST)
    if HAS_MIMO_O:
        scale *= mimo_o
    if HAS_D:
        y += d * x
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / P + norm_eps)[None, :] * norm
    return tl.sum(tl.where(in_rank, y * scale, 0.0), 1)


@triton.jit
def halves(v, NARROW: tl.constexpr):
    """Two arrays whose sum is v: bfloat16, to 2^-17, or what the tensor cores read of float32, to 2^-20."""
    if NARROW:
        high = v.to(tl.bfloat16)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = v - high
    return high, low


@triton.jit
def outer_operands(x_prev, x_now, before, b, PP: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, W: tl.constexpr,
                   V: tl.constexpr, NARROW: tl.constexpr):  # fmt: skip
    """Σ_r x_prev,r ⊗ before_r + x_now,r ⊗ b_r as a product: [PP, 8·RP], [8·RP, NP], in the order of `tile`'s.

    The inner axis: rank, token (the one before, this one), half of B, half of x.
    """
    high, low = halves(tl.reshape(tl.join(x_prev, x_now), (PP, 2 * RP)), NARROW)
    left = tl.join(high, low)
    left = tl.reshape(tl.join(left, left), (2, PP // 16, 8, 8 * RP))
    left = tl.reshape(tl.permute(left, (1, 0, 2, 3)), (PP, 8 * RP))
    both = tl.join(tile_columns(before, RP, NP, W, V), tile_columns(b, RP, NP, W, V))
    high, low = halves(both, NARROW)
    right = tl.permute(tl.join(tl.join(high, high), tl.join(low, low)), (0, 2, 3, 4, 1))
    return left, tl.reshape(right, (8 * RP, NP))


@triton.jit
def readout_operand(c, NP: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, V: tl.constexpr):
    """C [RP, NP] → [NP, 16], rows in the order of `tile`'s: two halves for every rank, and zeros after them.

    16 columns, for with 8 H would have to move between threads.
    """
    high, low = halves(tile_columns(c, RP, NP, W, V), True)
    c = tl.reshape(tl.permute(tl.join(high, low), (1, 0, 2)), (NP, RP, 2))
    PADDINGS: tl.constexpr = 3 if RP == 1 else 2 if RP == 2 else 1 if RP == 4 else 0
    for _ in tl.static_range(PADDINGS):
        c = tl.join(c, tl.zeros_like(c))
    return tl.reshape(c, (NP, 16))


@triton.jit
def places(PP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TILED: tl.constexpr):
    """Rows and columns of H as it is loaded, [PP / 2, C, 2, W] for `tile`, else [PP, C, W]."""
    if TILED:
        row = tl.arange(0, PP // 2)[:, None, None, None] + tl.arange(0, 2)[None, None, :, None] * (PP // 2)
        column = tl.arange(0, C)[None, :, None, None] * W + tl.arange(0, W)[None, None, None, :]
    else:
        row = tl.arange(0, PP)[:, None, None]
        column = tl.arange(0, C)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    return row, column


@triton.jit
def tile(h, PP: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, V: tl.constexpr):
    """[PP / 2, NP / W, 2, W], row i + PP / 2 · j at [i, :, j], → [PP, NP]."""
    h = tl.reshape(h, (PP // 16, 8, NP // W, 2, W // V, V // 2, 2))
    return tl.reshape(tl.permute(h, (0, 3, 1, 2, 5, 4, 6)), (PP, NP))


@triton.jit
def tile_columns(v, K: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, V: tl.constexpr):
    """[K, NP], columns in the order of `tile`'s."""
    v = tl.reshape(v, (K, NP // W, W // V, V // 2, 2))
    return tl.reshape(tl.permute(v, (0, 1, 3, 2, 4)), (K, NP))


@triton.jit
def untile(h, PP: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, V: tl.constexpr):
    """The way back from `tile`."""
    h = tl.reshape(h, (PP // 16, 2, 8, NP // W, V // 2, W // V, 2))
    return tl.reshape(tl.permute(h, (0, 2, 3, 1, 5, 4, 6)), (PP // 2, NP // W, 2, W))


@triton.jit
def untile_rows(v, PP: tl.constexpr, K: tl.constexpr):
    """[PP, K], rows from the order of `tile`'s to their own."""
    return tl.reshape(tl.permute(tl.reshape(v, (PP // 16, 2, 8, K)), (1, 0, 2, 3)), (PP, K))


@triton.jit
def stack(parts, R: tl.constexpr, RP: tl.constexpr):
    """R vectors [E], and zeros in the places left over → [E, RP]; RP is 1, 2, 4 or 8."""
    for _ in tl.static_range(RP - R):
        parts += (tl.zeros_like(parts[0]),)
    if RP == 1:
        stacked = parts[0][:, None]
    elif RP == 2:
        stacked = tl.join(parts[0], parts[1])
    elif RP == 4:
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        stacked = tl.reshape(pairs, (parts[0].shape[0], 4))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        stacked = tl.reshape(tl.join(even, odd), (parts[0].shape[0], 8))
    return stacked
