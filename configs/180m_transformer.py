"""Transformer, 180M: to compare with 180m_siso.py, whose recipe, width, depth and size it has.

Parameters: 186,993,408

python -m m3jax.train --config configs/180m_transformer.py

Llama's attention with rotary positions, 12 heads of 64. MLP 2176 wide instead of 1536: 0.08 % more parameters. Data as
there.

Run so far: on bytes with a small budget, beside the others of its size (docs/models.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 180m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("180m_siso.py")))["get_config"]()
    config.model.mixers = "attention"
    config.model.d_intermediate = 2176
    return config
