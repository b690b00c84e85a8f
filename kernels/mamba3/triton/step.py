"""One token of the recurrence as one Triton kernel: a program holds the state of one head in registers.

    φ' = φ + Δ ω mod 2π      H' = α H + β Σ_r x_prev,r ⊗ B_prev,r + γ Σ_r x_r ⊗ B_r      y_r = H' C_r + D x_r

Letters as in ../reference.py. Reading and writing H is nearly all the work, so H is asked for first and everything else
is computed while it arrives: one thread per column turns B and C (column i < s pairs with i + s), and the results pass
through shared memory to every thread. H is [P, C, W], column c·W + w at [:, c, w]: the fewer columns W side by side,
the more rows of H a warp holds, and the fewer steps a sum over n takes between its lanes. PP, NP, RP are P, N, R
rounded up to powers of two.

In a decoding loop the state is carried: every output of the state takes the memory of its input where dtypes allow, or
XLA would copy all of H once more at every token. A program reads all of its head's old state before it writes any.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from .. import reference
from ..inputs import Sequence, Weights
from ..state import Mamba3State
from .launch import batch_too_large, launch
from .pieces import sigmoid

# As ../rotary.py: k · _TWO_PI_HIGH is exact, and the rest of 2π is subtracted apart.
_TWO_PI = tl.constexpr(6.283185307179586)
_TWO_PI_HIGH = tl.constexpr(6.28125)
_TWO_PI_LOW = tl.constexpr(6.283185307179586 - 6.28125)
_ALL_GONE = tl.constexpr(-110.0)  # e to this power is 0 in float32
_MAX_RANK = 8  # of what the sum over ranks is written for
_MAX_HEADDIM, _MAX_D_STATE = 128, 256  # a head's state is in the registers of 16 warps
_MAX_WARPS = 16
_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)


class Tiling(NamedTuple):
    """How a head's state is laid over threads."""

    columns: int  # W
    warps: int
    dots: bool  # tensor cores (tf32) instead of one multiply-add per product


@triton.jit
def _wrap(angle):
    """Radians to [0, 2π), as `rotary.wrap_angle`."""
    turns = tl.floor(angle * (1 / _TWO_PI))
    high, low = turns * _TWO_PI_HIGH, turns * _TWO_PI_LOW
    wrapped = tl.where(turns < 0, (angle - low) - high, (angle - high) - low)
    wrapped = tl.where(wrapped < 0, wrapped + _TWO_PI, tl.where(wrapped >= _TWO_PI, wrapped - _TWO_PI, wrapped))
    return tl.where(wrapped >= _TWO_PI, 0.0, wrapped)


@triton.jit
def _cos_sin(angle):
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
def _exp(v):
    """e^v for a v ≤ 0 to float32 accuracy: the hardware's 2^-22 would add up over the memory of a slow head."""
    v = tl.where(v < _ALL_GONE, _ALL_GONE, v)
    turns = tl.floor(v * 1.4426950408889634 + 0.5)
    rest = (v - turns * 0.693359375) + turns * 2.12194440e-4
    series = 8.3334519073e-3 + rest * (1.3981999507e-3 + rest * 1.9875691500e-4)
    series = 5.0000001201e-1 + rest * (1.6666665459e-1 + rest * (4.1665795894e-2 + rest * series))
    series = 1.0 + (rest + rest * rest * series)
    return series * tl.exp2(turns)


