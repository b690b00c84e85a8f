"""Parity far out: trained on lengths 3 to 4, 6, 8, ... 1024, tested at lengths up to 4,096.

The recipe and the sizes of parity_quick.py, with more steps, a longer curriculum, more learning rates and the rivals:
4,600 to 4,900 parameters, one head with a state of 16 x 32.

python experiments/state_tracking/sweep.py --config long

One H100, 2026-11-26, five seeds (docs/state_tracking.md, docs/measurements/parity_long.json): Mamba-3 SISO 100 % right
at 1,024 in the median, 61.6 % at 2,048; Gated DeltaNet with negative eigenvalues 99.4 and 91.9 %; the other three
models of that run, in which Mamba-2 and MIMO did not finish, at chance. An earlier trainer, which drew other batches.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As parity_quick.py but for the keys that are set here."""
    config = runpy.run_path(str(Path(__file__).with_name("parity_quick.py")))["get_config"]()
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba3_standard_rope,mamba3_no_rope,mamba2,gdn,gdn_negative"
    config.grid.learning_rates = "1e-3,2e-3,3e-3"
    config.train.stages = "4:300,6:300,8:400,12:400,16:400,24:300,32:300,48:300,64:300,128:800,256:700,512:700,1024:800"
    config.train.array_lengths = "16,64,256,1024"
    config.train.batch_size = 64
    config.train.block_steps = 100
    config.evaluation.lengths = "256,512,1024,2048,4096"
    return config
