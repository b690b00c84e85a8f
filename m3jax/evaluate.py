"""Measures a checkpoint on held-out data: python -m m3jax.evaluate --checkpoint DIR [--config.data.source=... ...].

With --tasks NAME ... on tasks of lm-evaluation-harness instead.
"""

import argparse
import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from m3jax.cli import Parser, run_main
from m3jax.data import HeldOut, open_validation
from m3jax.errors import ConfigError
from m3jax.inference.stepwise import make_stepwise_eval
from m3jax.kernels.mamba3.coefficients import A_ACTIVATIONS
from m3jax.loading import read_checkpoint
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpoint
from m3jax.training.evaluation import Evaluation, evaluate
from m3jax.training.sharding import make_mesh
from m3jax.training.step import make_eval_step

_TASK_OPTIONS = ("include_path", "num_fewshot", "limit", "add_bos")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and prints.

    Args:
      argv: the arguments; None = those of this process.
    """
    arguments, overrides = _parser().parse(argv)
    _check(arguments)
    # A run's mesh is not that of the machine it is measured on.
    overrides = {"mesh.data": 1, "mesh.fsdp": 1} | overrides
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.step, ema=arguments.ema, overrides=overrides)
    print(f"checkpoint      {checkpoint.path}")
    summary = _on_tasks(checkpoint, arguments) if arguments.tasks else _on_held_out_data(checkpoint, arguments)
    if arguments.json:
        summary = {"checkpoint": str(checkpoint.path), "step": checkpoint.step} | summary
        Path(arguments.json).write_text(json.dumps(summary, indent=1) + "\n")


def _on_tasks(checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    harness = importlib.import_module("m3jax.interop.harness")
    options = {name: getattr(arguments, name) for name in _TASK_OPTIONS}
    results = harness.evaluate_tasks(checkpoint, arguments.tasks, **options)
    print(harness.table(results))
    return harness.summary(results)


def _on_held_out_data(checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    config = checkpoint.config
    validation = open_validation(config, checkpoint.tokenizer)
    if arguments.by_steps:
        print(f"by decode steps, state in {config.model.state_dtype}")
    print(f"held-out data   {config.data.validation_source or config.data.source}")
    results = {}
    for activation in A_ACTIVATIONS if arguments.both_a_activations else [config.model.a_activation]:
        if arguments.both_a_activations:
            print(f"a_activation    {activation}")
        results[activation] = _measure(checkpoint, activation, validation, arguments)
    best = min(results, key=lambda name: results[name].loss)
    if arguments.both_a_activations:
        print(f"lower loss: {best}; take it with --config.model.a_activation={best}")
    summary = asdict(results[best])
    if arguments.by_steps:
        summary["by_steps_with_state"] = config.model.state_dtype
    if arguments.both_a_activations:
        summary["a_activations"] = {name: asdict(result) for name, result in results.items()}
    return summary


def _parser() -> Parser:
    parser = Parser("m3jax.evaluate", "Loss, perplexity and bits per byte on held-out data, or results on tasks.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a workdir, one of its checkpoints/STEP, or a released one")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--ema", action="store_true", help="measure the moving average of the parameters")
    add("--batches", type=int, default=0, help="how many batches (default: all held-out data)")
    add(
        "--both-a-activations",
        action="store_true",
        help="measure with either model.a_activation, say which loss is lower",
    )
    add(
        "--by-steps",
        action="store_true",
        help="token by token, as generation runs; with --config.model.state_dtype=bfloat16: what a narrow state costs",
    )
    add("--json", metavar="FILE", help="write the numbers there too")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install -e '.[eval]')")
    add = tasks.add_argument
    add("--tasks", nargs="+", metavar="NAME", help="measure on these tasks, groups or tags instead")
    add("--include-path", metavar="DIR", help="a folder with tasks of your own, as YAML files")
    add("--num-fewshot", type=int, metavar="N", help="examples in front of each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin texts with BOS or not (default: as the tokenizer does)",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks: lm-evaluation-harness is not installed. Run pip install -e '.[eval]'.")
    if arguments.tasks and (arguments.batches or arguments.both_a_activations or arguments.by_steps):
        raise ConfigError(
            "--batches, --both-a-activations and --by-steps are for held-out data: leave them out, or --tasks."
        )
    if arguments.include_path and not Path(arguments.include_path).is_dir():
        raise ConfigError(f"--include-path {arguments.include_path}: no such folder.")
    if arguments.json is not None and not Path(arguments.json).parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: there is no folder {Path(arguments.json).parent}.")
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batches", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    given = [name for name in _TASK_OPTIONS if getattr(arguments, name) is not None]
    if given and not arguments.tasks:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for --tasks NAME ...: give some, or leave it out.")


def _measure(
    checkpoint: Checkpoint, a_activation: str, validation: HeldOut, arguments: argparse.Namespace
) -> Evaluation:
    model = replace(checkpoint.config.model, a_activation=a_activation)
    config = replace(checkpoint.config, model=model)
    mesh = make_mesh(config)
    built = LanguageModel(model)
    eval_step = make_stepwise_eval(built) if arguments.by_steps else make_eval_step(config, built, mesh)
    result = evaluate(eval_step, checkpoint.params, validation, arguments.batches, mesh)
    for name, value in asdict(result).items():
        shown = "unknown" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        print(f"{name:<15} {shown}")
    return result


if __name__ == "__main__":
    run_main(main)