@triton.jit
def _turned(ptr, bias_ptr, column, partner, exists, turns, cos, sin, HAS_BIAS: tl.constexpr, S: tl.constexpr):
    """B or C of a rank, or of all, with its bias, rotated; `sin` carries the sign of the partner's part."""
    v = tl.load(ptr + column, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
    if S > 0:
        other = tl.load(ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if HAS_BIAS:
            other += tl.load(bias_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        v = v * cos + other * sin
    return v


@triton.jit
def _halves(v, FAST: tl.constexpr):
    """Two arrays whose sum is v: FAST, bfloat16 and to 2^-17, else float32 and exactly."""
    high = v.to(tl.bfloat16)
    low = v - high.to(tl.float32)
    if FAST:
        low = low.to(tl.bfloat16)
    else:
        high = high.to(tl.float32)
    return high, low


@triton.jit
def _row(v, C: tl.constexpr, W: tl.constexpr):
    """[NP] → [1, C, W]."""
    return tl.reshape(v, (C, W))[None, :, :]


@triton.jit
def _stack(parts, R: tl.constexpr, RP: tl.constexpr):
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


@triton.jit
def step_kernel(
    x_ptr, z_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr, b_ptr, c_ptr,
    b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr, d_ptr, norm_ptr,
    angle_ptr, ssm_ptr, b_prev_ptr, x_prev_ptr, norm_eps,
    y_ptr, angle_out_ptr, ssm_out_ptr, b_out_ptr, x_out_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    PP: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, OMEGA_HEADS: tl.constexpr,
    HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr,
    DOTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One head of one batch row."""
    C: tl.constexpr = NP // W
    PRECISION: tl.constexpr = "tf32" if FAST else "tf32x3"
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row_head = batch * H + head
    group = head // (H // G)

    p = tl.arange(0, PP)
    in_p = p < P
    wide = tl.arange(0, C)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    state_base = row_head.to(tl.int64) * (P * N)
    state_at = p[:, None, None] * N + wide
    in_state = in_p[:, None, None] & (wide < N)
    state = tl.load(ssm_ptr + state_base + state_at, mask=in_state, other=0.0)

    x_at = row_head * P + p
    x_token = tl.load(x_ptr + x_at, mask=in_p, other=0.0)
    x_prev = tl.load(x_prev_ptr + x_at, mask=in_p, other=0.0).to(tl.float32)
    x = x_token.to(tl.float32)
    dt = tl.load(dt_ptr + row_head)
    lam = tl.load(lam_ptr + row_head)
    alpha = _exp(dt * tl.load(a_ptr + row_head))
    x_prev *= (1 - lam) * dt * alpha
    x_now = x * (lam * dt)

    column = tl.arange(0, NP)
    in_n = column < N
    turns = column < 2 * S
    partner = column
    cos = 1.0
    sin = 0.0
    if S > 0:
        imaginary = column >= S
        partner = tl.where(imaginary, column - S, column + S)
        pair = tl.where(imaginary, column - S, column)
        omega_at = batch * S
        if OMEGA_HEADS:
            omega_at = row_head * S
        omega = tl.load(omega_ptr + omega_at + pair, mask=turns, other=0.0)
        angle = _wrap(tl.load(angle_ptr + row_head * S + pair, mask=turns, other=0.0) + dt * omega)
        cos, sin = _cos_sin(angle)
        sin = tl.where(imaginary, sin, -sin)
    h = state.to(tl.float32) * alpha
    own_b = row_head.to(tl.int64) * (R * N)
    group_b = batch * (R * G * N) + group * N
    if DOTS:
        ranks = tl.arange(0, RP)[:, None]
        own = ranks * N + column[None, :]
        token_at = ranks * (G * N)
        weight_at = head * (R * N) + ranks * N
        exists = (ranks < R) & in_n[None, :]
        rotates = (ranks < R) & turns[None, :]
        if S > 0:
            cos, sin = cos[None, :], sin[None, :]
        before = tl.load(b_prev_ptr + own_b + own, mask=exists, other=0.0).to(tl.float32)
        b = _turned(b_ptr + group_b + token_at, b_bias_ptr + weight_at, column[None, :], partner[None, :],
                    exists, rotates, cos, sin, HAS_B_BIAS, S)  # fmt: skip
        c = _turned(c_ptr + group_b + token_at, c_bias_ptr + weight_at, column[None, :], partner[None, :],
                    exists, rotates, cos, sin, HAS_C_BIAS, S)  # fmt: skip
        # Row k of the product's inner axis: rank, token (the one before, this one), half of x, half of B.
        k = tl.arange(0, 2 * RP)[None, :]
        left = tl.where(k % 2 == 0, x_prev[:, None], x_now[:, None])
        if HAS_MIMO_X:
            left *= tl.load(mimo_x_ptr + (head * R + k // 2) * P + p[:, None], mask=in_p[:, None] & (k // 2 < R),
                            other=0.0).to(tl.float32)  # fmt: skip
        high, low = _halves(left, FAST)
        left = tl.join(high, low)
        left = tl.reshape(tl.join(left, left), (PP, 8 * RP))
        high, low = _halves(tl.join(before, b), FAST)
        right = tl.permute(tl.join(tl.join(high, high), tl.join(low, low)), (0, 2, 3, 4, 1))
        h = tl.dot(left, tl.reshape(right, (8 * RP, NP)), tl.reshape(h, (PP, NP)), input_precision=PRECISION)
        high, low = _halves(c, FAST)
        c = tl.reshape(tl.permute(tl.join(high, low), (1, 0, 2)), (NP, 2 * RP))
        # From H as it is stored: rounded, an accumulator is an operand without moving between threads.
        y = tl.dot(h.to(left.dtype), c, input_precision=PRECISION)
        y = tl.sum(tl.reshape(y, (PP, RP, 2)), 2)
        h = tl.reshape(h, (PP, C, W))
        tl.debug_barrier()  # other threads may have yet to read what this overwrites
        tl.store(b_out_ptr + own_b + own, b, mask=exists)
    else:
        bs, ys = (), ()
        for r in tl.static_range(R):
            bias_at = (head * R + r) * N
            before = tl.load(b_prev_ptr + own_b + r * N + column, mask=in_n, other=0.0).to(tl.float32)
            b = _turned(b_ptr + group_b + r * (G * N), b_bias_ptr + bias_at, column, partner, in_n, turns, cos, sin,
                        HAS_B_BIAS, S)  # fmt: skip
            from_before, from_now = x_prev, x_now
            if HAS_MIMO_X:
                weight = tl.load(mimo_x_ptr + (head * R + r) * P + p, mask=in_p, other=0.0).to(tl.float32)
                from_before, from_now = x_prev * weight, x_now * weight
            h += from_before[:, None, None] * _row(before, C, W)
            h += from_now[:, None, None] * _row(b, C, W)
            bs += (b,)
        for r in tl.static_range(R):
            bias_at = (head * R + r) * N
            c = _turned(c_ptr + group_b + r * (G * N), c_bias_ptr + bias_at, column, partner, in_n, turns, cos, sin,
                        HAS_C_BIAS, S)  # fmt: skip
            ys += (tl.sum(tl.reshape(h * _row(c, C, W), (PP, NP)), 1),)
        y = _stack(ys, R, RP)
        tl.debug_barrier()  # other threads may have yet to read what this overwrites
        for r in tl.static_range(R):
            tl.store(b_out_ptr + own_b + r * N + column, bs[r], mask=in_n)
    tl.store(ssm_out_ptr + state_base + state_at, h.to(ssm_out_ptr.dtype.element_ty), mask=in_state)
    if S > 0:
        tl.store(angle_out_ptr + row_head * S + column, angle, mask=column < S)
    tl.store(x_out_ptr + x_at, x_token, mask=in_p)

    rank = tl.arange(0, RP)
    rank_at = (head * R + rank[None, :]) * P + p[:, None]
    in_rank = in_p[:, None] & (rank < R)[None, :]
    if HAS_D:
        skip = x[:, None]
        if HAS_MIMO_X:
            skip = skip * tl.load(mimo_x_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
        y += tl.load(d_ptr + head).to(tl.float32) * skip
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(y * y, 0) / P + norm_eps)
        y *= inverse[None, :] * tl.load(norm_ptr + head * P + p, mask=in_p, other=0.0).to(tl.float32)[:, None]
    if HAS_Z:
        gate = tl.load(z_ptr + x_at, mask=in_p, other=0.0).to(tl.float32)[:, None]
        if HAS_MIMO_Z:
            gate = gate * tl.load(mimo_z_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate, FAST)
    if HAS_MIMO_O:
        y *= tl.load(mimo_o_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
    y = tl.where(in_rank, y, 0.0)
    tl.store(y_ptr + x_at, tl.sum(y, 1).to(y_ptr.dtype.element_ty), mask=in_p)


def default_tiling(rank: int, headdim: int, d_state: int, ssm_dtype: jnp.dtype, x_dtype: jnp.dtype) -> Tiling:
    """The tiling that is fastest for a shape, as far as measured (experiments/latency/step.py)."""
    itemsize = jnp.dtype(ssm_dtype).itemsize
    elements = triton.next_power_of_2(headdim) * triton.next_power_of_2(d_state)
    # 64 elements of H a thread; rows of 128 bytes side by side, a whole line of memory.
    warps = min(max(elements // 2048, 1), _MAX_WARPS)
    columns = min(triton.next_power_of_2(d_state), 128 // itemsize)
    # One multiply-add per product takes as long as a narrow state takes to move from rank 4 on.
    narrow = jnp.dtype(ssm_dtype) == jnp.bfloat16 and jnp.dtype(x_dtype) == jnp.bfloat16
    return Tiling(columns, warps, dots=narrow and rank >= 4 and min(headdim, d_state) >= 16)


def unsupported(token: Sequence, state: Mamba3State) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    rank, p, n = token.b.shape[1], token.x.shape[-1], token.b.shape[-1]
    arrays = {name: getattr(token, name) for name in "xbcz"} | {"state.ssm": state.ssm, "state.x": state.x}
    for name, v in arrays.items():
        if v is not None and v.dtype not in _NARROW:
            return f"{name} has dtype {v.dtype}; the Triton step takes float32, bfloat16 and float16"
    if p > _MAX_HEADDIM or n > _MAX_D_STATE:
        return f"n = {n}, p = {p}; the Triton step takes n up to {_MAX_D_STATE} and p up to {_MAX_HEADDIM}"
    if rank > _MAX_RANK:
        return f"rank {rank}; the Triton step takes ranks up to {_MAX_RANK}"
    return batch_too_large(token.x.shape[0])


@functools.partial(jax.jit, static_argnames=("norm_eps", "tiling"))
def step(
    token: Sequence, weights: Weights, state: Mamba3State, norm_eps: float, tiling: Tiling | None = None
) -> tuple[jax.Array, Mamba3State]:
    """One token, as `reference.step`, on a GPU; derivatives are those of `reference.step`.

    Args:
      token: as `Sequence` without the length axis, of what `unsupported` allows.
      weights: as in `reference.step`.
      state: the state before the token.
      norm_eps: epsilon of the norm.
      tiling: how the kernel is laid out; None = `default_tiling`.

    Returns:
      y [b, h, p] in x's dtype and the next state, whose `ssm` keeps its dtype. The state is updated in place in a loop
      that carries it and where a jitted caller donates it; elsewhere XLA copies it first.
    """
    token = token._replace(**{name: getattr(token, name).astype(jnp.float32) for name in ("dt", "a", "lam", "omega")})
    state = state._replace(angle=state.angle.astype(jnp.float32), b=state.b.astype(jnp.float32))
    if tiling is None:
        tiling = default_tiling(token.b.shape[1], token.x.shape[-1], token.b.shape[-1], state.ssm.dtype, token.x.dtype)
    return _step(token, weights, state, norm_eps, tiling)


def _reference_step(
    token: Sequence, weights: Weights, state: Mamba3State, norm_eps: float
) -> tuple[jax.Array, Mamba3State]:
    y, new = reference.step(token, weights, state, norm_eps)
    return y, new._replace(ssm=new.ssm.astype(state.ssm.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _step(token, weights, state, norm_eps, tiling):
    # Inside the custom derivative, since a custom batching rule has none.
    run = jax.custom_batching.custom_vmap(functools.partial(_call, norm_eps=norm_eps, tiling=tiling))

    @run.def_vmap
    def _(size, batched, token, weights, state):
        if any(jax.tree.leaves(batched[1])):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
            items = [jax.tree.map(lambda v, axis: v if axis == 0 else jnp.stack([v] * size), a, b)
                     for a, b in zip((token, weights, state), axes, strict=True)]  # fmt: skip
            out = jax.lax.map(lambda item: run(*item), tuple(items))
        else:

            def fold(v, is_batched):
                v = v if is_batched else jnp.broadcast_to(v, (size, *v.shape))
                return v.reshape(-1, *v.shape[2:])

            token, state = jax.tree.map(fold, (token, state), (batched[0], batched[2]))
            out = jax.tree.map(lambda v: v.reshape(size, -1, *v.shape[1:]), run(token, weights, state))
        return out, jax.tree.map(lambda _: True, out)

    return run(token, weights, state)


def _step_forward(token, weights, state, norm_eps, tiling):
    return _step(token, weights, state, norm_eps, tiling), (token, weights, state)


def _step_backward(norm_eps, tiling, saved, cotangents):
    del tiling
    return jax.vjp(functools.partial(_reference_step, norm_eps=norm_eps), *saved)[1](cotangents)


_step.defvjp(_step_forward, _step_backward)


def _call(
    token: Sequence, weights: Weights, state: Mamba3State, norm_eps: float, tiling: Tiling
) -> tuple[jax.Array, Mamba3State]:
    batch, heads, p = token.x.shape
    rank, groups, n = token.b.shape[1:]
    s = token.omega.shape[-1]
    inputs = [
        token.x, token.z, token.dt, token.a, token.lam, token.omega, token.b, token.c,
        *weights[:6], weights.norm_weight, *state,
    ]  # fmt: skip
    # A parameter that is not there is never read, but needs an address.
    inputs = [token.x if v is None or v.size == 0 else v for v in inputs]
    out = [
        jax.ShapeDtypeStruct(token.x.shape, token.x.dtype),
        jax.ShapeDtypeStruct((batch, heads, max(s, 1)), jnp.float32),
        jax.ShapeDtypeStruct(state.ssm.shape, state.ssm.dtype),
        jax.ShapeDtypeStruct(state.b.shape, jnp.float32),
        jax.ShapeDtypeStruct(token.x.shape, token.x.dtype),
    ]
    first = len(inputs) - len(state)
    aliases = {
        first + i: 1 + i for i, v in enumerate(state) if v.shape == out[1 + i].shape and v.dtype == out[1 + i].dtype
    }
    y, angle, ssm, b, x = launch(
        step_kernel, inputs, {"norm_eps": np.float32(norm_eps)}, out, (heads, batch, 1), tiling.warps,
        {
            "H": heads, "G": groups, "R": rank, "P": p, "N": n, "S": s, "PP": triton.next_power_of_2(p),
            "NP": triton.next_power_of_2(n), "RP": triton.next_power_of_2(rank), "W": tiling.columns,
            "OMEGA_HEADS": token.omega.ndim == 3, "HAS_B_BIAS": weights.b_bias is not None,
            "HAS_C_BIAS": weights.c_bias is not None, "HAS_MIMO_X": weights.mimo_x is not None,
            "HAS_MIMO_Z": weights.mimo_z is not None, "HAS_MIMO_O": weights.mimo_o is not None,
            "HAS_D": weights.d is not None, "HAS_Z": token.z is not None, "HAS_NORM": weights.norm_weight is not None,
            "DOTS": tiling.dots, "FAST": token.x.dtype != jnp.float32,
        },
        aliases,
    )  # fmt: skip
    return y, Mamba3State(angle if s else state.angle, ssm, b, x)
