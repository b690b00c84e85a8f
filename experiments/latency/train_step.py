"""Times training steps of a config on real text: tokens per second, MFU, peak memory, compile time, time by part.

python experiments/latency/train_step.py --config configs/1b_mimo.py --batch-size 8 --json OUT [--profile]
python experiments/latency/train_step.py --config configs/1b_mimo.py --largest-batch --steps 2 --warm-up 1 --json OUT

`--batch-size` sequences make a step, without accumulation unless --config.train.grad_accumulation asks for it;
`--largest-batch` looks for the largest multiple of 8 that fits, by compiling alone, and then times it. Every step gets
the same batch, at a small constant learning rate, so that the loss must fall from the first step on: a run in which it
does not is rejected. A step's time is that from the arrival of the loss before to its own; the first are left out, the
median of the rest is reported and as its spread their 10th and 90th percentile. `--profile` adds the device time of
one step by part of the model; it switches XLA's command buffers off, inside which kernels lose their names, so take
times from a run without it.
"""

import argparse
import collections
import functools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.cli import Parser, read_config, run_main
from m3jax.config import Config
from m3jax.data import load_tokenizer, open_train
from m3jax.errors import ConfigError
from m3jax.models.language_model import LanguageModel
from m3jax.training.flops import device_peak_flops, flops_per_token
from m3jax.training.sharding import make_mesh, shard_batch
from m3jax.training.step import init_state, make_train_step

# Name of a part, and what the path of its operations matches; the first that fits counts.
_PARTS = {
    "scan, recomputed": r"rematted_computation.*jit\(scan\)|jit\(scan\).*rematted_computation",
    "scan, backward": r"transpose.*jit\(scan\)",
    "scan, forward": r"jit\(scan\)",
    "mixer's projections": r"/mixer(/|$)",
    "mlp": r"/mlp(/|$)",
    "norms, residual, loop over layers": r"layers|hidden\)+/while",
    "embedding, cross-entropy, optimizer": r".",
    "unnamed": r"",
}
_LEARNING_RATE = {
    "optimizer.learning_rate": 1e-4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_fraction": 0.0,
}
_BATCH_STEP = 8


def measure(options: argparse.Namespace, overrides: dict) -> dict:
    """Compiles and runs the steps; returns the report."""

    def configured(batch_size: int) -> Config:
        whole = {"train.grad_accumulation": 1}
        return read_config(options.config, _LEARNING_RATE | whole | overrides | {"data.batch_size": batch_size})

    compiled = functools.cache(lambda batch_size: Step(configured(batch_size)))
    if not options.largest_batch:
        return time_steps(compiled(options.batch_size), options) | {"overrides": overrides}
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ConfigError(f"--largest-batch: {jax.devices()[0].device_kind} does not tell how much memory it has.")
    sizes = {}

    def size(batch_size: int) -> float:
        sizes[batch_size] = compiled(batch_size).n_bytes
        print(f"batch {batch_size}: {sizes[batch_size] / 1e9:.2f} GB of {limit / 1e9:.2f}", flush=True)
        return sizes[batch_size]

    batch_size, refused = largest_that_fits(size, limit, _BATCH_STEP), []
    while batch_size:
        try:
            report = time_steps(compiled(batch_size), options)
            return report | {"overrides": overrides, "bytes_limit": limit, "compiled_bytes": sizes, "refused": refused}
        except jax.errors.JaxRuntimeError as error:
            if not _out_of_memory(error):
                raise
            print(f"batch {batch_size} fits by its compiled size, but ran out of memory: {error}"[:500], flush=True)
            refused.append(batch_size)
            batch_size -= _BATCH_STEP
    raise ConfigError(f"--largest-batch: not even {_BATCH_STEP} sequences fit into {limit / 1e9:.2f} GB.")


class Step:
    """A compiled training step, made without any array on the device."""

    def __init__(self, config: Config):
        self.config, self.mesh, self.model = config, make_mesh(config), LanguageModel(config.model)
        data = open_train(config, load_tokenizer(config.data.tokenizer))
        self.batch = next(data)
        data.close()
        abstract = jax.eval_shape(lambda: (init_state(config, self.model), self.batch, jnp.asarray(True)))
        lowered = make_train_step(config, self.model, self.mesh).lower(*abstract)
        began = time.perf_counter()
        try:
            self.compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not _out_of_memory(error):
                raise
            self.compiled = None
        self.compile_seconds = time.perf_counter() - began

    @property
    def n_bytes(self) -> float:
        """Device memory of a run: state, batch, temporaries and code; infinite if compiling itself ran out of it."""
        if self.compiled is None:
            return math.inf
        sizes = self.compiled.memory_analysis()
        arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return arrays + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes


