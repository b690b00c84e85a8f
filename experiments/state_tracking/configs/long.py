"""How far trained models reach: the paper's curriculum to length 160, tested at lengths up to 4,096.

A longer curriculum, for instance to 512, is the same command with
--config.train.stages=40:2000,80:2000,160:2000,320:2000,512:4000 --config.train.array_lengths=80,160,320,512
and another --workdir.

python experiments/state_tracking/sweep.py --config long

Not run yet.
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "parity:1,modular_arithmetic:3"
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba2,gdn_negative,transformer"
    config.grid.widths = "64"
    config.grid.learning_rates = "1e-3,3e-3"
    config.grid.seeds = 5
    config.model.a_activation = "softplus"
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.final_learning_rate = 1e-6
    config.train.stages = ",".join(f"{longest}:400" for longest in range(40, 161, 5))
    config.train.array_lengths = "80,160"
    config.train.block_steps = 200
    config.evaluation.lengths = "64,128,256,512,1024,2048,4096"
    config.evaluation.sequences = 1024
    return config
