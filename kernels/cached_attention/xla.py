"""Attention to a cache as XLA compiles it: it reads all of the cache's room, filled or not."""

import math

import jax
import jax.numpy as jnp

from ..products import operand_dtype


def put(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """The cache [b, kv heads, m, d] with new tokens [b, l, kv heads, d] at `position`, [b, l], if it has room there."""
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, :, position].set(new.astype(cache.dtype), mode="drop")


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array, start: jax.Array) -> jax.Array:
    """Attention of tokens [b, l, h, d] to what a cache has from `start` to `position`, [b, l]."""
    batch, _, heads, width = q.shape
    kv, accumulator, operand = keys.shape[1], jnp.promote_types(q.dtype, jnp.float32), operand_dtype(q.dtype)
    slot = jnp.arange(keys.shape[2])[None, None]
    visible = (slot <= position[..., None]) & (slot >= start[..., None])  # [b, l, m]
    grouped = q.reshape(batch, -1, kv, heads // kv, width).astype(operand)
    scores = jnp.einsum("blkgd,bkmd->bkglm", grouped, keys.astype(operand), preferred_element_type=accumulator)
    shares = jax.nn.softmax(jnp.where(visible[:, None, None], scores / math.sqrt(width), -jnp.inf), axis=-1)
    y = jnp.einsum(
        "bkglm,bkmd->blkgd", shares.astype(operand), values.astype(operand), preferred_element_type=accumulator
    )
    return y.reshape(q.shape).astype(q.dtype)


def step(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.cached_attention_step`."""
    position = length[:, None]
    keys, values = (put(cache, new[:, None], position) for cache, new in ((keys, k), (values, v)))
    return attend(q[:, None], keys, values, position, start[:, None])[:, 0], keys, values
