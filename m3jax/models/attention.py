"""Causal self-attention as in Llama: grouped queries, rotary positions or none, a cache of keys and values."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig, round_up
from m3jax.kernels import cached_attention_step
from m3jax.kernels.cached_attention import xla
from m3jax.kernels.documents import continues_document, number_documents
from m3jax.kernels.products import operand_dtype
from m3jax.models import document_attention
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import Normed
from m3jax.models.own_rows import on_own_rows
from m3jax.models.rotary import standard_rates

_CUDNN_DTYPES, _CUDNN_WIDTH = ("bfloat16", "float16"), 128
_QUERIES = 128  # tokens of a prompt that look at the cache at one time


class AttentionState(NamedTuple):
    """Keys and values of the tokens so far; m is how many there is room for.

    A head's tokens lie together: in another order a product with one new token first copied all of them.
    """

    keys: jax.Array  # [b, kv heads, m, d]
    values: jax.Array  # [b, kv heads, m, d]
    length: jax.Array  # [b] int32, tokens so far
    start: jax.Array  # [b] int32, of them those before the current document


class Attention(nn.Module):
    """Softmax attention; `config.attention_*`. With rope_theta = 0 it knows nothing of positions (NoPE)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        u: jax.Array | Normed,
        segment_ids: jax.Array | None = None,
        state: AttentionState | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, AttentionState | None]:
        """Arguments and results as in mixers.py. Tokens beyond the state's room are not kept."""
        m = self.config
        one_token = u.ndim == 2
        batch, length = u.shape[0], 1 if one_token else u.shape[1]
        q, k, v = Linear(m, tuple(n * m.attention_headdim for n in (m.attention_heads, *2 * (m.n_kv_heads,))),
                         name="qkv_proj")(u)  # fmt: skip
        q, k, v = (t.reshape(batch, length, -1, m.attention_headdim) for t in (q, k, v))
        if m.rope_theta:
            before = jnp.zeros(batch, jnp.int32) if state is None else state.length
            position = before[:, None] + jnp.arange(length)[None]
            q, k = (rotate(t, position, m.rope_theta) for t in (q, k))
        if state is None:
            y = on_own_rows(lambda rows, _: attend(**rows), {"q": q, "k": k, "v": v, "segment_ids": segment_ids}, {})
        elif length == 1:
            y, state = _step(state, q[:, 0], k[:, 0], v[:, 0], m.scan_implementation)
        else:
            y, state = _attend_from(state, q, k, v, segment_ids)
        (out,) = Linear(m, (m.d_model,), closing_gain(m), name="out_proj")(y.reshape(*u.shape[:-1], -1), residual)
        return out, state


def initial_state(config: ModelConfig, batch: int, capacity: int) -> AttentionState:
    """No tokens yet, and room for `capacity`."""
    cache = jnp.zeros((batch, config.n_kv_heads, capacity, config.attention_headdim), config.dtype)
    none = jnp.zeros(batch, jnp.int32)
    return AttentionState(cache, cache, none, none)


def rotate(v: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), pairs (i, d/2 + i): v [b, l, h, d], position [b, l]."""
    half = v.shape[-1] // 2
    accumulator = jnp.promote_types(v.dtype, jnp.float32)
    rate = standard_rates(half, theta).astype(accumulator)
    angle = position[:, :, None, None].astype(accumulator) * rate[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    real, imag = jnp.split(v.astype(accumulator), 2, axis=-1)
    return jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos], axis=-1).astype(v.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Every token attends to itself and those before it in its document.

    Args:
      q: [b, l, h, d].
      k: [b, l, kv heads, d], as v; kv heads divides h.
      v: values.
      segment_ids: [b, l] or None.

    Returns:
      [b, l, h, d].
    """
    if q.dtype == jnp.float64:  # jax.nn has its softmax in float32
        position = jnp.broadcast_to(jnp.arange(q.shape[1])[None], q.shape[:2])
        start = _document_starts(segment_ids, position, jnp.zeros_like(position))
        return xla.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), position, start)
    if segment_ids is not None and _fused(q, masked=True) and document_attention.can_run():
        return document_attention.attend_documents(q, k, v, segment_ids)
    mask = None
    if segment_ids is not None:
        document = number_documents(segment_ids)  # ids may come again
        mask = document[:, None, :, None] == document[:, None, None, :]
    implementation = "cudnn" if _fused(q, mask is not None) else "xla"
    operands = (t.astype(operand_dtype(t.dtype)) for t in (q, k, v))
    y = jax.nn.dot_product_attention(*operands, mask=mask, is_causal=True, implementation=implementation)
    return y.astype(q.dtype)


