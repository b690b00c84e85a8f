"""One token of the recurrence as one Triton kernel: a program holds the state of one head in registers.

    φ' = φ + Δ ω mod 2π      H' = α H + β Σ_r x_prev,r ⊗ B_prev,r + γ Σ_r x_r ⊗ B_r      y_r = H' C_r + D x_r

Letters as in ../reference.py. Reading and writing H is nearly all the work; the rest must take little time, for what a
multiprocessor has in flight is what its few programs ask for. So everything is asked for before anything is waited for
or passed between threads. One thread per column turns B and C (column i < s pairs with i + s).

With one rank H is [P, C, W], column c·W + w at [:, c, w], and has one multiply-add per product. With several (DOTS) it
is in the tile of a product (step_pieces.py): the tensor cores add the outer products, of halves which together have the
accuracy of H. They also read y where it and H are bfloat16; elsewhere y is sums, in float32. PP, NP, RP are P, N, R
rounded up to powers of two, V the numbers in 16 bytes of H.

A token comes as its coefficients, or RAW: as the layer's projection, from which each program computes those of its head
(projection_pieces.py). That spares the launches of kernels which would do little else than start.

The programs that a multiprocessor has at once do not ask for enough to keep memory busy. So each calls the state of a
later one (AHEAD) into the second-level cache, where there are many.

In a decoding loop the state is carried: every output of the state takes the memory of its input where dtypes allow, or
XLA would copy all of H once more at every token. A program reads all of its head's old state before it writes any.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from ... import gpu, triton_by_xla
from ...triton_by_xla import wait_and_let_next_start
from ...triton_launch import batch_too_large, launch
from .. import reference
from ..coefficients import ProjectionWeights, Rule, checked_groups, from_projection
from ..inputs import Sequence, Weights
from ..state import Mamba3State
from .projection_pieces import angular_rate, head_coefficients, token_pointers
from .step_pieces import (
    call_into_cache,
    cos_sin,
    exp,
    load_wide,
    outer_operands,
    places,
    read_by_sums,
    read_out,
    readout_operand,
    ready,
    ready_ranks,
    request,
    request_ranks,
    request_readout,
    tile,
    untile,
    untile_rows,
    wrap,
)

_MAX_RANK = 8  # of what the sum over ranks is written for
_MAX_HEADDIM, _MAX_D_STATE = 128, 256  # a head's state is in the registers of 16 warps
_MAX_WARPS = 16
_AHEAD = 4 * 2**20  # bytes of state between a program and the one whose state it calls into the cache
_LEAST_AHEAD = 16 * _AHEAD  # bytes of all states: with half as many nothing is gained
_CALLING_CAPABILITY = 90  # the first that can
_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)


class Tiling(NamedTuple):
    """How a head's state is laid over threads."""

    columns: int  # W
    warps: int
    dots: bool  # tensor cores instead of one multiply-add per product


