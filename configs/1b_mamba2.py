"""Mamba-2, 1.5B: to compare with 1b_siso.py, whose recipe, width, depth and size it has.

Parameters: 1,487,081,984

python -m m3jax.train --config configs/1b_mamba2.py

Mixer of arXiv 2405.21060 with heads of 64 and a state of 128, as Mamba-3's. MLP 4096 wide as there: 0.51 % fewer
parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 1b_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("1b_siso.py")))["get_config"]()
    config.model.mixers = "mamba2"
    return config
