"""Times whole models: prefill of n tokens, then n new ones drawn by the engine's loop, beside the floor and the paper.

PYTHONPATH=. python experiments/latency/engine.py --json OUT [--models siso mimo] [--lengths 512 2048] [--batches 1 128]
PYTHONPATH=. python experiments/latency/engine.py --json OUT --merge A.json B.json ...

Weights are random bfloat16 in the shapes of the 1b configs, the transformer in that of Llama 3.2 1B; the recurrent
state is float32 and bfloat16, keys and values bfloat16. Before a model is timed, its logits after a prefill and some
steps are compared with those of the whole sequence at once. Every row is printed (Markdown) and written to OUT as it is
measured; then two plots. A cell that needs more memory than there is says so, and the others go on. --merge makes one
report of several, each of some of the cells, for example of a GPU each.

A prefill goes through the batch some rows at a time, as the engine's does. Decoding draws at temperature 1. What would
take longer than --seconds is timed in part: `extrapolated_from` in a row is how many of the prefill's calls, or of the
steps, were timed. The floor of a prefill is its products at the device's rate; that of a step the weights, the
recurrent state twice (read and written) and the keys and values of 3n/2 tokens, at the rate of a copy, both measured in
the same run. So many tokens are in the caches of attention when steps are timed, as half way through the decoding.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.latency import engine_report
from experiments.latency.scan import ceilings
from m3jax.circumstances import circumstances
from m3jax.cli import read_config, run_main
from m3jax.config import ModelConfig
from m3jax.inference.cache import put_rows
from m3jax.inference.rows import READING, Rows, decode, empty_rows
from m3jax.models.attention import AttentionState
from m3jax.models.language_model import LanguageModel
from m3jax.training.flops import forward_flops_per_token

PyTree = Any

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA = {"n_layers": 16, "d_intermediate": 8192, "rope_theta": 5e5}  # Llama 3.2 1B, beside 1b_transformer
MODELS = {"siso": {}, "mimo": {}, "mamba2": {}, "gdn": {}, "transformer": LLAMA, "hybrid": {}}
TINY = {
    "vocab_size": 61, "d_model": 32, "d_intermediate": 0, "headdim": 16, "d_state": 16,
    "attention_heads": 4, "attention_kv_heads": 2, "attention_headdim": 8, "gdn_heads": 2, "gdn_headdim": 16,
}  # fmt: skip
# Seconds on one H100 at batch 128 (arXiv 2603.15569, Table 7): prefill of n tokens, and with n more drawn. The
# transformer's are vLLM's.
PAPER_LENGTHS = (512, 1024, 2048, 4096, 16384)
PAPER = {
    "transformer": ((0.26, 0.52, 1.08, 2.08, 12.17), (4.45, 9.60, 20.37, 58.64, 976.50)),
    "gdn": ((0.51, 1.01, 2.01, 4.00, 16.21), (4.56, 9.11, 18.22, 36.41, 145.87)),
    "mamba2": ((0.51, 1.02, 2.02, 4.02, 16.22), (4.66, 9.32, 18.62, 37.22, 149.02)),
    "siso": ((0.51, 1.01, 2.02, 4.01, 16.22), (4.39, 8.78, 17.57, 35.11, 140.61)),
    "mimo": ((0.60, 1.21, 2.42, 4.76, 19.44), (4.74, 9.48, 18.96, 37.85, 151.81)),
}
REPEATS = 3
# What is only read may arrive so much faster than a copy's bytes do: an H100's memory has 3.35 TB/s and an H200's 4.8,
# copies 3.0 and 4.3.
READ_OVER_COPY = 1.3
CHECKED_PROMPT, CHECKED_STEPS = 60, 6


def make_model(name: str, state_dtype: str, quick: bool) -> LanguageModel:
    """A model of MODELS in bfloat16."""
    config = read_config(CONFIGS / f"1b_{name}.py").model
    changes = MODELS[name] | (TINY | {"n_layers": len(config.mixer_pattern)} if quick else {})
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16", "state_dtype": state_dtype}
    return LanguageModel(dataclasses.replace(config, **changes, **dtypes, remat="none", scan_layers=True))


def make_params(model: LanguageModel) -> PyTree:
    """Random parameters as decoding takes them."""

    @jax.jit
    def init() -> PyTree:
        return model.separate_layers(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])

    return init()


def random_tokens(model: LanguageModel, *shape: int) -> jax.Array:
    """Token ids that any prompt may have."""
    return jax.random.randint(jax.random.key(1), shape, 0, model.config.vocab_size)


def tolerance(config: ModelConfig) -> float:
    """RMS, relative: a layer rounds what it adds about six times in a row, here and there; see tests/tolerances.py."""
    return 2 * float(jnp.finfo(jnp.bfloat16).eps) / 4 * np.sqrt(2 * 6 * config.n_layers)


def check(model: LanguageModel, params: PyTree) -> float:
    """RMS error of the logits of prefill and steps over the RMS of those of one prefill; raises over the tolerance."""
    tokens = random_tokens(model, 2, CHECKED_PROMPT + CHECKED_STEPS)
    apply = jax.jit(model.apply, static_argnames="method")
    hidden, _ = apply({"params": params}, tokens, method="prefill")
    expected = apply({"params": params}, hidden[:, CHECKED_PROMPT - 1 :], method="logits")
    start = model.initial_state(*tokens.shape)
    hidden, state = apply({"params": params}, tokens[:, :CHECKED_PROMPT], None, start, method="prefill")
    found = [apply({"params": params}, hidden[:, -1], method="logits")]
    for i in range(CHECKED_PROMPT, CHECKED_PROMPT + CHECKED_STEPS):
        logits, state = apply({"params": params}, tokens[:, i], state, method="step")
        found.append(logits)
    expected, found = np.asarray(expected, np.float64), np.stack(found, axis=1).astype(np.float64)
    error = float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))
    if not error <= tolerance(model.config):
        raise AssertionError(f"logits of steps are off by {error:.1e}, more than {tolerance(model.config):.1e}")
    return error


@functools.partial(jax.jit, static_argnames="model", compiler_options=READING)
def prefill(model: LanguageModel, params: PyTree, tokens: jax.Array) -> tuple[PyTree, jax.Array]:
    """The state after prompts [r, n], and their most probable next tokens [r]."""
    hidden, state = model.apply({"params": params}, tokens, None, model.initial_state(*tokens.shape), method="prefill")
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, donate_argnames="rows", compiler_options=READING)
def enter(rows: Rows, first: jax.Array, state: PyTree, token: jax.Array, length: int) -> Rows:
    """The rows with these from `first` on, all of which may gain any number of tokens."""
    state, token = put_rows((rows.state, rows.token), first, (state, token))
    endless = jnp.full_like(rows.left, jnp.iinfo(jnp.int32).max)
    return rows._replace(state=state, token=token, length=jnp.full_like(rows.length, length), left=endless)


@functools.partial(jax.jit, donate_argnames="rows")
def with_tokens(rows: Rows, tokens: int) -> Rows:
    """The rows with so many tokens in every cache of keys and values, whatever is there."""

    def in_layer(state: PyTree) -> PyTree:
        is_cache = isinstance(state, AttentionState)
        return state._replace(length=jnp.full_like(state.length, tokens)) if is_cache else state

    return rows._replace(state=jax.tree.map(in_layer, rows.state, is_leaf=lambda v: isinstance(v, AttentionState)))


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, and 10th and 90th percentile."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": float(median), "low": float(low), "high": float(high)}


def seconds_of(run: Callable[[], Any]) -> float:
    """Until everything that `run` returns is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def memory() -> dict[str, int]:
    """The device's own account of its memory in bytes; empty where it keeps none."""
    return jax.devices()[0].memory_stats() or {}


