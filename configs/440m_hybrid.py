"""Hybrid of Mamba-3 and attention, 440M: to compare with 440m_siso.py, whose recipe, width, depth and size it has.

Parameters: 442,498,304

python -m m3jax.train --config configs/440m_hybrid.py

Five SISO layers with a norm before the gate to one of attention without positions (arXiv 2603.15569, Table 4), with the
heads of 440m_transformer.py. MLP 2176 wide instead of 2048: 0.12 % fewer parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 440m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("440m_siso.py")))["get_config"]()
    config.model.mixers = "mamba3, mamba3, mamba3, mamba3, mamba3, attention"
    config.model.outproj_norm = True
    config.model.rope_theta = 0.0
    config.model.attention_heads = 16
    config.model.d_intermediate = 2176
    return config
