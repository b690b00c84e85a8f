"""Gated DeltaNet, 1.5B: to compare with 1b_siso.py, whose recipe, width, depth and size it has.

Parameters: 1,485,677,312

python -m m3jax.train --config configs/1b_gdn.py

Mixer of arXiv 2412.06464, 16 heads with keys of 128 and values of 256, a state as large as Mamba-3's. MLP 2816 wide
instead of 4096: 0.61 % fewer parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 1b_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("1b_siso.py")))["get_config"]()
    config.model.mixers = "gated_deltanet"
    config.model.gdn_heads = 16
    config.model.d_intermediate = 2816
    return config
