"""Parity far out: trained on lengths 3 to 4, 6, 8, ... 1024, tested at lengths up to 4,096.

The recipe and the sizes of parity_quick.py, with more steps, a longer curriculum, more learning rates and the rivals:
4,600 to 4,900 parameters, one head with a state of 16 x 32.

python experiments/state_tracking/sweep.py --config long

One H100, 2026-11-26, five seeds (docs/state_tracking.md, docs/measurements/parity_long.json): Mamba-3 SISO 100 % right
at 1,024 in the median, 61.6 % at 2,048; Gated DeltaNet with negative eigenvalues 99.4 and 91.9 %; the other three
models of that run, in which Mamba-2 and MIMO did not finish, at chance.
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba3_standard_rope,mamba3_no_rope,mamba2,gdn,gdn_negative"
    config.grid.widths = "32"
    config.grid.learning_rates = "1e-3,2e-3,3e-3"
    config.grid.seeds = 5
    config.model.expand = 1
    config.model.headdim = 32
    config.model.d_state = 16
    config.model.rope_fraction = 1.0
    config.model.a_activation = "softplus"
    config.model.dt_min = 0.5
    config.model.dt_max = 2.0
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.weight_decay = 0.0
    config.train.stages = "4:300,6:300,8:400,12:400,16:400,24:300,32:300,48:300,64:300,128:800,256:700,512:700,1024:800"
    config.train.array_lengths = "16,64,256,1024"
    config.train.batch_size = 64
    config.train.block_steps = 100
    config.evaluation.lengths = "256,512,1024,2048,4096"
    config.evaluation.sequences = 1024
    return config
