"""Modular arithmetic without brackets: the curriculum of mamba3_paper.py at half its pace, tested at 256.

As mamba3_paper.py but for what is set below: 20,000 steps, width 64, five seeds at one rate, all of the state's
coordinates rotating. Rivals learn with initial steps as released:

python experiments/state_tracking/sweep.py --config arithmetic
python experiments/state_tracking/sweep.py --config arithmetic --config.grid.models=gdn_negative \\
    --config.grid.initial_steps=0.001-0.1 --workdir runs/arithmetic_rivals

2026-11-28, one H200, three minutes each (docs/state_tracking.md): all five seeds of SISO are at 99 % or more, of Gated
DeltaNet in [-1, 1] three.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As mamba3_paper.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("mamba3_paper.py")))["get_config"]()
    config.grid.tasks = "modular_arithmetic:3"
    config.grid.models = "mamba3_siso"
    config.grid.widths = "64"
    config.grid.learning_rates = "2e-3"
    config.grid.seeds = 5
    config.grid.initial_steps = "0.1-1"
    config.model.rope_fraction = 1.0
    config.train.stages = ",".join(f"{longest}:800" for longest in range(40, 161, 5))
    return config
