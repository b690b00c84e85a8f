"""Two training steps on all GPUs it sees: prints losses, norms of the gradient and kinds of kernels as JSON.

python tests/gpu/train_on_gpus.py MODEL AXIS

MODEL is one of MODELS; AXIS data, for a copy of the parameters on each GPU, fsdp, for a share, or sequence, for pieces
of every sequence. A process of its own, as those of the suite see one GPU each.
"""

import json
import re
import sys

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
    "others": {"model.mixers": "mamba2, gated_deltanet, attention", "model.n_layers": 3, "model.gdn_heads": 2},
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


def train(changes: dict) -> dict[str, list]:
    """Losses and norms of the gradient of two steps, and which kinds of kernels the program calls."""
    config = build_config(override(default_config().to_dict(), COMMON | changes))
    mesh, model = make_mesh(config), LanguageModel(config.model)
    shardings = state_shardings(jax.eval_shape(lambda: init_state(config, model)), mesh)
    state = jax.jit(lambda: init_state(config, model), out_shardings=shardings)()
    batch, proceed = shard_batch(make_batch(), mesh), jax.device_put(True, NamedSharding(mesh, P()))
    lowered = make_train_step(config, model, mesh).lower(state, batch, proceed)
    kernels = set(re.findall(r"custom_call @(triton_kernel_call|mosaic_gpu)", lowered.as_text()))
    step, losses, norms = lowered.compile(), [], []
    for _ in range(2):
        state, metrics = step(state, batch, proceed)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return {"loss": losses, "grad_norm": norms, "kernels": sorted(kernels)}


if __name__ == "__main__":
    model, axis = sys.argv[1:]
    devices = {"mesh.data": 1, "mesh.fsdp": 1} | {f"mesh.{axis}": jax.device_count()}
    print(json.dumps(train(MODELS[model] | devices)))
