"""Mamba-2 against a loop over tokens in float64, from its equations (arXiv 2405.21060); the norm follows the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.models.mamba2 import Mamba2Mixer, initial_state
from m3jax.models.norm import EPSILON
from tests import tolerances

CONFIG = ModelConfig(
    d_model=8, headdim=4, d_state=6, ngroups=2, d_conv=3, n_layers=1,
    dtype="float64", param_dtype="float64", state_dtype="float64",
)  # fmt: skip
LENGTH = 13
DOCUMENTS = np.stack([np.repeat([1, 2, 3], [5, 1, 7]), np.repeat([4, 0], [9, 4])])
TOLERANCE = tolerances.rounding("float64", CONFIG.d_state * LENGTH)  # sums run along the sequence


def _silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def naive(
    params: dict, u: np.ndarray, documents: np.ndarray, m: ModelConfig = CONFIG
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output [b, l, d], and of the last token H [b, h, p, n] and the inputs of the last convolution taps."""
    inner, heads, n, taps = m.d_inner, m.n_heads, m.d_state, m.d_conv
    group = np.arange(heads) // (heads // m.ngroups)  # of each head
    z, xbc, raw_dt = np.split(u @ params["in_proj"]["kernel"], [inner, 2 * inner + 2 * m.ngroups * n], axis=-1)
    out, states, last_taps = np.zeros_like(u), [], []
    for row in range(len(u)):
        h, window = np.zeros((heads, m.headdim, n)), np.zeros((taps, xbc.shape[-1]))
        for t in range(u.shape[1]):
            if t and documents[row, t] != documents[row, t - 1]:
                h, window = np.zeros_like(h), np.zeros_like(window)
            window = np.concatenate([window[1:], xbc[row, t][None]])
            conv = _silu((window * params["conv"]["conv_kernel"]).sum(axis=0) + params["conv"]["conv_bias"])
            x, b, c = np.split(conv, [inner, inner + m.ngroups * n])
            x, b, c = x.reshape(heads, -1), b.reshape(m.ngroups, n)[group], c.reshape(m.ngroups, n)[group]
            dt = np.log1p(np.exp(raw_dt[row, t] + params["dt_bias"]))
            h = np.exp(-dt * np.exp(params["a_log"]))[:, None, None] * h + (dt[:, None] * x)[:, :, None] * b[:, None]
            y = (h * c[:, None]).sum(axis=-1) + params["d"][:, None] * x
            gated = y.reshape(-1) * _silu(z[row, t])
            normed = gated / np.sqrt((gated**2).mean() + EPSILON) * params["norm"]["scale"]
            out[row, t] = normed @ params["out_proj"]["kernel"]
        states.append(h)
        last_taps.append(window[1:])
    return out, np.stack(states), np.stack(last_taps)


@pytest.fixture
def mixer(x64):
    """(module, parameters that all differ from each other, input)."""
    built = Mamba2Mixer(CONFIG)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(2, LENGTH, CONFIG.d_model))
    shapes = jax.eval_shape(lambda: built.init(jax.random.key(0), jnp.zeros(u.shape)))["params"]
    return built, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes), u


def test_equals_a_loop_over_tokens(mixer):
    built, params, u = mixer
    expected, ssm, taps = naive(params, u, DOCUMENTS)
    y, state = built.apply({"params": params}, u, DOCUMENTS)
    assert state is None
    tolerances.assert_close(y, expected, TOLERANCE, "y")
    y, state = built.apply({"params": params}, u, DOCUMENTS, initial_state(CONFIG, 2, 0))
    tolerances.assert_close(y, expected, TOLERANCE, "y with a state")
    tolerances.assert_close(state.scan.ssm, ssm, TOLERANCE, "state")
    tolerances.assert_close(state.conv, taps, TOLERANCE, "inputs of the convolution")


def test_steps_equal_the_loop(mixer):
    built, params, u = mixer
    expected, ssm, taps = naive(params, u, np.zeros((2, LENGTH)))
    state = initial_state(CONFIG, 2, 0)
    for t in range(LENGTH):
        y, state = built.apply({"params": params}, u[:, t], None, state)
        tolerances.assert_close(y, expected[:, t], TOLERANCE, f"token {t}")
    tolerances.assert_close(state.scan.ssm, ssm, TOLERANCE, "state")
    tolerances.assert_close(state.conv, taps, TOLERANCE, "inputs of the convolution")