@triton.jit
def step_kernel(
    z_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr, dt_bias_ptr, b_norm_ptr, c_norm_ptr,
    b_bias_ptr, c_bias_ptr, mimo_x_ptr, mimo_z_ptr, mimo_o_ptr, d_ptr, norm_ptr,
    angle_ptr, ssm_ptr, b_prev_ptr, x_prev_ptr, norm_eps, a_floor, fixed_lambda,
    y_ptr, angle_out_ptr, ssm_out_ptr, b_out_ptr, x_out_ptr,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    PP: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, V: tl.constexpr, OMEGA_HEADS: tl.constexpr,
    HAS_B_BIAS: tl.constexpr, HAS_C_BIAS: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_LAM: tl.constexpr, HEAVY_TAIL: tl.constexpr, RAW: tl.constexpr, DOTS: tl.constexpr, FAST: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One head of one batch row."""
    if EARLY:
        wait_and_let_next_start()
    C: tl.constexpr = NP // W
    NARROW: tl.constexpr = FAST and (ssm_ptr.dtype.element_ty == tl.bfloat16)
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row_head = batch * H + head
    if AHEAD > 0:
        later = row_head + AHEAD
        call_into_cache(ssm_ptr + later.to(tl.int64) * (P * N), later < tl.num_programs(1) * H, P * N)
    z_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr = token_pointers(
        z_ptr, x_ptr, b_ptr, c_ptr, dt_ptr, a_ptr, lam_ptr, omega_ptr, batch, head, H, G, R, P, N, S, OMEGA_HEADS,
        HAS_LAM, RAW,
    )  # fmt: skip
    dtype: tl.constexpr = z_ptr.dtype.element_ty

    dt = tl.load(dt_ptr + head).to(tl.float32)
    a = tl.load(a_ptr + head).to(tl.float32)
    lam = fixed_lambda
    if HAS_LAM:
        lam = tl.load(lam_ptr + head).to(tl.float32)
    dt_bias = load_wide(dt_bias_ptr, head, True, RAW, 0.0)

    # What belongs to a column of H: [NP], or [RP, NP].
    column = tl.arange(0, NP)
    in_n = column < N
    turns = column < 2 * S
    imaginary = column >= S
    partner = tl.where(imaginary, column - S, column + S)
    if S > 0:
        pair = tl.where(imaginary, column - S, column)
        omega = tl.load(omega_ptr + pair, mask=turns, other=0.0).to(tl.float32)
        angle = tl.load(angle_ptr + row_head * S + pair, mask=turns, other=0.0)
    token_at = (head // (H // G)) * N
    bias_at = head * (R * N)
    own_base = row_head.to(tl.int64) * (R * N)
    ranks = tl.arange(0, RP)[:, None]
    tokens_at, biases_at, own_at = token_at + ranks * (G * N), bias_at + ranks * N, ranks * N + column[None, :]
    columns, partners = column[None, :], partner[None, :]
    exist, rotate = (ranks < R) & in_n[None, :], (ranks < R) & turns[None, :]
    if DOTS:
        b = request(b_ptr, b_norm_ptr, b_bias_ptr, tokens_at, biases_at, columns, partners, exist, rotate, HAS_B_BIAS,
                    RAW, S)  # fmt: skip
        before = tl.load(b_prev_ptr + own_base + own_at, mask=exist, other=0.0).to(tl.float32)
    else:
        bs = request_ranks(b_ptr, b_norm_ptr, b_bias_ptr, token_at, bias_at, column, partner, in_n, turns, HAS_B_BIAS,
                           RAW, G, R, N, S)  # fmt: skip
        befores = ()
        for r in tl.static_range(R):
            befores += (tl.load(b_prev_ptr + own_base + r * N + column, mask=in_n, other=0.0).to(tl.float32),)
    if DOTS and NARROW:
        c = request(c_ptr, c_norm_ptr, c_bias_ptr, tokens_at, biases_at, columns, partners, exist, rotate, HAS_C_BIAS,
                    RAW, S)  # fmt: skip
    else:
        cs = request_ranks(c_ptr, c_norm_ptr, c_bias_ptr, token_at, bias_at, column, partner, in_n, turns, HAS_C_BIAS,
                           RAW, G, R, N, S)  # fmt: skip

    # What belongs to a row of H, [PP, RP]: the same for every rank where ranks share it.
    p = tl.arange(0, PP)[:, None]
    rank = tl.arange(0, RP)[None, :]
    in_rank = (p < P) & (rank < R)
    x_at = row_head * P + p + 0 * rank
    token_at = head * P + p + 0 * rank
    rank_at = (head * R + rank) * P + p
    x_token = tl.load(x_ptr + token_at, mask=in_rank, other=0.0)
    x_prev = tl.load(x_prev_ptr + x_at, mask=in_rank, other=0.0).to(tl.float32)
    x = x_token.to(tl.float32)
    if HAS_MIMO_X:
        mimo_x = tl.load(mimo_x_ptr + rank_at, mask=in_rank, other=0.0).to(tl.float32)
        x, x_prev = x * mimo_x, x_prev * mimo_x
    gate, mimo_o, norm, d = request_readout(
        z_ptr, mimo_z_ptr, mimo_o_ptr, norm_ptr, d_ptr, head, p, token_at, rank_at, in_rank, P, HAS_Z, HAS_MIMO_Z,
        HAS_MIMO_O, HAS_NORM, HAS_D,
    )  # fmt: skip

    row, wide = places(PP, C, W, DOTS)
    state_base = row_head.to(tl.int64) * (P * N)
    state_at = row * N + wide
    in_state = (row < P) & (wide < N)
    h = tl.load(ssm_ptr + state_base + state_at, mask=in_state, other=0.0)
    tl.debug_barrier()  # other threads may have yet to read what the stores below overwrite

    if DOTS:
        b, b_partner = ready(b, norm_eps, 1, N, dtype, RAW)
    else:
        bs = ready_ranks(bs, norm_eps, N, dtype, RAW, R)
    if DOTS and NARROW:
        c, c_partner = ready(c, norm_eps, 1, N, dtype, RAW)
    else:
        cs = ready_ranks(cs, norm_eps, N, dtype, RAW, R)
    if RAW:  # noqa: SIM102 (the compiler knows this; for the other see `ready`)
        if norm_eps >= 0.0:
            dt, a, lam = head_coefficients(dt + dt_bias, a, lam, a_floor, HAS_LAM, HEAVY_TAIL)
            if S > 0:
                omega = angular_rate(omega)
    alpha = exp(dt * a)
    x_prev *= (1 - lam) * dt * alpha
    x_now = x * (lam * dt)
    cos = 1.0
    sin = 0.0
    if S > 0:
        angle = wrap(angle + dt * omega)
        cos, sin = cos_sin(angle)
        sin = tl.where(imaginary, sin, -sin)
    if S > 0:
        tl.store(angle_out_ptr + row_head * S + column, angle, mask=column < S)
    tl.store(x_out_ptr + x_at, x_token, mask=in_rank & (rank == 0))
    if DOTS:
        if S > 0:
            b = b * cos[None, :] + b_partner * sin[None, :]
        tl.store(b_out_ptr + own_base + own_at, b, mask=exist)
        left, right = outer_operands(x_prev, x_now, before, b, PP, NP, RP, W, V, NARROW)
        if NARROW:
            if S > 0:
                c = c * cos[None, :] + c_partner * sin[None, :]
            c = readout_operand(c, NP, RP, W, V)
        h = tl.dot(left, right, tile(h, PP, NP, W, V).to(tl.float32) * alpha)
    else:
        h = h.to(tl.float32) * alpha
        for r in tl.static_range(R):
            b = bs[r][0] * cos + bs[r][1] * sin
            tl.store(b_out_ptr + own_base + r * N + column, b, mask=in_n)
            from_before = tl.sum(tl.where(rank == r, x_prev, 0.0), 1)
            from_now = tl.sum(tl.where(rank == r, x_now, 0.0), 1)
            h += from_before[:, None, None] * tl.reshape(befores[r], (1, C, W))
            h += from_now[:, None, None] * tl.reshape(b, (1, C, W))
    if DOTS and NARROW:
        # From H as it is stored: rounded, an accumulator is an operand without moving between threads.
        y = tl.sum(tl.reshape(tl.dot(h.to(tl.bfloat16), c), (PP, RP, 16 // RP)), 2)
    else:
        y = read_by_sums(h, cs, cos, sin, R, RP, PP, NP, W, V, DOTS)
    if DOTS:
        y = untile_rows(y, PP, RP)
        h = untile(h, PP, NP, W, V)
    tl.store(ssm_out_ptr + state_base + state_at, h.to(ssm_out_ptr.dtype.element_ty), mask=in_state)

    y = read_out(y, x, gate, mimo_o, norm, d, norm_eps, in_rank, P, HAS_Z, HAS_MIMO_O, HAS_NORM, HAS_D, FAST)
    p = tl.arange(0, PP)
    tl.store(y_ptr + row_head * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def default_tiling(rank: int, headdim: int, d_state: int, ssm_dtype: jnp.dtype) -> Tiling:
    """The tiling that is fastest for a shape, as far as measured (experiments/latency/step.py)."""
    itemsize = jnp.dtype(ssm_dtype).itemsize
    dots = rank > 1 and min(headdim, d_state) >= 16
    # 64 elements of H a thread; rows of 128 bytes side by side, a whole line of memory, or what a product's tile holds.
    warps = min(max(triton.next_power_of_2(headdim) * triton.next_power_of_2(d_state) // 2048, 1), _MAX_WARPS)
    columns = min(triton.next_power_of_2(d_state), (64 if dots else 128) // itemsize)
    return Tiling(columns, warps, dots)


def heads_ahead(ssm: jax.ShapeDtypeStruct) -> int:
    """Each program calls the state of the one so many after it into the cache, of states [b, h, p, n]; 0: none does."""
    head_bytes = math.prod(ssm.shape[2:]) * ssm.dtype.itemsize
    aligned = head_bytes % 16 == 0  # as the instruction wants it
    if gpu.compute_capability() < _CALLING_CAPABILITY or not aligned or ssm.size * ssm.dtype.itemsize < _LEAST_AHEAD:
        return 0
    return _AHEAD // head_bytes


def unsupported(token: Sequence, state: Mamba3State) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    rank, p, n = token.b.shape[1], token.x.shape[-1], token.b.shape[-1]
    arrays = {name: getattr(token, name) for name in "xbcz"}
    arrays |= {f"state.{name}": getattr(state, name) for name in ("ssm", "b", "x")}
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
      y [b, h, p] in x's dtype and the next state, whose `ssm` and `b` keep their dtypes. The state is updated in place
      in a loop that carries it and where a jitted caller donates it; elsewhere XLA copies it first.
    """
    token = token._replace(**{name: getattr(token, name).astype(jnp.float32) for name in ("dt", "a", "lam", "omega")})
    return _run(token, (weights, None), state, _How(norm_eps, None), tiling)


@functools.partial(jax.jit, static_argnames=("rule", "norm_eps", "tiling"))
def projected_step(
    projected: jax.Array,
    own: ProjectionWeights,
    rule: Rule,
    weights: Weights,
    state: Mamba3State,
    norm_eps: float,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, Mamba3State]:
    """As `step`, of the token whose projection [b, width] is given; `unsupported` of its coefficients must allow it."""
    return _run(projected, (weights, own), state, _How(norm_eps, rule), tiling)


class _How(NamedTuple):
    """What a step depends on besides arrays."""

    norm_eps: float
    rule: Rule | None  # of a projection


_Token = Sequence | jax.Array  # coefficients, or a projection
_AllWeights = tuple[Weights, ProjectionWeights | None]


def _run(
    token: _Token, weights: _AllWeights, state: Mamba3State, how: _How, tiling: Tiling | None
) -> tuple[jax.Array, Mamba3State]:
    state = state._replace(angle=state.angle.astype(jnp.float32))
    if tiling is None:
        tiling = default_tiling(state.b.shape[2], *state.ssm.shape[2:], state.ssm.dtype)
    return _step(token, weights, state, how, tiling)


def _reference_step(
    token: _Token, weights: _AllWeights, state: Mamba3State, how: _How
) -> tuple[jax.Array, Mamba3State]:
    if how.rule is not None:
        token = from_projection(token, weights[1], how.rule, state, how.norm_eps)
    y, new = reference.step(token, weights[0], state, how.norm_eps)
    return y, new.stored_in(state.ssm.dtype, state.b.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _step(token, weights, state, how, tiling):
    # Inside the custom derivative, since a custom batching rule has none.
    run = jax.custom_batching.custom_vmap(functools.partial(_call, how=how, tiling=tiling))

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


def _step_forward(token, weights, state, how, tiling):
    return _step(token, weights, state, how, tiling), (token, weights, state)


def _step_backward(how, tiling, saved, cotangents):
    del tiling
    return jax.vjp(functools.partial(_reference_step, how=how), *saved)[1](cotangents)


_step.defvjp(_step_forward, _step_backward)


def _call(
    token: _Token, weights: _AllWeights, state: Mamba3State, how: _How, tiling: Tiling
) -> tuple[jax.Array, Mamba3State]:
    batch, heads, p, n = state.ssm.shape
    rank, s = state.b.shape[2], state.angle.shape[-1]
    weights, own = weights
    if how.rule is None:
        first, groups, rule = token.x, token.b.shape[2], Rule("heavy_tail", 0.0, None)
        arrays = [token.z, token.x, token.b, token.c, token.dt, token.a, token.lam, token.omega, None, None, None]
    else:
        first, groups, rule = token, checked_groups(token, own, how.rule, state), how.rule
        arrays = [token, *[None] * 7, *own]
    # A parameter that is not there is never read, but needs an address.
    inputs = [first if v is None or v.size == 0 else v for v in [*arrays, *weights, *state]]
    like_x = jax.ShapeDtypeStruct((batch, heads, p), first.dtype)
    out = [
        like_x,
        jax.ShapeDtypeStruct((batch, heads, max(s, 1)), jnp.float32),
        jax.ShapeDtypeStruct(state.ssm.shape, state.ssm.dtype),
        jax.ShapeDtypeStruct(state.b.shape, state.b.dtype),
        like_x,
    ]
    carried = len(inputs) - len(state)
    aliases = {
        carried + i: 1 + i for i, v in enumerate(state) if v.shape == out[1 + i].shape and v.dtype == out[1 + i].dtype
    }
    # A product's inner axis has at least 16 numbers, those of two ranks.
    padded_rank = max(triton.next_power_of_2(rank), 2 if tiling.dots else 1)
    scalars = {"norm_eps": how.norm_eps, "a_floor": rule.a_floor, "fixed_lambda": rule.fixed_lambda or 0.0}
    y, angle, ssm, b, x = launch(
        step_kernel, inputs, {name: np.float32(v) for name, v in scalars.items()}, out, (heads, batch, 1), tiling.warps,
        {
            "H": heads, "G": groups, "R": rank, "P": p, "N": n, "S": s, "PP": triton.next_power_of_2(p),
            "NP": triton.next_power_of_2(n), "RP": padded_rank, "W": tiling.columns,
            "V": 16 // state.ssm.dtype.itemsize, "OMEGA_HEADS": how.rule is None and token.omega.ndim == 3,
            "HAS_B_BIAS": weights.b_bias is not None,
            "HAS_C_BIAS": weights.c_bias is not None, "HAS_MIMO_X": weights.mimo_x is not None,
            "HAS_MIMO_Z": weights.mimo_z is not None, "HAS_MIMO_O": weights.mimo_o is not None,
            "HAS_D": weights.d is not None, "HAS_Z": how.rule is not None or token.z is not None,
            "HAS_NORM": weights.norm_weight is not None, "HAS_LAM": rule.fixed_lambda is None,
            "HEAVY_TAIL": rule.a_activation == "heavy_tail", "RAW": how.rule is not None,
            "DOTS": tiling.dots, "FAST": first.dtype != jnp.float32,
            "EARLY": batch == 1 and triton_by_xla.available(),  # of many rows a kernel with its scalars is faster
            "AHEAD": heads_ahead(state.ssm),
        },
        aliases,
    )  # fmt: skip
    return y, Mamba3State(angle if s else state.angle, ssm, b, x)
