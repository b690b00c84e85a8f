"""Attention against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.models import attention
from m3jax.models.attention import Attention, rotate
from tests import tolerances

CONFIG = ModelConfig(
    d_model=24, dtype="float64", param_dtype="float64", attention_heads=6, attention_kv_heads=2, attention_headdim=8
)


def naive(params: dict, u: np.ndarray, documents: np.ndarray, theta: float) -> np.ndarray:
    """One query after another; positions turn complex numbers."""
    heads, kv_heads, d = CONFIG.attention_heads, CONFIG.n_kv_heads, CONFIG.attention_headdim
    q, k, v = np.split(u @ params["qkv_proj"]["kernel"], [heads * d, (heads + kv_heads) * d], axis=-1)
    q, k, v = (t.reshape(*t.shape[:2], -1, d) for t in (q, k, v))
    if theta:
        turn = np.exp(1j * np.arange(u.shape[1])[:, None] * theta ** (-np.arange(d // 2) / (d // 2)))
        q, k = ((t[..., : d // 2] + 1j * t[..., d // 2 :]) * turn[:, None] for t in (q, k))
    out = np.zeros((*u.shape[:2], heads, d))
    for b, t, h in np.ndindex(*out.shape[:3]):
        seen = [j for j in range(t + 1) if documents[b, j] == documents[b, t]]
        group = h // (heads // kv_heads)
        scores = (q[b, t, h] * k[b, seen, group].conj()).real.sum(axis=-1) / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, group]
    return out.reshape(*u.shape[:2], -1) @ params["out_proj"]["kernel"]


@pytest.mark.parametrize("theta", [0.0, 100.0])
def test_equals_a_loop_over_tokens(x64, theta):
    rng = np.random.default_rng(0)
    u, documents = rng.normal(size=(2, 13, 24)), np.sort(rng.integers(0, 3, size=(2, 13)), axis=1)
    module = Attention(ModelConfig(**{**CONFIG.__dict__, "rope_theta": theta}))
    params = module.init(jax.random.key(0), u)["params"]
    y, state = module.apply({"params": params}, u, documents)
    assert state is None
    expected = naive(jax.tree.map(np.asarray, params), u, documents, theta)
    tolerances.assert_close(y, expected, tolerances.rounding("float64", 13), "y")


def test_a_long_piece_after_others_equals_the_whole(x64, monkeypatch):
    """Its tokens look at the cache a few at a time, the last of them fewer."""
    monkeypatch.setattr(attention, "_QUERIES", 4)
    u, documents = (
        np.random.default_rng(2).normal(size=(2, 13, 24)),
        np.repeat([[1, 1, 1, 2], [3, 3, 4, 4]], [3, 2, 4, 4], axis=1),
    )
    module = Attention(CONFIG)
    params = module.init(jax.random.key(0), u)
    whole, _ = module.apply(params, u, documents)
    first, state = module.apply(params, u[:, :3], documents[:, :3], attention.initial_state(CONFIG, 2, 15))
    rest, _ = module.apply(params, u[:, 3:], documents[:, 3:], state)
    tolerances.assert_close(first, whole[:, :3], tolerances.rounding("float64", 13), "first")
    tolerances.assert_close(rest, whole[:, 3:], tolerances.rounding("float64", 13), "rest")


def test_rotation_depends_on_distances_alone(x64):
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(v) for v in rng.normal(size=(2, 1, 1, 1, 16)))

    def score(i, j):
        return float(jnp.sum(rotate(q, jnp.full((1, 1), i), 1e4) * rotate(k, jnp.full((1, 1), j), 1e4)))

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=tolerances.rounding("float64", 16) * 1e3)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
