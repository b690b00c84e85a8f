"""Parity far out: trained on lengths 3 to 4, 6, 8, ... 4096, tested at lengths up to 16,384.

The model and the smoothed labels of parity_quick.py, a longer curriculum along which the learning rate falls, more
learning rates and the rivals: 4,578 to 4,834 parameters (MIMO 8,386), one head with a state of 16 x 32.

python experiments/state_tracking/sweep.py --config long

2026-11-27 and 28, five seeds, median at 4,096 (docs/state_tracking.md): SISO and Gated DeltaNet in [-1, 1] 100 % right,
MIMO 65, all others 50, one to three minutes of a GPU for a model.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As parity_quick.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("parity_quick.py")))["get_config"]()
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba3_standard_rope,mamba3_no_rope,mamba2,gdn,gdn_negative"
    config.grid.learning_rates = "5e-4,1e-3,2e-3"
    config.optimizer.schedule = "cosine"  # what is learned at short lengths is lost at long ones at a high rate
    short = "4:300,6:300,8:400,12:400,16:400,24:300,32:300,48:300,64:300"
    config.train.stages = short + ",128:600,256:600,512:600,1024:600,2048:600,4096:1000"
    config.train.array_lengths = "16,64,256,1024,4096"
    config.train.batch_size = 64
    config.train.block_steps = 100
    config.evaluation.lengths = "256,1024,2048,4096,16384"
    return config
