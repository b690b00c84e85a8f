"""Mamba-2, 440M: to compare with 440m_siso.py, whose recipe, width, depth and size it has.

Parameters: 440,780,032

python -m m3jax.train --config configs/440m_mamba2.py

Mixer of arXiv 2405.21060 with heads of 64 and a state of 128, as Mamba-3's. MLP 2048 wide as there: 0.50 % fewer
parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 440m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("440m_siso.py")))["get_config"]()
    config.model.mixers = "mamba2"
    return config
