"""Attention of one token to a cache in Triton: what is filled is read once, and the token put into the cache.

    y = Σ 2^(s_j - t) v_j,   s_j = log2(e) q·k_j / √d,   t = log2 Σ 2^s_j,   over the slots j from the document's start

A program takes one key and value head of one batch row with all query heads of its group, which are the rows of its
products, and a part of the slots (flash decoding, https://pytorch.org/blog/flash-decoding/). How many slots there are
is read at run time and what there is is shared out evenly, so that programs finish together however full a cache is;
where that is less than a block for each, the last parts have nothing. The first has the new token besides, taken from
its own k and v, so that no program reads what another writes. Several parts' y and t are put together by a second
kernel, in which a part weighs 2^t.

In a decoding loop the cache is carried: only the token's slot of it is written, in place.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from ..products import rounds_float32
from ..triton_launch import launch
from . import xla

_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)
_LEAST_WIDTH, _MOST_WIDTH = 16, 256
_LEAST_ROWS = 16  # of a product
_MOST_QUERY_BYTES = 32 * 1024  # of a group, which a program has in shared memory beside the blocks on their way
_BLOCK_BYTES, _LEAST_BLOCK, _MOST_BLOCK = 4096, 16, 128  # of keys in one turn of the loop; slots
_WARPS, _STAGES = 1, 3
_PROGRAMS, _LEAST_SLOTS, _MOST_PARTS = 1024, 256, 64  # in all; of the room in a part; of a head, put together at once


class Tiling(NamedTuple):
    """How a cache is laid over programs and threads."""

    parts: int  # that a head's slots are shared out into
    block: int  # slots that a program reads at one time
    warps: int
    stages: int  # of the loop over blocks, of which all but one are on their way


def default_tiling(rows: int, room: int, width: int, itemsize: int) -> Tiling:
    """The tiling for so many rows times key and value heads (experiments/latency/cached_attention_step.py)."""
    parts = min(triton.cdiv(_PROGRAMS, rows), room // _LEAST_SLOTS, _MOST_PARTS)
    block = min(max(_BLOCK_BYTES // (width * itemsize), _LEAST_BLOCK), _MOST_BLOCK)
    return Tiling(max(parts, 1), block, _WARPS, _STAGES)


def unsupported(q: jax.Array, keys: jax.Array, values: jax.Array) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    for name, v in {"q": q, "keys": keys, "values": values}.items():
        if v.dtype not in _NARROW or v.dtype != q.dtype:
            return f"{name} has dtype {v.dtype}; the Triton step takes one of float32, bfloat16 and float16 for all"
    width = q.shape[-1]
    if width & (width - 1) or not _LEAST_WIDTH <= width <= _MOST_WIDTH:
        return f"heads are {width} wide; the Triton step takes powers of two from {_LEAST_WIDTH} to {_MOST_WIDTH}"
    queries = _padded(q.shape[1] // keys.shape[1]) * width * q.dtype.itemsize
    if queries > _MOST_QUERY_BYTES:
        return f"the queries of a key head take {queries} bytes; the Triton step {_MOST_QUERY_BYTES}"
    return None


def _padded(group: int) -> int:
    return max(triton.next_power_of_2(group), _LEAST_ROWS)


@functools.partial(jax.jit, static_argnames="tiling")
def step(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array, start: jax.Array,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `api.cached_attention_step`, on a GPU, of what `unsupported` allows; derivatives are those of XLA's step.

    The caches are updated in place in a loop that carries them and where a jitted caller donates them; elsewhere XLA
    copies them first. `tiling`: None = `default_tiling`.
    """
    if tiling is None:
        tiling = default_tiling(math.prod(keys.shape[:2]), *keys.shape[2:], keys.dtype.itemsize)
    return _step(q, k, v, keys, values, length.astype(jnp.int32), start.astype(jnp.int32), tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _step(q, k, v, keys, values, length, start, tiling):
    batch, kv, room, width = keys.shape
    heads, group = q.shape[1], q.shape[1] // kv
    parts = tiling.parts
    shares = {"room": room, "parts": parts}
    sizes = {"G": group, "KV": kv, "D": width, "BLOCK": tiling.block}
    k, v = k.astype(keys.dtype), v.astype(values.dtype)
    y, weight, keys, values = launch(
        _attend, [q, k, v, keys, values, length, start],
        shares | {"scale": np.float32(math.log2(math.e) / math.sqrt(width))},
        [jax.ShapeDtypeStruct((batch, kv, parts, group, width), q.dtype if parts == 1 else jnp.float32),
         jax.ShapeDtypeStruct((batch, kv, parts, group), jnp.float32),
         *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (keys, values))],
        (batch * kv, parts, 1), tiling.warps,
        sizes | {"GP": _padded(group), "STAGES": tiling.stages,
                 "PRECISION": "tf32" if rounds_float32() else "tf32x3"},
        aliases={3: 2, 4: 3}, batch_axis=0,
    )  # fmt: skip
    if parts > 1:
        (y,) = launch(
            _put_together, [y, weight, length, start], shares, [jax.ShapeDtypeStruct(q.shape, q.dtype)],
            (batch * heads, 1, 1), max(width // 64, 1), sizes | {"PP": triton.next_power_of_2(parts)}, batch_axis=0,
        )  # fmt: skip
    return y.reshape(q.shape), keys, values


def _step_forward(q, k, v, keys, values, length, start, tiling):
    return _step(q, k, v, keys, values, length, start, tiling), (q, k, v, keys, values, length, start)


def _step_backward(tiling: Tiling, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]):
    del tiling
    *floats, length, start = saved
    return *jax.vjp(lambda *floats: xla.step(*floats, length, start), *floats)[1](cotangents), None, None


