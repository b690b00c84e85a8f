"""Attention within documents, and its step over a cache, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import cached_attention_step
from m3jax.models.attention import attend
from tests import tolerances
from tests.gpu.exact import assert_close_to_float64, in_float64

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mean_length", [100, 10])
def test_attention_of_documents(mean_length):
    """Few enough documents for cuDNN to take one by one, and more."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = {"q": 4, "k": 2, "v": 2}
    args = {
        name: jax.random.normal(key, (2, 384, n, 64), jnp.bfloat16)
        for key, (name, n) in zip(keys, heads.items(), strict=True)
    }
    starts = np.random.default_rng(0).random((2, 384)) < 1 / mean_length
    documents = jnp.asarray(np.cumsum(starts, axis=1, dtype=np.int32))

    def exact(q, k, v):
        k, v = (jnp.repeat(t, 2, axis=2) for t in (k, v))
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k, precision="highest") / 8
        seen = jnp.tri(384, dtype=bool)[None] & (documents[:, :, None] == documents[:, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhlm,bmhd->blhd", weights, v, precision="highest")

    # The weights, the result, its cotangent and the gradient.
    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)
    assert_close_to_float64(functools.partial(attend, segment_ids=documents), exact, args, tolerance)


@pytest.mark.parametrize(("dtype", "kv", "group", "width", "room"), [
    ("bfloat16", 8, 4, 64, 4096), ("bfloat16", 2, 2, 256, 1000), ("float16", 1, 17, 16, 300),
    ("float32", 2, 1, 128, 700),
])  # fmt: skip
def test_cached_attention_steps_under_jit_with_donation(dtype, kv, group, width, room):
    """From nothing to beyond the room, later documents; a decoding loop puts its tokens into the cache in place."""
    length, start = jnp.asarray([0, 1, room // 2, room - 2, room + 5]), jnp.asarray([0, 0, room // 3, 0, 7])
    keys = iter(jax.random.split(jax.random.key(0), 5))
    cache = tuple(jax.random.normal(next(keys), (5, kv, room, width)).astype(dtype) for _ in range(2))
    tokens = [jax.random.normal(next(keys), (3, 5, n, width)).astype(dtype) for n in (kv * group, kv, kv)]

    def decode(implementation, cache, tokens):
        def body(carry, token):
            *cache, length = carry
            y, *cache = cached_attention_step(*token, *cache, length, start, implementation=implementation)
            return (*cache, length + 1), y

        return jax.lax.scan(body, (*cache, length), tokens)

    with jax.enable_x64(True):
        (*expected_cache, _), expected = decode("xla", *in_float64((cache, tokens)))
    (*cache, _), y = jax.jit(decode, static_argnums=0, donate_argnums=1)("triton", cache, tokens)
    for actual, exact in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float64), exact)
    tolerance = tolerances.rounding("float32", width + room)
    if dtype != "float32":  # the weights and the result
        tolerance += tolerances.narrow_rms(dtype, roundings=2)
    assert tolerances.rms_ratio(y, expected) <= tolerance