def _document_starts(segment_ids: jax.Array | None, position: jax.Array, first: jax.Array) -> jax.Array:
    """Where the document of each token starts, [b, l]; that of the first ones at `first`, [b, l] too."""
    if segment_ids is None:
        return first
    return jax.lax.cummax(jnp.where(continues_document(segment_ids), first, position), axis=1)


def _fused(q: jax.Array, masked: bool) -> bool:
    """Whether cuDNN takes such queries here; with a mask, odd lengths are not differentiable there."""
    length, width = q.shape[1], q.shape[-1]
    on_gpu = jax.default_backend() == "gpu"
    takes = str(q.dtype) in _CUDNN_DTYPES and width % 8 == 0 and width <= _CUDNN_WIDTH
    return on_gpu and takes and not (masked and length % 2)


def _step(
    state: AttentionState, q: jax.Array, k: jax.Array, v: jax.Array, scan_implementation: str | None
) -> tuple[jax.Array, AttentionState]:
    """Attention of one new token [b, ...] to itself and the cache, and the cache with it."""
    # What a scan is told binds attention in so far as it is told to do without kernels.
    implementation = "xla" if scan_implementation in ("reference", "xla") else None
    y, keys, values = cached_attention_step(q, k, v, *state, implementation=implementation)
    return y, state._replace(keys=keys, values=values, length=state.length + 1)


def _attend_from(
    state: AttentionState, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, AttentionState]:
    """Attention of new tokens [b, l, ...] to themselves and the cache, and the cache with them."""
    n_new = q.shape[1]
    position = state.length[:, None] + jnp.arange(n_new, dtype=jnp.int32)[None]  # [b, l]
    keys, values = xla.put(state.keys, k, position), xla.put(state.values, v, position)
    start = _document_starts(segment_ids, position, jnp.broadcast_to(state.start[:, None], position.shape))
    after = AttentionState(keys, values, state.length + n_new, start[:, -1])

    # Prompts mostly come first, and then need nothing of the cache.
    first = jnp.all(state.length == 0)
    y = jax.lax.cond(first, lambda: attend(q, k, v, segment_ids), lambda: _attend_to_cache(q, after, position, start))
    return y, after


def _attend_to_cache(q: jax.Array, cache: AttentionState, position: jax.Array, start: jax.Array) -> jax.Array:
    """Attention of tokens [b, l, h, d] to what the cache has from their documents' starts to their own positions."""
    batch, length, heads, width = q.shape
    if length <= _QUERIES:
        return xla.attend(q, cache.keys, cache.values, position, start)
    more = round_up(length, _QUERIES) - length

    def in_pieces(v: jax.Array) -> jax.Array:
        v = jnp.pad(v, ((0, 0), (0, more)) + ((0, 0),) * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(batch, -1, _QUERIES, *v.shape[2:]), 1, 0)

    def attend_some(some: tuple[jax.Array, ...]) -> jax.Array:
        q, position, start = some
        return xla.attend(q, cache.keys, cache.values, position, start)

    y = jax.lax.map(attend_some, jax.tree.map(in_pieces, (q, position, start)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, width)[:, :length]
