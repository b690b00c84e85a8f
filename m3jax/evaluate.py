"""Measures a checkpoint on held-out data: python -m m3jax.evaluate --checkpoint DIR [--config.data.source=... ...]."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from m3jax.cli import Parser, run_main
from m3jax.data import open_validation
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import load_checkpoint
from m3jax.training.evaluation import evaluate
from m3jax.training.sharding import make_mesh
from m3jax.training.step import make_eval_step


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and prints.

    Args:
      argv: the arguments; None = those of this process.
    """
    parser = Parser("m3jax.evaluate", "Loss, perplexity and bits per byte of a checkpoint on held-out data.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a workdir, or one of its checkpoints/STEP")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="measure the moving average of the parameters")
    parser.add_argument("--batches", type=int, default=0, help="how many batches (default: all held-out data)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    arguments, overrides = parser.parse(argv)
    # A run's mesh is not that of the machine it is measured on.
    overrides = {"mesh.data": 1, "mesh.fsdp": 1} | overrides
    checkpoint = load_checkpoint(arguments.checkpoint, arguments.step, ema=arguments.ema, overrides=overrides)
    config = checkpoint.config
    mesh = make_mesh(config)
    validation = open_validation(config, checkpoint.tokenizer)
    eval_step = make_eval_step(config, LanguageModel(config.model), mesh)
    result = evaluate(eval_step, checkpoint.params, validation, arguments.batches, mesh)
    print(f"checkpoint      {checkpoint.path}")
    print(f"held-out data   {config.data.validation_source or config.data.source}")
    for name, value in asdict(result).items():
        shown = "unknown" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        print(f"{name:<15} {shown}")
    if arguments.json:
        summary = {"checkpoint": str(checkpoint.path), "step": checkpoint.step} | asdict(result)
        Path(arguments.json).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
