"""Two training steps on all GPUs it sees, parameters copied or in shards: prints losses, gradients, kernels as JSON.

Run as a process of its own, with one GPU or with two: those of the suite see one each. What it is at goes to stderr.
"""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import build_config, default_config, override
from m3jax.models.language_model import LanguageModel
from m3jax.training.sharding import make_mesh, shard_batch, state_shardings
from m3jax.training.step import init_state, make_train_step

ROWS, LENGTH, VOCABULARY = 4, 160, 256
MODELS = {
    "siso": {"model.mimo_rank": 1},
    "mimo": {"model.mimo_rank": 4},
    "others": {"model.mixers": "mamba2, gated_deltanet", "model.gdn_heads": 2},
}
COMMON = {
    "model.vocab_size": VOCABULARY, "model.d_model": 256, "model.n_layers": 2, "model.d_intermediate": 256,
    "data.batch_size": ROWS, "data.sequence_length": LENGTH, "train.grad_accumulation": 1,
    "optimizer.eps": 1e-3,  # Adam divides a gradient by its size: where that is rounding noise, so is the direction
}  # fmt: skip


def make_batch() -> dict[str, np.ndarray]:
    """Random tokens in documents of 40."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    documents = np.tile(np.arange(LENGTH, dtype=np.int32) // 40 + 1, (ROWS, 1))
    weights = np.ones((ROWS, LENGTH), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": documents, "weights": weights}


def prepare(changes: dict) -> tuple:
    """The compiled step with what it begins with, and which kinds of kernels it calls."""
    config = build_config(override(default_config().to_dict(), COMMON | changes))
    mesh, model = make_mesh(config), LanguageModel(config.model)
    shardings = state_shardings(jax.eval_shape(lambda: init_state(config, model)), mesh)
    initial = jax.jit(lambda: init_state(config, model), out_shardings=shardings)
    batch, proceed = shard_batch(make_batch(), mesh), jax.device_put(True, NamedSharding(mesh, P()))
    state = jax.eval_shape(initial)
    state = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), state, shardings)
    lowered = make_train_step(config, model, mesh).lower(state, batch, proceed)
    kernels = set(re.findall(r"custom_call @(triton_kernel_call|mosaic_gpu)", lowered.as_text()))
    return initial, lowered.compile(), batch, proceed, sorted(kernels)


def train(initial, step, batch, proceed, kernels: list[str]) -> dict[str, list]:
    """Losses and norms of the gradient of two steps, and the kinds of kernels."""
    state, losses, norms = initial(), [], []
    for _ in range(2):
        state, metrics = step(state, batch, proceed)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return {"loss": losses, "grad_norm": norms, "kernels": kernels}


def main() -> None:
    """Every model, with as many copies of the parameters as devices, and with as many shards."""
    count, began = jax.device_count(), time.monotonic()
    runs = {
        f"{name}, {axis}": model | {"mesh.data": 1, "mesh.fsdp": 1} | {f"mesh.{axis}": count}
        for name, model in MODELS.items()
        for axis in ("data", "fsdp")
    }
    results = {}
    with ThreadPoolExecutor() as pool:
        for name, prepared in zip(runs, pool.map(prepare, runs.values()), strict=True):
            print(f"{time.monotonic() - began:.0f} s: {name}, compiled", file=sys.stderr, flush=True)
            results[name] = train(*prepared)
    print(f"{time.monotonic() - began:.0f} s: trained", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
