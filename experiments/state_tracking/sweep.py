"""Trains and measures a study: python experiments/state_tracking/sweep.py --config parity_quick [--workdir DIR] [...].

Run the same command again to continue an interrupted study. See docs/state_tracking.md.
"""

from pathlib import Path

from m3jax.cli import run_main
from m3jax.studies.program import run_study

if __name__ == "__main__":
    run_main(lambda: run_study(Path(__file__)))
