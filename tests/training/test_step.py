"""One step: the loss it reports, accumulation, averaging, and what a non-finite value leaves behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.training.sharding import make_mesh
from m3jax.training.step import init_state, make_eval_step, make_train_step
from tests.tolerances import assert_close, narrow_rms, rounding
from tests.training.conftest import SmallModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH = 8, 32


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 258, (ROWS, LENGTH + 1)).astype(np.int32)
    # Rows with very different numbers of real targets: a mean of the rows' means would differ from the mean.
    real = np.arange(LENGTH)[None] < rng.integers(1, LENGTH + 1, (ROWS, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "weights": real.astype(np.float32),
    }


@functools.cache
def compiled(config):
    model = SmallModel(config.model)
    return jax.jit(lambda: init_state(config, model))(), make_train_step(config, model, make_mesh(config))


def run(config, batches, proceed=True):
    """Returns the state before and after steps on these batches, and the metrics of each."""
    before, train_step = compiled(config)
    state, metrics = jax.tree.map(jnp.copy, before), []
    for batch in batches:
        state, numbers = train_step(state, batch, jnp.asarray(proceed))
        metrics.append(jax.device_get(numbers))
    return before, state, metrics


def poisoned(batch):
    weights = batch["weights"].copy()
    weights[0, 0] = np.nan
    return batch | {"weights": weights}


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)


def test_loss_is_the_mean_over_real_targets(small_config):
    config, batch = small_config(), make_batch()
    before, after, (metrics,) = run(config, [batch])
    logits = np.asarray(SmallModel(config.model).apply({"params": before.params}, batch["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
    assert_close(metrics["loss"], expected, rounding(jnp.float32, ROWS * LENGTH), "loss")
    assert metrics["tokens"] == batch["weights"].sum()
    assert int(after.step) == 1

    sums = make_eval_step(config, SmallModel(config.model), make_mesh(config))(before.params, batch)
    assert_close(sums[0] / sums[1], expected, rounding(jnp.float32, ROWS * LENGTH), "evaluation loss")


def test_accumulation_equals_the_whole_batch(small_config):
    batches = [make_batch(seed) for seed in range(2)]
    _, whole, whole_metrics = run(small_config(), batches)
    _, split, split_metrics = run(small_config({"train.grad_accumulation": 4}), batches)
    tolerance = rounding(jnp.float32, ROWS * LENGTH)
    for a, b in zip(split_metrics, whole_metrics, strict=True):
        for name in ("loss", "grad_norm", "tokens"):
            assert_close(a[name], b[name], tolerance, name)
    jax.tree.map(
        lambda a, b: assert_close(a, b, tolerance, "first moment"), split.opt_state[1].mu, whole.opt_state[1].mu
    )


def test_padding_only_batch_changes_nothing_but_decay(small_config):
    batch = make_batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    before, after, (metrics,) = run(small_config(), [batch])
    assert metrics["finite"] and metrics["loss"] == 0
    assert_same(after.params["norm"], before.params["norm"])  # not decayed
    decay = 1 - metrics["learning_rate"] * small_config().optimizer.weight_decay
    assert_close(after.params["embedding"], decay * before.params["embedding"], rounding(jnp.float32, 2), "embedding")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_of_the_parameters(small_config, dtype):
    """In float32: of bfloat16 the small changes would be rounded away."""
    config = small_config({"train.ema_decay": 0.75, "model.param_dtype": dtype})
    before, after, _ = run(config, [make_batch()])
    old, new = (jax.tree.map(lambda v: v.astype(jnp.float32), state.params) for state in (before, after))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, old, new)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.ema)} == {jnp.dtype("float32")}
    # XLA may average parameters that it has not rounded yet.
    exact = rounding(jnp.float32, 2) if dtype == "float32" else narrow_rms(dtype, 1)
    jax.tree.map(lambda a, b: assert_close(a, b, exact, "average"), after.ema, expected)


@pytest.mark.parametrize(("policy", "counted"), [("stop", 0), ("rollback", 0), ("skip", 1)])
def test_nonfinite_step_changes_nothing(small_config, policy, counted):
    config = small_config({"train.nonfinite": policy, "train.ema_decay": 0.9})
    before, after, (metrics,) = run(config, [poisoned(make_batch())])
    assert not metrics["finite"]
    assert metrics["proceed"] == bool(counted)
    assert int(after.step) == counted
    assert_same((after.params, after.opt_state, after.ema), (before.params, before.opt_state, before.ema))


def test_step_that_may_not_proceed_changes_nothing(small_config):
    before, after, (metrics,) = run(small_config(), [make_batch()], proceed=False)
    assert metrics["finite"] and not metrics["proceed"]
    assert_same(after, before)


def test_skipped_step_does_not_delay_the_schedule(small_config):
    config = small_config({"train.nonfinite": "skip"})
    _, _, metrics = run(config, [make_batch(), poisoned(make_batch()), make_batch(1)])
    _, _, straight = run(config, [make_batch(), make_batch(), make_batch(1)])
    assert [m["learning_rate"] for m in metrics] == [m["learning_rate"] for m in straight]


def test_bfloat16_parameters_keep_float32_moments(small_config):
    config = small_config({"model.param_dtype": "bfloat16", "train.grad_accumulation": 2})
    _, after, (metrics, _) = run(config, [make_batch(), make_batch(1)])
    assert metrics["finite"]
    assert after.params["embedding"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(after.opt_state[1].mu)} == {jnp.dtype("float32")}
