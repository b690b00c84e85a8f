"""The walk of walk.py as one Triton kernel: a program takes some rows of S through all chunks, in registers."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from ..products import rounds_float32
from ..triton_launch import launch
from .inputs import Sequence

_OPERANDS = (jnp.float32, jnp.bfloat16, jnp.float16)
_LEAST, _MOST = 16, 64  # rows of S in a program, and of any operand of a product at least
_MAX_TILE = 32 * 1024  # bytes of a chunk's W; of those, K, S and U a multiprocessor holds several
_WARPS, _STAGES = 4, 2


def unsupported(seq: Sequence, chunk: int) -> str | None:
    """Why the kernel cannot take these inputs in such chunks; None if it can."""
    if seq.v.dtype not in _OPERANDS:
        return f"v has dtype {seq.v.dtype}; the Triton kernel takes float32, bfloat16 and float16"
    tile = _padded(chunk) * _padded(seq.k.shape[-1]) * seq.v.dtype.itemsize
    if tile > _MAX_TILE:
        return f"a chunk of {chunk} keys of width {seq.k.shape[-1]} takes {tile} bytes; the Triton kernel {_MAX_TILE}"
    return None


def walk_in_triton(
    own: jax.Array, write: jax.Array, read: jax.Array, decay: jax.Array, state: jax.Array, added: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `walk.walk_in_jax`."""
    chunks, batch, heads, c, p = own.shape
    n, rows = write.shape[-1], batch * heads
    tile = min(_padded(p), _MOST)
    exact = own.dtype == jnp.float32
    nothing = jnp.zeros((1,), own.dtype)
    updates, entering, last = launch(
        _walk, [own, write, read, decay, state, nothing if added is None else added], {"rows": rows, "chunks": chunks},
        [jax.ShapeDtypeStruct(own.shape, own.dtype),
         jax.ShapeDtypeStruct((chunks, *state.shape), own.dtype),
         jax.ShapeDtypeStruct(state.shape, state.dtype)],
        (rows, triton.cdiv(p, tile), 1), _WARPS,
        {"C": c, "N": n, "P": p, "CP": _padded(c), "NP": _padded(n), "PP": tile, "HAS_ADDED": added is not None,
         "REVERSE": reverse, "PRECISION": "ieee" if exact and not rounds_float32() else "tf32",
         "STAGES": 1 if exact else _STAGES},
        batch_axis=0,
    )  # fmt: skip
    return updates, entering, last


def _padded(size: int) -> int:
    return max(_LEAST, triton.next_power_of_2(size))


@triton.jit
def _walk(
    own_ptr, write_ptr, read_ptr, decay_ptr, state_ptr, added_ptr, rows, chunks, updates_ptr, entering_ptr, last_ptr,
    C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CP: tl.constexpr, NP: tl.constexpr, PP: tl.constexpr,
    HAS_ADDED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All chunks of one head of one batch row, for PP of the P rows of S; CP, NP: C, N padded to powers of two.

    Of several runs (see `launch`) each has `rows` batch rows and heads.
    """
    row = tl.program_id(0)
    run = row // rows
    operand = own_ptr.dtype.element_ty
    c, n = tl.arange(0, CP)[:, None], tl.arange(0, NP)[None, :]
    p = tl.program_id(1) * PP + tl.arange(0, PP)
    keys_at, keys_in = c * N + n, (c < C) & (n < N)
    values_at, values_in = c * P + p[None, :], (c < C) & (p[None, :] < P)
    state_at, state_in = p[:, None] * N + n, (p[:, None] < P) & (n < N)
    state = tl.load(state_ptr + row.to(tl.int64) * P * N + state_at, mask=state_in, other=0.0)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        chunk = turn
        if REVERSE:
            chunk = chunks - 1 - turn
        at = (run * chunks + chunk).to(tl.int64) * rows + row % rows
        write = tl.load(write_ptr + at * C * N + keys_at, mask=keys_in, other=0.0)
        read = tl.load(read_ptr + at * C * N + keys_at, mask=keys_in, other=0.0)
        own = tl.load(own_ptr + at * C * P + values_at, mask=values_in, other=0.0)
        decay = tl.load(decay_ptr + at)
        entering = state.to(operand)
        tl.store(entering_ptr + at * P * N + state_at, entering, mask=state_in)
        update = own + tl.dot(write, tl.trans(entering), input_precision=PRECISION)
        update = update.to(operand)
        tl.store(updates_ptr + at * C * P + values_at, update, mask=values_in)
        state = decay * state + tl.dot(tl.trans(update), read, input_precision=PRECISION)
        if HAS_ADDED:
            state += tl.load(added_ptr + at * P * N + state_at, mask=state_in, other=0.0)
    tl.store(last_ptr + row.to(tl.int64) * P * N + state_at, state, mask=state_in)
