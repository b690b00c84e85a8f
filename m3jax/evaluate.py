"""Measures a checkpoint on held-out data: python -m m3jax.evaluate --checkpoint DIR [--config.data.source=... ...]."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from m3jax.cli import Parser, run_main
from m3jax.data import HeldOut, open_validation
from m3jax.inference.stepwise import make_stepwise_eval
from m3jax.loading import read_checkpoint
from m3jax.models.language_model import LanguageModel
from m3jax.models.mamba3 import A_ACTIVATIONS
from m3jax.training.checkpoint import Checkpoint
from m3jax.training.evaluation import Evaluation, evaluate
from m3jax.training.sharding import make_mesh
from m3jax.training.step import make_eval_step


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and prints.

    Args:
      argv: the arguments; None = those of this process.
    """
    arguments, overrides = _parser().parse(argv)
    # A run's mesh is not that of the machine it is measured on.
    overrides = {"mesh.data": 1, "mesh.fsdp": 1} | overrides
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.step, ema=arguments.ema, overrides=overrides)
    config = checkpoint.config
    validation = open_validation(config, checkpoint.tokenizer)
    print(f"checkpoint      {checkpoint.path}")
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
    if arguments.json:
        summary = {"checkpoint": str(checkpoint.path), "step": checkpoint.step} | asdict(results[best])
        if arguments.by_steps:
            summary["by_steps_with_state"] = config.model.state_dtype
        if arguments.both_a_activations:
            summary["a_activations"] = {name: asdict(result) for name, result in results.items()}
        Path(arguments.json).write_text(json.dumps(summary, indent=1) + "\n")


def _parser() -> Parser:
    parser = Parser("m3jax.evaluate", "Loss, perplexity and bits per byte of a checkpoint on held-out data.")
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
    return parser


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
