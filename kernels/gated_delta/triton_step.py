"""One token of the gated delta rule as one Triton kernel: a program takes some rows of one head's S, once each way.

    u = β (v - e^g S k)    S' = e^g S + u kᵀ    o = S' q

Rows of S have nothing to do with each other, so that a head's are shared out among programs. Reading and writing S is
nearly all the work; what else a program does must take little time. So everything is asked for before anything is
waited for, and where q and k are brought to length 1 here, S is not multiplied by what waits for their lengths.

A tile of PP rows comes in pieces of W columns. The threads of a row of one piece have it of all pieces, so that no sum
passes between warps. Of vectors shorter than the number of threads Triton makes every thread load what it needs; longer
ones, as q and k here, wait in shared memory to be shared out. Small programs of one warp are the fastest all the same.

In a decoding loop the state is carried: S' takes the memory of S, or XLA would copy it once more at every token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from ..triton_launch import launch
from . import step as step_in_jax
from .inputs import Sequence, of_unit_length

_MAX_KEY = 512  # columns of S, of which a thread has those of q and k besides
_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)
_ROWS, _COLUMNS, _NUMBERS_OF_A_WARP = 16, 64, 2048  # of a tile, of its pieces, and 64 numbers of S in a thread


class Tiling(NamedTuple):
    """How S is laid over programs and threads."""

    rows: int  # PP
    columns: int  # W
    warps: int


def default_tiling(p: int, n: int) -> Tiling:
    """The tiling that is fastest for a shape, as far as measured (experiments/latency/gated_delta_step.py)."""
    columns = triton.next_power_of_2(n)
    rows = min(triton.next_power_of_2(p), _ROWS)
    return Tiling(rows, min(columns, _COLUMNS), max(rows * columns // _NUMBERS_OF_A_WARP, 1))


def unsupported(token: Sequence, state: jax.Array) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    for name, v in {"q": token.q, "k": token.k, "v": token.v, "state": state}.items():
        if v.dtype not in _NARROW:
            return f"{name} has dtype {v.dtype}; the Triton step takes float32, bfloat16 and float16"
    if token.k.shape[-1] > _MAX_KEY:
        return f"keys are {token.k.shape[-1]} wide; the Triton step takes up to {_MAX_KEY}"
    return None


@functools.partial(jax.jit, static_argnames=("unit_eps", "tiling"))
def step(
    token: Sequence, state: jax.Array, unit_eps: float | None = None, tiling: Tiling | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token on a GPU, in float32; derivatives are those of the step in JAX.

    Args:
      token: as `Sequence` without the length axis, of what `unsupported` allows.
      state: S before the token, [b, h, p, n].
      unit_eps: as in `of_unit_length`.
      tiling: how the kernel is laid out; None = `default_tiling`.

    Returns:
      o [b, h, p] in v's dtype and the next S in the dtype it came in. S is updated in place in a loop that carries it
      and where a jitted caller donates it; elsewhere XLA copies it first.
    """
    return _step(token, state, unit_eps, tiling or default_tiling(*state.shape[-2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _step(token: Sequence, state: jax.Array, unit_eps: float | None, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    batch, heads, p, n = state.shape
    tiles = triton.cdiv(p, tiling.rows)
    decay, beta = jnp.exp(token.log_decay.astype(jnp.float32)), token.beta.astype(jnp.float32)
    o, state = launch(
        _delta_step, [token.q, token.k, token.v, decay, beta, state], {"unit_eps": np.float32(unit_eps or 0)},
        [jax.ShapeDtypeStruct(token.v.shape, token.v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)],
        (batch * heads * tiles, 1, 1), tiling.warps,
        {"P": p, "N": n, "TILES": tiles, "PP": tiling.rows, "C": triton.next_power_of_2(n) // tiling.columns,
         "W": tiling.columns, "UNIT": unit_eps is not None},
        aliases={5: 1}, batch_axis=0,
    )  # fmt: skip
    return o, state


def _step_forward(token: Sequence, state: jax.Array, unit_eps: float | None, tiling: Tiling):
    return _step(token, state, unit_eps, tiling), (token, state)


def _step_backward(unit_eps: float | None, tiling: Tiling, saved: tuple[Sequence, jax.Array], cotangents):
    del tiling

    def in_jax(token: Sequence, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        o, new = step_in_jax.step(of_unit_length(token, unit_eps, wide=True), state)
        return o, new.astype(state.dtype)

    return jax.vjp(in_jax, *saved)[1](cotangents)


_step.defvjp(_step_forward, _step_backward)


@triton.jit
def _delta_step(
    q_ptr, k_ptr, v_ptr, decay_ptr, beta_ptr, state_ptr, unit_eps, o_ptr, state_out_ptr,
    P: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, PP: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """PP of the P rows of one head of one batch row, of which TILES programs have all; C pieces of W columns."""
    head = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.program_id(0) % TILES * PP + tl.arange(0, PP)
    in_row = row < P
    states, ks, qs = (), (), ()
    state_at = head * P * N + row[:, None] * N
    for c in tl.static_range(C):
        column = c * W + tl.arange(0, W)
        in_n = column < N
        in_state = in_row[:, None] & in_n[None, :]
        states += (tl.load(state_ptr + state_at + column[None, :], mask=in_state, other=0.0),)
        ks += (tl.load(k_ptr + head * N + column, mask=in_n, other=0.0),)
        qs += (tl.load(q_ptr + head * N + column, mask=in_n, other=0.0),)
    v = tl.load(v_ptr + head * P + row, mask=in_row, other=0.0).to(tl.float32)
    decay = tl.load(decay_ptr + head)
    beta = tl.load(beta_ptr + head)

    # The squares are the same in every row, which costs a few sums more but no way between warps.
    known = tl.zeros((PP, W), tl.float32)
    square_k = tl.zeros((PP, W), tl.float32)
    square_q = tl.zeros((PP, W), tl.float32)
    for c in tl.static_range(C):
        k, q = ks[c].to(tl.float32)[None, :], qs[c].to(tl.float32)[None, :]
        known += states[c].to(tl.float32) * k
        square_k += k * k
        square_q += q * q
    known = decay * tl.sum(known, 1)
    if UNIT:
        of_k = tl.rsqrt(tl.sum(square_k, 1) + unit_eps)
        update = beta * (v - of_k * known) * of_k
    else:
        update = beta * (v - known)
    tl.debug_barrier()  # where a tile has fewer numbers than there are threads, others read what one of them stores
    o = tl.zeros((PP, W), tl.float32)
    for c in tl.static_range(C):
        column = c * W + tl.arange(0, W)
        in_state = in_row[:, None] & (column < N)[None, :]
        state = decay * states[c].to(tl.float32) + update[:, None] * ks[c].to(tl.float32)[None, :]
        tl.store(state_out_ptr + state_at + column[None, :], state.to(state_out_ptr.dtype.element_ty), mask=in_state)
        o += state * qs[c].to(tl.float32)[None, :]
    o = tl.sum(o, 1)
    if UNIT:
        o *= tl.rsqrt((tl.sum(square_q, 1) + unit_eps) * N)
    tl.store(o_ptr + head * P + row, o.to(o_ptr.dtype.element_ty), mask=in_row)
