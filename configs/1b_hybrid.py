"""Hybrid of Mamba-3 and attention, 1.5B: to compare with 1b_siso.py, whose recipe, width, depth and size it has.

Parameters: 1,488,709,120

python -m m3jax.train --config configs/1b_hybrid.py

Five SISO layers with a norm before the gate to one of attention without positions (arXiv 2603.15569, Table 4), with the
heads of 1b_transformer.py. MLP 4480 wide instead of 4096: 0.40 % fewer parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 1b_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("1b_siso.py")))["get_config"]()
    config.model.mixers = "mamba3, mamba3, mamba3, mamba3, mamba3, attention"
    config.model.outproj_norm = True
    config.model.rope_theta = 0.0
    config.model.attention_heads = 32
    config.model.attention_kv_heads = 8
    config.model.d_intermediate = 4480
    return config
