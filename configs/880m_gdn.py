"""Gated DeltaNet, 880M: to compare with 880m_siso.py, whose recipe, width, depth and size it has.

Parameters: 892,190,784

python -m m3jax.train --config configs/880m_gdn.py

Mixer of arXiv 2412.06464, 12 heads with keys of 128 and values of 256, a state as large as Mamba-3's. MLP 2176 wide
instead of 3072: 0.07 % fewer parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 880m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("880m_siso.py")))["get_config"]()
    config.model.mixers = "gated_deltanet"
    config.model.gdn_heads = 12
    config.model.d_intermediate = 2176
    return config
