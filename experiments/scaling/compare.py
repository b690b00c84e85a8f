"""Trains models of one size and different architectures on the same text, and sets them side by side.

python experiments/scaling/compare.py --workdir DIR [--models mamba3_siso gdn ...] [--tokens N] [--seeds 0 1 2]

Every model is configs/SIZE_NAME.py with the same text, order, token budget, schedule and seed (SETTINGS; any key can be
changed for all of them with --config.GROUP.KEY=VALUE). Each is trained by `python -m m3jax.train` in a process of its
own, in DIR/NAME-seedN, and evaluated on all held-out text as it goes and at its end. The same command continues a
comparison that was stopped; models that are finished stay as they are. Results: DIR/comparison.json (or --json OUT),
with a table and a plot beside it (.md, .png). Text is read as bytes, so the vocabulary is that of bytes, and parameters
and speed are those of the layers.
"""

import json
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax
from matplotlib.figure import Figure

from m3jax.circumstances import circumstances
from m3jax.cli import Overrides, Parser, read_config, run_main
from m3jax.config import Config, build_config
from m3jax.errors import ConfigError, TrainingError
from m3jax.models.language_model import LanguageModel
from m3jax.training.manifest import write_json
from m3jax.training.metrics import FILE, read_metrics
from m3jax.training.step import init_params
from m3jax.training.workdir import changed_keys

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {
    "mamba3_siso": "siso",
    "mamba3_mimo": "mimo",
    "mamba2": "mamba2",
    "gdn": "gdn",
    "transformer": "transformer",
    "hybrid": "hybrid",
}
SETTINGS = {
    "model.vocab_size": 258,
    "model.remat": "dots",  # without, Gated DeltaNet keeps 76 GB
    "model.scan_layers": False,
    "data.source": "kjv",
    "data.tokenizer": "bytes",
    "data.sequence_length": 2048,
    "data.batch_size": 16,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_fraction": 0.1,
    "train.grad_accumulation": 1,
    "train.loss_chunk": 32_768,  # all logits at once: of so few bytes they are small
    "train.eval_batches": 0,
}
_TOKENS = 384 * 16 * 2048  # three times the bundled text
_EVALUATIONS = 16
_SECONDS = "seconds.json"  # of each attempt at a run, in its folder
_COLUMNS = {
    "parameters": "{:,.0f}",
    "bits_per_byte": "{:.4f}",
    "loss": "{:.4f}",
    "best_loss": "{:.4f}",
    "best_at_tokens": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
    "peak_memory_GB": "{:.1f}",
    "wall_s": "{:.0f}",
}


