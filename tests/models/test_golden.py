"""The whole model against numbers computed with the authors' own code (tests/reference/README.md)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.interop import mamba_ssm
from m3jax.interop.released_tensors import parameters, rotary_order
from m3jax.models.language_model import LanguageModel
from m3jax.training.loss import linear_cross_entropy
from tests import tolerances

_FILES = Path(__file__).parents[1] / "reference"


@pytest.fixture(params=["A_siso", "B_mimo"])
def golden(request):
    return _FILES / request.param, dict(np.load(_FILES / request.param / "io.npz"))


def _load(path: Path, dtype: str):
    config, params = mamba_ssm.load(path)
    config = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype, state_dtype=dtype)
    return config, LanguageModel(config), jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def _terms(config) -> int:
    # The longest sums on the way to a logit: the embedding, two projections and the state of each layer.
    return config.n_layers * (2 * config.d_model + config.d_inner + config.mimo_rank * config.d_state)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_logits_loss_and_gradients(golden, dtype, x64):
    path, arrays = golden
    config, model, params = _load(path, dtype)
    tokens = jnp.asarray(arrays["input_ids"])

    def loss(params):
        hidden = model.apply({"params": params}, tokens, method="hidden")
        weights = jnp.ones(tokens.shape, dtype).at[:, -1].set(0)
        total = linear_cross_entropy(hidden, params["embedding"], jnp.roll(tokens, -1, 1), weights, chunk=32)
        return total / weights.sum(), model.apply({"params": params}, hidden, method="logits")

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tolerance = tolerances.golden(dtype, _terms(config))
    tolerances.assert_close(logits, arrays["logits"], tolerance, "logits")
    tolerances.assert_close(value, arrays["loss"], tolerance, "loss")
    released = {name.removeprefix("grad/"): v for name, v in arrays.items() if name.startswith("grad/")}
    expected = parameters(released, config)
    jax.tree.map_with_path(
        lambda where, g, e: tolerances.assert_close(g, e, tolerance, jax.tree_util.keystr(where)), gradients, expected
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_decode_states_and_greedy_tokens(golden, dtype, x64):
    path, arrays = golden
    config, model, params = _load(path, dtype)
    tokens = jnp.asarray(arrays["input_ids"])
    tolerance = tolerances.golden(dtype, _terms(config))
    hidden, state = jax.jit(lambda p: model.apply({"params": p}, tokens, method="prefill"))(params)
    order = rotary_order(config)
    for i in range(config.n_layers):
        expected = {name: arrays[f"state/{i}/{name}"] for name in ("angle", "ssm", "k", "v")}
        phase = tolerances.GOLDEN_PHASE + tolerances.rounding(dtype, tokens.shape[1])
        tolerances.assert_phase_close(state[i].angle, expected["angle"], phase, f"angle {i}")
        tolerances.assert_close(state[i].ssm, expected["ssm"][..., order], tolerance, f"ssm {i}")
        tolerances.assert_close(jnp.swapaxes(state[i].b, 1, 2), expected["k"][..., order], tolerance, f"b {i}")
        tolerances.assert_close(state[i].x, expected["v"], tolerance, f"x {i}")

    step = jax.jit(lambda p, token, state: model.apply({"params": p}, token, state, method="step"))
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    for i in range(arrays["gen_ids"].shape[1]):
        token = jnp.argmax(logits, axis=-1)
        np.testing.assert_array_equal(token, arrays["gen_ids"][:, i])
        logits, state = step(params, token, state)
        tolerances.assert_close(logits, arrays["gen_logits"][:, i], tolerance, f"logits after {i}")
