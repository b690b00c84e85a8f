"""Gated DeltaNet, 440M: to compare with 440m_siso.py, whose recipe, width, depth and size it has.

Parameters: 446,750,080

python -m m3jax.train --config configs/440m_gdn.py

Mixer of arXiv 2412.06464, 8 heads with keys of 128 and values of 256, a state as large as Mamba-3's. MLP 1536 wide
instead of 2048: 0.84 % more parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 440m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("440m_siso.py")))["get_config"]()
    config.model.mixers = "gated_deltanet"
    config.model.gdn_heads = 8
    config.model.d_intermediate = 1536
    return config