_step.defvjp(_step_forward, _step_backward)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, start_ptr, room, parts, scale, y_ptr, weight_ptr,
    keys_out_ptr, values_out_ptr, G: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    GP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one of KV heads of one batch row, for the G query heads, padded to GP, that share it."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    length = tl.load(length_ptr + head // KV)
    first, last = _slots_of(part, length, tl.load(start_ptr + head // KV), room, parts, BLOCK)
    if (part > 0) & (first >= last):
        return
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    column = tl.arange(0, D)
    member = tl.arange(0, GP)
    in_group = member < G
    q_at = q_ptr + head * (G * D) + member[:, None] * D + column[None, :]
    q = tl.load(q_at, mask=in_group[:, None], other=0.0)
    k = tl.load(k_ptr + head * D + column)
    v = tl.load(v_ptr + head * D + column)

    is_new = (part == 0) & (length < room)
    cache_at = head * room * D
    new_at = cache_at + length.to(tl.int64) * D + column
    tl.store(keys_out_ptr + new_at, k, mask=is_new & (column < D))
    tl.store(values_out_ptr + new_at, v, mask=is_new & (column < D))
    most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    most = tl.where(is_new, most, float("-inf"))
    total = tl.where(is_new, tl.full((GP,), 1.0, tl.float32), 0.0)
    y = tl.where(is_new, tl.zeros((GP, D), tl.float32) + v.to(tl.float32)[None, :], 0.0)
    for block in tl.range(first, last, BLOCK, num_stages=STAGES):
        slot = block + tl.arange(0, BLOCK)
        there = slot < last
        block_at = slot[:, None] * D + column[None, :]
        keys = tl.load(keys_ptr + cache_at + block_at, mask=there[:, None], other=0.0)
        values = tl.load(values_ptr + cache_at + block_at, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        shares = tl.exp2(scores - highest[:, None])
        kept = tl.exp2(most - highest)
        total = total * kept + tl.sum(shares, 1)
        y = tl.dot(shares.to(dtype), values, y * kept[:, None], input_precision=PRECISION)
        most = highest
    out = (head * parts + part) * G + member
    tl.store(weight_ptr + out, most + tl.log2(total), mask=in_group)
    y = (y / total[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + out[:, None] * D + column[None, :], y, mask=in_group[:, None])


@triton.jit
def _put_together(
    part_y_ptr, weight_ptr, length_ptr, start_ptr, room, parts, y_ptr, G: tl.constexpr, KV: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """All parts of one query head of one batch row."""
    query = tl.program_id(0)
    head = query // G
    part = tl.arange(0, PP)
    length = tl.load(length_ptr + head // KV)
    first, last = _slots_of(part, length, tl.load(start_ptr + head // KV), room, parts, BLOCK)
    there = (part == 0) | ((part < parts) & (first < last))
    at = (head.to(tl.int64) * parts + part) * G + query % G
    column = tl.arange(0, D)
    weight = tl.load(weight_ptr + at, mask=there, other=float("-inf"))
    part_y = tl.load(part_y_ptr + at[:, None] * D + column[None, :], mask=there[:, None], other=0.0)
    weight = tl.exp2(weight - tl.max(weight, 0))
    y = tl.sum(weight[:, None] * part_y, 0) / tl.sum(weight, 0)
    tl.store(y_ptr + query.to(tl.int64) * D + column, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _slots_of(part, length, start, room, parts, BLOCK: tl.constexpr):
    """The first slot of a part, or of several, and the one after its last; none where that is no later."""
    end = tl.minimum(length, room)
    size = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), parts), BLOCK) * BLOCK
    first = start + part * size
    return first, tl.minimum(first + size, end)
