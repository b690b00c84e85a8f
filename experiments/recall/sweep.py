"""Trains and measures recall: python experiments/recall/sweep.py --config quick [--workdir DIR] [--models ...] [...].

Run the same command again to continue an interrupted study. See docs/recall.md.
"""

from pathlib import Path

from m3jax.cli import run_main
from m3jax.studies.program import run_study

if __name__ == "__main__":
    run_main(lambda: run_study(Path(__file__)))
