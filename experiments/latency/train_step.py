"""Times real training steps of a config on real text: tokens per second, MFU, peak memory, compile time, time by part.

python experiments/latency/train_step.py --config configs/1b_mimo.py --batch-size 8 --json OUT [--profile]

`--batch-size` sequences make a step without accumulation. The first steps are left out; the step time is the median of
the rest, its spread their 10th and 90th percentile. `--profile` adds the device time of one step by part of the model;
it switches XLA's command buffers off, inside which kernels lose their names, so take times from a run without it.
"""

import argparse
import collections
import json
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.cli import Parser, read_config, run_main
from m3jax.data import load_tokenizer, open_train
from m3jax.models.language_model import LanguageModel
from m3jax.training.flops import device_peak_flops, flops_per_token
from m3jax.training.sharding import make_mesh, shard_batch
from m3jax.training.step import init_state, make_train_step

# Name of a part, and what the path of its operations contains; the first that fits counts.
_PARTS = {
    "scan": "jit(scan)",
    "mixer's projections": "/mixer/",
    "mlp": "/mlp/",
    "norms and residual": "layers",
    "embedding, cross-entropy, optimizer": "",
}


def measure(options: argparse.Namespace, overrides: dict) -> dict:
    """Compiles and runs the steps; returns the report."""
    overrides |= {"data.batch_size": options.batch_size, "train.grad_accumulation": 1}
    config = read_config(options.config, overrides)
    mesh, model = make_mesh(config), LanguageModel(config.model)
    data = open_train(config, load_tokenizer(config.data.tokenizer))
    state = jax.jit(lambda: init_state(config, model))()
    go = jnp.asarray(True)
    began = time.perf_counter()
    step = make_train_step(config, model, mesh).lower(state, shard_batch(next(data), mesh), go).compile()
    compile_seconds = time.perf_counter() - began

    times, losses = [], []
    for _ in range(options.warm_up + options.steps):
        batch = shard_batch(next(data), mesh)
        began = time.perf_counter()
        state, metrics = step(state, batch, go)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    if not np.isfinite(losses).all() or not losses[-1] < losses[0]:
        raise AssertionError(f"The loss does not fall: {losses}; its steps are not worth timing.")
    low, median, high = np.percentile(times[options.warm_up :], [10, 50, 90])
    tokens = config.data.batch_size * config.data.sequence_length
    device = jax.devices()[0]
    peak = device_peak_flops(device)
    report = {
        "config": Path(options.config).stem,
        "overrides": overrides,
        "device": device.device_kind,
        "jax": jax.__version__,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "compile_s": compile_seconds,
        "step_s": median,
        "step_s_low": low,
        "step_s_high": high,
        "tokens_per_s": tokens / median,
        "mfu": tokens / median * flops_per_token(config.model) / peak if peak else None,
        "temporaries_GB": step.memory_analysis().temp_size_in_bytes / 1e9,
        "peak_memory_GB": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
    }
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(step(state, shard_batch(next(data), mesh), go))
            report["profile_ms"] = time_by_part(Path(folder), step.as_text())
    data.close()
    return report


def time_by_part(folder: Path, program: str) -> dict[str, float]:
    """Device milliseconds by part of the model: a trace's kernels, joined by name with the compiled program."""
    paths = dict(re.findall(r"%?([\w.-]+) = .*?metadata=\{[^}]*op_name=\"([^\"]*)\"", program))
    totals = collections.Counter()
    trace = next(folder.rglob("*.xplane.pb"))
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                path = paths.get(operation, operation)
                totals[next(part for part, pattern in _PARTS.items() if pattern in path)] += event.duration_ns
    return {part: totals[part] / 1e6 for part in _PARTS}


def main() -> None:
    """Measures one config and writes JSON."""
    parser = Parser("experiments.latency.train_step", __doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options, overrides = parser.parse()
    if options.profile:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    report = measure(options, overrides)
    print(json.dumps(report), flush=True)
    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
