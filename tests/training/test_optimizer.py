"""Which parameters decay, and AdamW against the same formula in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import OptimizerConfig, build_config
from m3jax.models.language_model import LanguageModel
from m3jax.training.optimizer import decay_mask, make_optimizer
from m3jax.training.step import init_params
from tests.tolerances import assert_close, rounding
from tests.training.conftest import SMALL

MATRICES = {"embedding", "head", "in_proj/kernel", "out_proj/kernel", "fc1/kernel", "fc2/kernel"}
ON_REQUEST = {"b_bias", "c_bias", "mimo_x", "mimo_z", "mimo_o"}
NEVER = {"dt_bias", "d", "mixer_norm/scale", "mlp_norm/scale", "b_norm/scale", "c_norm/scale", "norm/scale"}


@pytest.mark.parametrize("on_request", [False, True])
def test_decay_mask_by_name(on_request):
    changes = {"mimo_rank": 2, "n_layers": 1, "tie_embeddings": False}
    model = {key.split(".")[1]: value for key, value in SMALL.items() if key.startswith("model.")} | changes
    config = build_config({"model": model})
    mask = decay_mask(jax.eval_shape(lambda: init_params(config, LanguageModel(config.model))), on_request)
    names = {"/".join(key.key for key in path): value for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    short = {name.removeprefix("layers/").removeprefix("mixer/").removeprefix("mlp/"): v for name, v in names.items()}
    assert set(short) == MATRICES | ON_REQUEST | NEVER
    assert {name for name, decays in short.items() if decays} == MATRICES | (ON_REQUEST if on_request else set())


def test_adamw_matches_its_formula():
    config = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)), "scale": rng.normal(size=3)}
    state = optimizer.init(jax.tree.map(jnp.float32, params))
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t in range(1, 4):
        grads = {name: 5 * rng.normal(size=p.shape) for name, p in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, jax.tree.map(jnp.float32, params))
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g / max(norm, 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            expected = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            expected = expected + (0.1 * params[name] if name == "kernel" else 0)
            assert_close(updates[name], expected, rounding(jnp.float32, 15), f"step {t} {name}")


def test_gradients_below_the_norm_are_not_clipped():
    config = dataclasses.replace(OptimizerConfig(), clip_norm=10.0, weight_decay=0.0)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.zeros(3)}
    grads = {"kernel": jnp.array([1.0, -2.0, 2.0])}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    assert_close(state[1].mu["kernel"], 0.1 * grads["kernel"], rounding(jnp.float32, 1), "first moment")
