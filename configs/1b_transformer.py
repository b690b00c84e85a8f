"""Transformer, 1.5B: to compare with 1b_siso.py, whose recipe, width, depth and size it has.

Parameters: 1,495,894,016

python -m m3jax.train --config configs/1b_transformer.py

Llama's attention with rotary positions, 32 heads of 64 and 8 of keys and values, as in Llama 3.2 1B. MLP 6656 wide
instead of 4096: 0.08 % more parameters. Data as there.

Not run yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As 1b_siso.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("1b_siso.py")))["get_config"]()
    config.model.mixers = "attention"
    config.model.attention_heads = 32
    config.model.attention_kv_heads = 8
    config.model.d_intermediate = 6656
    return config
