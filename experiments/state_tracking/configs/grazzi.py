"""The protocol of Grazzi et al. (arXiv 2411.12537, appendix E): trained on lengths 3 to 40, tested on 40 to 256.

Layers, width, learning rates, seeds, warm-up, weight decay, clipping and lengths are the paper's; batch and steps
those of their code for parity, which are 100,000 steps for arithmetic:

python experiments/state_tracking/sweep.py --config grazzi --tasks parity
python experiments/state_tracking/sweep.py --config grazzi --tasks modular_arithmetic modular_arithmetic_brackets \\
    --workdir runs/grazzi_arithmetic --config.train.stages=40:100000

Parity has been run, but for the Transformer (docs/state_tracking.md): Gated DeltaNet in [-1, 1] is at 97.1 in the
median, scaled, MIMO at 43.9, SISO at 22.1; 18 minutes of an H200.
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "parity:2,modular_arithmetic:3,modular_arithmetic_brackets:3"
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba3_no_rope,mamba2,gdn,gdn_negative,transformer"
    config.grid.widths = "128"
    config.grid.learning_rates = "1e-2,1e-3,5e-4,1e-4"
    config.grid.seeds = 3
    config.model.a_activation = "softplus"
    config.model.scan_layers = False  # on a GPU half as fast again as a loop, which copies what it keeps
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.final_learning_rate = 1e-6
    config.train.stages = "40:20000"
    config.train.array_lengths = "40"
    config.train.packed = True
    config.train.block_steps = 200
    config.train.matmul_precision = "tensorfloat32"
    config.evaluation.lengths = "40-256"
    return config
