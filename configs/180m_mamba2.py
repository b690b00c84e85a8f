"""Mamba-2, 180M: to compare with 180m_siso.py, whose recipe, width, depth and size it has.

Parameters: 186,161,760

python -m m3jax.train --config configs/180m_mamba2.py

Mixer of arXiv 2405.21060 with heads of 64 and a state of 128, as Mamba-3's. MLP 1536 wide as there: 0.37 % fewer
parameters. Data as there.

Run so far: on bytes with a small budget, beside the others of its size (docs/models.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 180m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("180m_siso.py")))["get_config"]()
    config.model.mixers = "mamba2"
    return config
