"""Attention of packed documents by cuDNN, whose part is played by a plain reading of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.models import attention, document_attention
from tests import tolerances

LENGTH, HEADS, KV_HEADS, WIDTH = 48, 4, 2, 8
FEW = np.stack([np.repeat([3, 1, 2], [20, 1, 27]), np.repeat([5], [48])])
MANY = np.stack([np.arange(48) // 2, np.zeros(48, int)])


def by_documents(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """As jax documents it: a row's documents begin at `offsets` and have `seqlen` tokens, -1 where there are none."""
    assert mask_type.name == "PADDING_CAUSAL" and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
    at = jnp.arange(q.shape[1])[None, :, None]
    inside = (at >= q_offsets[:, None, :-1]) & (at < (q_offsets[:, :-1] + q_seqlen)[:, None]) & (q_seqlen >= 0)[:, None]
    mask = jnp.einsum("blm,bkm->blk", *2 * [inside.astype(jnp.int32)])[:, None] > 0
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, scale=scale)


@pytest.fixture
def taken(monkeypatch):
    """Pretends to have a GPU; returns the list of ways that were traced."""
    ways, xla = [], jax.nn.dot_product_attention

    def fused(q, k, v, *, mask=None, implementation=None, **options):
        return xla(q, k, v, mask=mask, **options)

    monkeypatch.setattr(document_attention.cudnn, "dot_product_attention", by_documents)
    monkeypatch.setattr(document_attention, "can_run", lambda: ways.append("documents") or True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_CUDNN_DTYPES", ("float32",))
    return ways


@pytest.mark.parametrize("documents", [FEW, MANY], ids=["few", "many"])
def test_equals_a_mask(taken, documents):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, cotangent = (
        jax.random.normal(key, (2, LENGTH, n, WIDTH)) for key, n in zip(keys, heads, strict=True)
    )  # fmt: skip

    def gradients(attend):
        y, pullback = jax.vjp(lambda *qkv: attend(*qkv), q, k, v)
        return y, *pullback(cotangent)

    def masked(q, k, v):
        mask = documents[:, None, :, None] == documents[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask), is_causal=True)

    actual = jax.jit(lambda: gradients(lambda *qkv: attention.attend(*qkv, jnp.asarray(documents))))()
    assert taken == ["documents"]
    for name, value, expected in zip(("y", "q", "k", "v"), actual, jax.jit(lambda: gradients(masked))(), strict=True):
        tolerances.assert_close(value, expected, tolerances.rounding("float32", LENGTH), name)


def test_bounds_of_documents():
    lengths, offsets = document_attention.document_bounds(jnp.asarray([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]))
    np.testing.assert_array_equal(lengths[:, :4], [[2, 1, 2, -1], [5, -1, -1, -1]])
    np.testing.assert_array_equal(offsets[:, :4], [[0, 2, 3, -1], [0, -1, -1, -1]])


def test_odd_lengths_take_no_cudnn(taken):
    q = jnp.ones((1, 5, 2, WIDTH))
    attention.attend(q, q, q, jnp.zeros((1, 5), jnp.int32))
    assert taken == []
