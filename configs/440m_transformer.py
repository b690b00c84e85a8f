"""Transformer, 440M: to compare with 440m_siso.py, whose recipe, width, depth and size it has.

Parameters: 439,665,664

python -m m3jax.train --config configs/440m_transformer.py

Llama's attention with rotary positions, 16 heads of 64. MLP 2816 wide instead of 2048: 0.76 % fewer parameters. Data as
there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 440m_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("440m_siso.py")))["get_config"]()
    config.model.mixers = "attention"
    config.model.attention_heads = 16
    config.model.d_intermediate = 2816
    return config