def largest_that_fits(size: Callable[[int], float], limit: float, step: int) -> int:
    """The largest multiple of `step` whose size is at most `limit`; 0 if there is none.

    Args:
      size: grows with its argument, nearly in a straight line from some point on; every call is expensive.
      limit: what must hold it.
      step: sizes of multiples of this are asked for, each once.
    """
    sizes = {step: size(step)}
    if sizes[step] > limit:
        return 0
    sizes[2 * step] = size(2 * step)
    while True:
        low = max(n for n, bytes_ in sizes.items() if bytes_ <= limit)
        high = min((n for n, bytes_ in sizes.items() if bytes_ > limit), default=math.inf)
        if high - low == step:
            return low
        # Along the line through the ends of the bracket, or out of the two largest so far, but never far.
        a, b = (low, high) if high < math.inf else sorted(sizes)[-2:]
        if len(sizes) < 6 and sizes[a] < sizes[b] < math.inf:
            guess = min(a + (limit - sizes[a]) * (b - a) / (sizes[b] - sizes[a]), 8 * low)
        else:
            guess = (low + min(high, 4 * low)) / 2
        guess = min(max(int(guess) // step * step, low + step), high - step)
        sizes[guess] = size(guess)


def time_steps(step: Step, options: argparse.Namespace) -> dict:
    """Runs the steps on one batch, all the same; returns the report."""
    config, compiled, go = step.config, step.compiled, jnp.asarray(True)
    state = jax.jit(lambda: init_state(config, step.model))()
    arrivals, losses, unread = [time.perf_counter()], [], collections.deque()
    for i in range(options.warm_up + options.steps + 1):
        # As in training: the next step is launched before a loss is read.
        if i < options.warm_up + options.steps:
            state, metrics = compiled(state, shard_batch(step.batch, step.mesh), go)
            unread.append(metrics["loss"])
        if i:
            losses.append(float(unread.popleft()))
            arrivals.append(time.perf_counter())
    times = np.diff(arrivals)
    # Every step goes down the gradient of the batch that the next one is measured on.
    if not np.isfinite(losses).all() or not losses[-1] < losses[0]:
        raise AssertionError(f"The loss of a repeated batch does not fall: {losses}; its steps are not worth timing.")
    low, median, high = np.percentile(times[options.warm_up :], [10, 50, 90])
    tokens = config.data.batch_size * config.data.sequence_length
    device = jax.devices()[0]
    peak = device_peak_flops(device)
    report = {
        "config": Path(options.config).stem,
        "batch_size": config.data.batch_size,
        "device": device.device_kind,
        "jax": jax.__version__,
        "losses": losses,
        "compile_s": step.compile_seconds,
        "step_s": median,
        "step_s_low": low,
        "step_s_high": high,
        "tokens_per_s": tokens / median,
        "mfu": tokens / median * flops_per_token(config.model, config.data.sequence_length) / peak if peak else None,
        "temporaries_GB": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "peak_memory_GB": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
    }
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(compiled(state, shard_batch(step.batch, step.mesh), go))
            report["profile_ms"] = time_by_part(Path(folder), compiled.as_text())
    return report


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def time_by_part(folder: Path, program: str) -> dict[str, float]:
    """Device milliseconds by part of the model: a trace's kernels, joined by name with the compiled program."""
    parts = part_by_operation(program)
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
                totals[parts.get(operation, "unnamed")] += event.duration_ns
    return {part: totals[part] / 1e6 for part in _PARTS}


def part_by_operation(program: str) -> dict[str, str]:
    """The part of the model that each operation of a compiled program belongs to."""
    paths = dict(re.findall(r"%?([\w.-]+) = .*?metadata=\{[^}]*op_name=\"([^\"]*)\"", program))
    return {
        operation: next(part for part, pattern in _PARTS.items() if re.search(pattern, path))
        for operation, path in paths.items()
    }


def main() -> None:
    """Measures one config and writes JSON."""
    parser = Parser("experiments.latency.train_step", __doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    batch = parser.add_mutually_exclusive_group(required=True)
    batch.add_argument("--batch-size", type=int)
    batch.add_argument("--largest-batch", action="store_true")
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
