"""Hybrid of Mamba-3 and attention, 180M: to compare with 180m_siso.py, whose recipe, width, depth and size it has.

Parameters: 187,478,752

python -m m3jax.train --config configs/180m_hybrid.py

Five SISO layers with a norm before the gate to one of attention without positions (arXiv 2603.15569, Table 4), with the
heads of 180m_transformer.py. MLP 1664 wide instead of 1536: 0.34 % more parameters. Data as there.

Run so far: on bytes with a small budget, beside the others of its size (docs/models.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 180m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("180m_siso.py")))["get_config"]()
    config.model.mixers = "mamba3, mamba3, mamba3, mamba3, mamba3, attention"
    config.model.outproj_norm = True
    config.model.rope_theta = 0.0
    config.model.d_intermediate = 1664
    return config
