"""The Mamba-3 paper's protocol (arXiv 2603.15569, appendix D): a curriculum from length 40 to 160, test at 256.

The paper states tasks, layers, d_model, state width, learning rates, batch, steps, curriculum and test length. It
does not state the rest; here: AdamW with betas 0.9 and 0.95, weight decay 0.1, clipping at 1, 5 % warm-up, cosine to
1e-6, no MLP, no token before the sequence, half of the state's coordinates rotating, heads of width 64, decay rates
by softplus as in the first released code, labels smoothed by 0.05, 25 stages of 400 steps. Every model is trained with
initial step sizes as released and of 0.1 to 1: a token turns the state of Mamba-3 by π times its own at most, and
decays that of the others by as much more. Its figures are the best of 16 runs; ours stand
beside a median of seeds with --config.grid.seeds=5. Arithmetic lengths are odd: 256 is 255.

python experiments/state_tracking/sweep.py --config mamba3_paper

Run so far (docs/state_tracking.md): everything with the range of initial steps that suits each model, by two
commands; modular_arithmetic at width 64 with five seeds, too.
"""

import numpy as np
from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "parity:1,modular_arithmetic:3,modular_arithmetic_brackets:3"
    config.grid.models = "mamba3_siso,mamba3_standard_rope,mamba3_no_rope,mamba2,gdn_negative"
    config.grid.widths = "32,64"
    config.grid.learning_rates = ",".join(f"{rate:.3g}" for rate in np.geomspace(1e-4, 1e-2, 8))
    config.grid.initial_steps = "0.001-0.1,0.1-1"
    config.model.a_activation = "softplus"
    config.model.scan_layers = False  # on a GPU half as fast again as a loop, which copies what it keeps
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.final_learning_rate = 1e-6
    config.train.stages = ",".join(f"{longest}:400" for longest in range(40, 161, 5))
    config.train.array_lengths = "80,160"
    config.train.label_smoothing = 0.05
    config.train.packed = True
    config.train.block_steps = 200
    config.train.matmul_precision = "tensorfloat32"
    return config