@dataclass(frozen=True)
class Run:
    """One model, trained from one seed."""

    name: str
    seed: int
    folder: Path
    file: Path  # of the config
    changes: Overrides
    config: Config


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains what is missing and writes the results.

    Args:
      argv: the arguments; None = those of this process.
    """
    parser = Parser("experiments.scaling.compare", __doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", default="180m", help="of the configs, as in configs/180m_siso.py")
    parser.add_argument("--tokens", type=int, default=_TOKENS, help="that each model is trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the initialisation and the data's order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="default: DIR/comparison.json")
    parser.add_argument("--commit", help="what is measured, for the record")
    options, overrides = parser.parse(argv)
    runs = [
        plan(options.workdir, name, CONFIGS / f"{options.size}_{MODELS[name]}.py", seed, options.tokens, overrides)
        for seed in options.seeds
        for name in options.models
    ]
    trained = {run.folder.name: train(run) for run in runs}
    # Only now, when no other process needs the devices, does this one ask for them.
    report = circumstances(options.commit) | {
        "command": shlex.join(["python", "experiments/scaling/compare.py", *(sys.argv[1:] if argv is None else argv)]),
        "runs": [measure(run) for run in runs if trained[run.folder.name]],
    }
    path = options.json or options.workdir / "comparison.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    plot(report, path.with_suffix(".png"))
    print(table(report))
    failed = [name for name, done in trained.items() if not done]
    if failed:
        raise TrainingError(f"{', '.join(failed)} failed, see above; the same command tries again.")


def plan(workdir: Path, name: str, file: Path, seed: int, tokens: int, overrides: Overrides) -> Run:
    """Returns a run with its whole config.

    Raises:
      ConfigError: a config that is wrong, too few tokens for a step, or a folder that holds a run with another config.
    """
    changes = SETTINGS | {"train.seed": seed, "data.seed": seed} | overrides
    data = read_config(file, changes).data
    steps = tokens // (data.batch_size * data.sequence_length)
    if steps < 1:
        raise ConfigError(
            f"--tokens {tokens}: expected at least the {data.batch_size * data.sequence_length} of one step "
            "(data.batch_size times data.sequence_length)."
        )
    every = max(1, steps // _EVALUATIONS)
    changes = {
        "train.steps": steps, "train.eval_every": every, "train.log_every": max(1, every // 4),
        "checkpoint.every": -(-steps // 2), "checkpoint.keep": 1,
    } | changes  # fmt: skip
    config, folder = read_config(file, changes), workdir / f"{name}-seed{seed}"
    _check_same(folder, config)
    return Run(name, seed, folder, file, changes, config)


def _check_same(folder: Path, config: Config) -> None:
    stored = folder / "config.json"
    if not stored.exists():
        return
    changed = changed_keys(build_config(json.loads(stored.read_text())), config)
    for key, (old, new) in changed.items():
        raise ConfigError(f"config.{key} = {new!r}: the run in {folder} has {old!r}. Choose another --workdir.")


def train(run: Run) -> bool:
    """Trains a run to its end unless it is there already; False if that failed.

    Raises:
      TrainingError: it was stopped on its way.
    """
    if _finished(run):
        print(f"{run.folder.name}: finished before", flush=True)
    else:
        print(f"== {run.folder.name}", flush=True)
        flags = [f"--config.{key}={value}" for key, value in run.changes.items()]
        began = time.perf_counter()
        # A process of its own has a peak of memory of its own, and gives all of it back.
        code = subprocess.run(
            [sys.executable, "-m", "m3jax.train", "--config", str(run.file), "--workdir", str(run.folder), *flags],
        ).returncode
        if run.folder.is_dir():
            write_json(run.folder / _SECONDS, [*_attempts(run), time.perf_counter() - began])
        if code:
            return False
        if not _finished(run):
            raise TrainingError(f"{run.folder.name} was stopped. Run the same command again to continue.")
    return True


def _finished(run: Run) -> bool:
    return any(record["step"] == run.config.train.steps for record in _evaluations(run))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [record for record in _records(run) if "validation_loss" in record]


def _records(run: Run) -> list[dict[str, Any]]:
    path = run.folder / FILE
    return read_metrics(path) if path.exists() else []


def _attempts(run: Run) -> list[float]:
    path = run.folder / _SECONDS
    return json.loads(path.read_text()) if path.exists() else []


def measure(run: Run) -> dict[str, Any]:
    """What a finished run's records say; see `table`."""
    data, evaluations = run.config.data, _evaluations(run)
    per_step = data.batch_size * data.sequence_length
    steps = [record for record in _records(run) if "tokens_per_second" in record]
    best = min(evaluations, key=lambda record: record["validation_loss"])
    shapes = jax.eval_shape(lambda: init_params(run.config, LanguageModel(run.config.model)))
    return {
        "name": run.name,
        "seed": run.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "tokens": run.config.train.steps * per_step,
        "bits_per_byte": evaluations[-1].get("validation_bits_per_byte"),
        "loss": evaluations[-1]["validation_loss"],
        "best_loss": best["validation_loss"],
        "best_at_tokens": best["step"] * per_step,
        # Of the intervals between records, which leave compilation, evaluations and checkpoints out.
        "tokens_per_second": median(record["tokens_per_second"] for record in steps),
        "mfu": median(record["mfu"] for record in steps) if "mfu" in steps[0] else None,
        "peak_memory_GB": max(record["peak_memory_bytes"] for record in steps) / 1e9,
        "wall_s": sum(_attempts(run)),
        "curve": [(record["step"] * per_step, record["validation_loss"]) for record in evaluations],
        "changes": run.changes,
    }


def _by_name(report: dict) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for run in report["runs"]:
        groups[run["name"]].append(run)
    return groups


def table(report: dict) -> str:
    """Markdown: a row per model, means over its seeds, in brackets the extremes where they differ."""

    def cell(runs: list[dict], column: str) -> str:
        values = [run[column] for run in runs if run[column] is not None]
        if not values:
            return "-"
        shown = _COLUMNS[column].format
        spread = f" ({shown(min(values))} to {shown(max(values))})" if min(values) < max(values) else ""
        return shown(mean(values)) + spread

    rows = [[name, *(cell(runs, column) for column in _COLUMNS)] for name, runs in _by_name(report).items()]
    lines = [["model", *(name.replace("_", " ") for name in _COLUMNS)], ["---"] * (1 + len(_COLUMNS)), *rows]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{report['device']}, {report['date']}, jax {report['jax']}\n\n    {report['command']}\n\n{grid}\n"


def plot(report: dict, path: Path) -> None:
    """Held-out loss against tokens: a colour per model, a line per seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, runs) in enumerate(_by_name(report).items()):
        for run in runs:
            tokens, losses = zip(*run["curve"], strict=True)
            axes.plot(tokens, losses, ".-", color=f"C{i}", label=name if run is runs[0] else None)
    axes.set(xlabel="tokens", ylabel="held-out loss (nats per token)", title=report["device"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_main(main)
