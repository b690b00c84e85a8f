"""Whole models by kernels: a row among others in a decode step, training on two GPUs."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.kernels.gpu import compute_capability
from m3jax.models.language_model import LanguageModel
from tests import tolerances
from tests.gpu.train_on_gpus import LENGTH, MODELS, ROWS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rank", [1, 4])
def test_a_row_of_a_step_is_bit_for_bit_that_row_among_others(rank):
    config = ModelConfig(vocab_size=512, d_model=256, n_layers=2, d_intermediate=512, mimo_rank=rank, dtype="bfloat16")
    model, rows = LanguageModel(config), 24
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    step = jax.jit(lambda token, state: model.apply({"params": params}, token, state, method="step"))
    token, zero = jnp.arange(rows), model.initial_state(rows, 1)
    _, state = step(token, zero)
    logits, after = step(token, state)
    others = jax.tree.map(lambda v: v.at[1:].set(3), state)
    other_logits, other_after = step(token.at[1:].add(7), others)
    assert (logits[1:] != other_logits[1:]).any()
    for v, other in zip(jax.tree.leaves((logits, after)), jax.tree.leaves((other_logits, other_after)), strict=True):
        np.testing.assert_array_equal(np.asarray(v[0], np.float32), np.asarray(other[0], np.float32))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_kernels_on_a_mesh(model):
    """Training on two GPUs, each with its rows or its pieces of them, gives what one gives, and by kernels."""
    gpus = os.environ["M3JAX_TEST_GPUS"].split(",")
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    with ThreadPoolExecutor() as pool:
        axes = ("data", "fsdp", "sequence")
        one, *two = pool.map(_train_on, (gpus[:1], *3 * [gpus[:2]]), 4 * [model], ("data", *axes))
    hopper = compute_capability() == 90
    for run, axis in zip(two, axes, strict=True):
        assert "triton_kernel_call" in run["kernels"] and ("mosaic_gpu" in run["kernels"] or not hopper)
        assert run["kernels"] == one["kernels"]
        exact = tolerances.rounding("float32", ROWS * LENGTH)
        tolerances.assert_close(run["loss"][0], one["loss"][0], exact, f"{axis}: loss")
        # The weights' gradients are rounded on each GPU before they are added.
        rounded = tolerances.narrow_rms("bfloat16", 2)
        tolerances.assert_close(run["grad_norm"], one["grad_norm"], rounded, f"{axis}: grad_norm")


def _train_on(gpus: list[str], model: str, axis: str) -> dict[str, list]:
    script = Path(__file__).with_name("train_on_gpus.py")
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    command, root = [sys.executable, script, model, axis], script.parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
