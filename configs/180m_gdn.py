"""Gated DeltaNet, 180M: to compare with 180m_siso.py, whose recipe, width, depth and size it has.

Parameters: 187,254,672

python -m m3jax.train --config configs/180m_gdn.py

Mixer of arXiv 2412.06464, 6 heads with keys of 128 and values of 256, a state as large as Mamba-3's. MLP 1152 wide
instead of 1536: 0.22 % more parameters. Data as there.

Run so far: on bytes with a small budget, beside the others of its size (docs/models.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 180m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("180m_siso.py")))["get_config"]()
    config.model.mixers = "gated_deltanet"
    config.model.gdn_heads = 6
    config.model.d_intermediate = 1152
    return config