def check_room(params: PyTree, *makers: Callable[[], PyTree]) -> None:
    """Raises NoRoomError unless the device has room for parameters and for what the makers would make.

    To try is no way to learn it: a GPU program that finds no room for one of its results never frees those that it has
    found room for (so GpuExecutable::GenerateBufferAllocations in XLA), and the process has none thereafter.
    What such a program left behind counts as taken.
    """
    account = memory()
    if "bytes_limit" not in account:
        return
    weights = tree_bytes(params)
    needed = weights + sum(tree_bytes(jax.eval_shape(maker)) for maker in makers)
    lost = max(0, account["bytes_in_use"] - weights)
    if needed > account["bytes_limit"] - lost:
        there = f"needs {needed / 1e9:.1f} GB, the device has {account['bytes_limit'] / 1e9:.1f}"
        raise NoRoomError(there + f", of which {lost / 1e9:.1f} are taken" * (lost > 1e8))


def tree_bytes(tree: PyTree) -> int:
    """Of all arrays, or of what stands for them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class NoRoomError(Exception):
    """A cell that the device has no memory for; the message gives sizes."""


class Cell:
    """One model at one batch and length: its rows on the device, and what takes how long."""

    def __init__(self, model: LanguageModel, params: PyTree, batch: int, length: int, options: argparse.Namespace):
        self.model, self.params, self.batch, self.length, self.options = model, params, batch, length, options
        at_once = max(1, min(batch, options.prefill_tokens // length))
        self.at_once = max(r for r in range(1, at_once + 1) if batch % r == 0)
        check_room(params, self._empty, lambda: model.initial_state(self.at_once, length))
        self.rows = jax.block_until_ready(self._empty())
        self.prompts = random_tokens(model, self.at_once, length)

    def _empty(self) -> Rows:
        return empty_rows(self.model, self.batch, 2 * self.length, 8)

    def _fill(self, calls: int) -> jax.Array:
        for i in range(calls):
            state, token = prefill(self.model, self.params, self.prompts)
            self.rows = enter(self.rows, np.int32(i * self.at_once), state, token, self.length)
        return self.rows.token

    def _decode(self, steps: int) -> jax.Array:
        ended = np.zeros(self.batch, bool)
        half_way = with_tokens(self.rows, np.int32((3 * self.length - steps) // 2))
        self.rows, drawn = decode(
            self.model, self.params, half_way, ended, np.int32(steps), None, most=self.options.steps
        )
        return drawn.tokens

    def _part(self, run: Callable[[int], Any], whole: int, sample: int) -> tuple[int, list[float]]:
        """How many of `whole` calls are timed, and the times of one."""
        seconds_of(lambda: run(1))  # compiles
        one = seconds_of(lambda: run(sample)) / sample
        part = int(np.clip(self.options.seconds / REPEATS / one, 1, whole))
        return part, [seconds_of(lambda: run(part)) / part for _ in range(REPEATS)]

    def measure(self) -> dict[str, Any]:
        """Seconds of the prefill and of all together, milliseconds of a step."""
        calls = self.batch // self.at_once
        part, times = self._part(self._fill, calls, 1)
        row = {"prefill_rows": self.at_once, "prefill_s": spread([calls * t for t in times])}
        steps, step_times = self._part(self._decode, min(self.length, self.options.steps), min(self.length, 4))
        row["step_ms"] = spread([1e3 * t for t in step_times])
        row["prefill_and_decode_s"] = row["prefill_s"]["median"] + self.length * row["step_ms"]["median"] / 1e3
        whole = {"prefill_calls": (part, calls), "steps": (steps, self.length)}
        partial = {name: timed for name, (timed, all_) in whole.items() if timed < all_}
        return row | ({"extrapolated_from": partial} if partial else {})

    def floors(self, limits: dict[str, float]) -> dict[str, float]:
        """What the device cannot beat: seconds of the prefill, milliseconds of a step."""
        flops = forward_flops_per_token(self.model.config, self.length)
        flops["head"] /= self.length  # of the last token alone
        state = 0
        for layer in self.rows.state:
            if isinstance(layer, AttentionState):
                state += (layer.keys.nbytes + layer.values.nbytes) * 3 // 4  # of room for 2n tokens
            else:
                state += 2 * tree_bytes(layer)
        weights = tree_bytes(self.params)
        tera = self.batch * self.length * sum(flops.values()) / 1e12
        return {
            "prefill_s": tera / limits["matmul_TFLOP_per_s"],
            "step_ms": (weights + state) / limits["copy_TB_per_s"] / 1e9,
            "weights_GB": weights / 1e9,
            "state_GB": state / 1e9,
        }


def measure_cell(
    model: LanguageModel, params: PyTree, batch: int, length: int, options: argparse.Namespace, limits: dict
) -> dict[str, Any]:
    """Times and floors, or why there are none."""
    try:
        cell = Cell(model, params, batch, length, options)
        row = cell.measure()
    except NoRoomError as error:
        return {"failed": str(error)}
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        return {"failed": "out of memory" if "RESOURCE_EXHAUSTED" in text else text[:500]}
    floor = cell.floors(limits)
    for name, faster in (("prefill_s", 1.0), ("step_ms", READ_OVER_COPY)):
        if not options.quick and row[name]["median"] < floor[name] / faster:
            raise AssertionError(f"{row}: {name} is under the floor {floor}; what was timed is not the model.")
    return row | {"floor": floor}


def paper_figures(name: str, batch: int, length: int) -> dict[str, float]:
    """The paper's seconds for such a cell, if it has one."""
    if batch != 128 or name not in PAPER or length not in PAPER_LENGTHS:
        return {}
    prefill, both = (column[PAPER_LENGTHS.index(length)] for column in PAPER[name])
    return {"paper": {"prefill_s": prefill, "prefill_and_decode_s": both}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --quick changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="OUT")
    add("--images", type=Path, metavar="DIR", help="of the two plots (default: that of OUT)")
    add("--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing, merge these into OUT")
    add("--commit", help="what is measured, for the record")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--state-dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    add("--lengths", nargs="+", type=int, help="of the prompt, and of what is drawn")
    add("--batches", nargs="+", type=int)
    add("--prefill-tokens", type=int, default=32768, help="at most so many tokens at a time, and at least one row")
    add("--steps", type=int, default=512, help="at most so many are timed, and multiplied")
    add("--seconds", type=float, default=6.0, help="for each of the two parts of a cell")
    add("--quick", action="store_true", help="tiny models, so that a CPU shows in a minute that everything runs")
    options = parser.parse_args(argv)
    options.lengths = options.lengths or ([16] if options.quick else [512, 1024, 2048, 4096, 8192, 16384])
    options.batches = options.batches or ([1, 2] if options.quick else [1, 32, 128])
    if options.quick:
        options.seconds, options.prefill_tokens, options.steps = 0.1, 32, 8
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Checks and times the cells one by one; prints and writes each row."""
    limits = ceilings(2**22, 256) if options.quick else ceilings()
    report = circumstances(options.commit) | {"quick": options.quick, "ceilings": limits, "errors": {}, "rows": []}
    print(json.dumps(limits))
    print(engine_report.head(), flush=True)
    for name in options.models:
        # Attention keeps keys and values in the model's dtype, whatever that of a recurrent state.
        state_dtypes = ["bfloat16"] if name == "transformer" else options.state_dtypes
        params = make_params(make_model(name, state_dtypes[0], options.quick))
        for state_dtype in state_dtypes:
            model = make_model(name, state_dtype, options.quick)
            report["errors"][f"{name} state {state_dtype}"] = check(model, params)
            for batch in options.batches:
                for length in options.lengths:
                    row = {"model": name, "state_dtype": state_dtype, "batch": batch, "length": length}
                    row |= measure_cell(model, params, batch, length, options, limits)
                    report["rows"].append(row | paper_figures(name, batch, length))
                    options.json.write_text(json.dumps(report, indent=1) + "\n")  # kept, whatever comes next
                    print(engine_report.line(engine_report.cells(report["rows"][-1])), flush=True)
        del params
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Measures or merges; prints the table, writes JSON and plots."""
    options = parse(argv)
    if options.merge:
        report = engine_report.merge([engine_report.read(path) for path in options.merge])
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(engine_report.table(report))
    else:
        report = measure(options)
    engine_report.plot(report, options.images or options.json.parent, options.json.stem)


if __name__ == "__main__":
    run_main(main)
