"""Times whole models: prefill of n tokens, then n new ones drawn by the engine's loop, beside the floor and the paper.

PYTHONPATH=. python experiments/latency/engine.py --json OUT [--models siso mimo] [--lengths 512 2048] [--batches 1 128]

Weights are random bfloat16 in the shapes of the 1b configs, the transformer in that of Llama 3.2 1B; the recurrent
state is float32 and bfloat16. Before a model is timed, its logits after a prefill and some steps are compared with
those of the whole sequence at once. Every row is written to OUT as it is measured; a plot to OUT with .png. A cell
that runs out of memory says so, and the others go on.

A prefill goes through the batch some rows at a time, as the engine's does. Decoding draws at temperature 1. What would
take longer than --seconds is timed in part: `extrapolated_from` in a row is how many of the prefill's calls, or of the
steps, were timed. The floor of a prefill is its products at the device's rate; that of a step the weights, the
recurrent state twice (read and written) and the keys and values of n tokens, at the rate of a copy, both measured in
the same run.
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
import matplotlib.pyplot as plt
import numpy as np

from experiments.latency.scan import ceilings
from m3jax.circumstances import circumstances
from m3jax.cli import read_config
from m3jax.config import ModelConfig
from m3jax.inference.cache import put_rows
from m3jax.inference.rows import Rows, decode, empty_rows
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


@functools.partial(jax.jit, static_argnames="model")
def prefill(model: LanguageModel, params: PyTree, tokens: jax.Array) -> tuple[PyTree, jax.Array]:
    """The state after prompts [r, n], and their most probable next tokens [r]."""
    hidden, state = model.apply({"params": params}, tokens, None, model.initial_state(*tokens.shape), method="prefill")
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, donate_argnames="rows")
def enter(rows: Rows, first: jax.Array, state: PyTree, token: jax.Array, length: int) -> Rows:
    """The rows with these from `first` on, all of which may gain any number of tokens."""
    state, token = put_rows((rows.state, rows.token), first, (state, token))
    endless = jnp.full_like(rows.left, jnp.iinfo(jnp.int32).max)
    return rows._replace(state=state, token=token, length=jnp.full_like(rows.length, length), left=endless)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, and 10th and 90th percentile."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": float(median), "low": float(low), "high": float(high)}


def seconds_of(run: Callable[[], Any]) -> float:
    """Until everything that `run` returns is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


class Cell:
    """One model at one batch and length: its rows on the device, and what takes how long."""

    def __init__(self, model: LanguageModel, params: PyTree, batch: int, length: int, options: argparse.Namespace):
        self.model, self.params, self.batch, self.length, self.options = model, params, batch, length, options
        self.rows = empty_rows(model, batch, 2 * length, 8)
        at_once = max(1, min(batch, options.prefill_tokens // length))
        self.at_once = max(r for r in range(1, at_once + 1) if batch % r == 0)
        self.prompts = random_tokens(model, self.at_once, length)

    def _fill(self, calls: int) -> jax.Array:
        for i in range(calls):
            state, token = prefill(self.model, self.params, self.prompts)
            self.rows = enter(self.rows, np.int32(i * self.at_once), state, token, self.length)
        return self.rows.token

    def _decode(self, steps: int) -> jax.Array:
        ended = np.zeros(self.batch, bool)
        self.rows, drawn = decode(
            self.model, self.params, self.rows, ended, np.int32(steps), None, most=self.options.steps
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
                state += (layer.keys.nbytes + layer.values.nbytes) // 2  # half of the room is taken
            else:
                state += 2 * sum(v.nbytes for v in jax.tree.leaves(layer))
        weights = sum(v.nbytes for v in jax.tree.leaves(self.params))
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
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        return {"failed": "out of memory" if "RESOURCE_EXHAUSTED" in text else text[:500]}
    floor = cell.floors(limits)
    for name in ("prefill_s", "step_ms"):
        if not options.quick and row[name]["median"] < floor[name]:
            raise AssertionError(f"{row}: {name} is under the floor {floor}; what was timed is not the model.")
    return row | {"floor": floor}


def paper_figures(name: str, batch: int, length: int) -> dict[str, float]:
    """The paper's seconds for such a cell, if it has one."""
    if batch != 128 or name not in PAPER or length not in PAPER_LENGTHS:
        return {}
    prefill, both = (column[PAPER_LENGTHS.index(length)] for column in PAPER[name])
    return {"paper": {"prefill_s": prefill, "prefill_and_decode_s": both}}


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    label = f"{row['model']} state {row['state_dtype']} B{row['batch']} n{row['length']}"
    if "failed" in row:
        return f"{label:40s}  {row['failed']}"
    prefill, step, floor = row["prefill_s"]["median"], row["step_ms"]["median"], row["floor"]
    paper = (
        "".join(f"{row['paper'][key]:12.2f}" for key in ("prefill_s", "prefill_and_decode_s")) if "paper" in row else ""
    )
    part = " *" if "extrapolated_from" in row else "  "
    return (
        f"{label:40s}{prefill:12.4f} ({prefill / floor['prefill_s']:5.2f}){step:12.3f} ({step / floor['step_ms']:5.2f})"
        f"{row['prefill_and_decode_s']:12.3f}{part}{paper}"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds of prefill and decoding over the length, an axis for each batch; the paper's as crosses."""
    rows = [row for row in report["rows"] if "failed" not in row]
    batches = sorted({row["batch"] for row in rows})
    if not rows:
        return
    figure, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 4.5), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for name, dtype in dict.fromkeys((row["model"], row["state_dtype"]) for row in rows):
            own = [row for row in rows if (row["model"], row["state_dtype"], row["batch"]) == (name, dtype, batch)]
            lengths, times = [r["length"] for r in own], [r["prefill_and_decode_s"] for r in own]
            (line,) = axis.plot(lengths, times, "o-" if dtype == "float32" else "o--", label=f"{name}, {dtype} state")
            paper = [(r["length"], r["paper"]["prefill_and_decode_s"]) for r in own if "paper" in r]
            if paper:
                axis.plot(*zip(*paper, strict=True), "x", color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="n", title=f"batch {batch}, {report['device']}")
    axes[0][0].set_ylabel("seconds for a prompt of n and n more (x: paper)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --quick changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="OUT")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times the cells one by one; prints a table, writes JSON and a plot."""
    options = parse(argv)
    limits = ceilings(2**22, 256) if options.quick else ceilings()
    report = circumstances(options.commit) | {"quick": options.quick, "ceilings": limits, "errors": {}, "rows": []}
    print(json.dumps(limits), flush=True)
    print(
        f"{'(x floor; *: extrapolated)':40s}{'prefill s':>20s}{'step ms':>20s}{'both s':>12s}"
        f"{'paper: prefill, both':>26s}"
    )
    for name in options.models:
        params = make_params(make_model(name, "float32", options.quick))
        for state_dtype in options.state_dtypes[:1] if name == "transformer" else options.state_dtypes:
            model = make_model(name, state_dtype, options.quick)
            report["errors"][f"{name} state {state_dtype}"] = check(model, params)
            for batch in options.batches:
                for length in options.lengths:
                    row = {"model": name, "state_dtype": state_dtype, "batch": batch, "length": length}
                    row |= measure_cell(model, params, batch, length, options, limits)
                    report["rows"].append(row | paper_figures(name, batch, length))
                    options.json.write_text(json.dumps(report, indent=1) + "\n")  # kept, whatever comes next
                    print(show(report["rows"][-1]), flush=True)
        del params
    plot(report, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
