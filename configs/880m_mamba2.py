"""Mamba-2, 880M: to compare with 880m_siso.py, whose recipe, width, depth and size it has.

Parameters: 888,236,928

python -m m3jax.train --config configs/880m_mamba2.py

Mixer of arXiv 2405.21060 with heads of 64 and a state of 128, as Mamba-3's. MLP 3072 wide as there: 0.51 % fewer
parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 880m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("880m_siso.py")))["get_config"]()
    config.model.mixers = "mamba2"
    return config
