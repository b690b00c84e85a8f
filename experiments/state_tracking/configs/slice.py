"""The protocol of SLiCE and PD-SSM (arXiv 2509.22284): one recipe for all models, five seeds, raw accuracy.

Two layers of width 128, batch 256, 100,000 steps, learning rate 2e-3, 10 % warm-up, cosine to 1e-5, weight decay
0.01, trained on lengths 3 to 40, tested on 40 to 256. Their lengths of parity and modular arithmetic do not count the
answer, those of these tasks do; the shift by one lets one digit alone through, which their arithmetic does not have.
They do not decay the embedding. As there, runs are measured every 5,000 steps on validation sequences as long as the
test's, and keep what was best; all end when those of a learning rate have come to 0.9995 (theirs one by one).

python experiments/state_tracking/sweep.py --config slice

Run so far: mamba3_siso and gdn_negative with recipes of their own for each task (docs/state_tracking.md).
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "cycle_navigation:2,even_pairs:2,modular_arithmetic:2,parity:2"
    config.grid.models = "mamba3_siso,mamba3_mimo,mamba2,gdn_negative,transformer"
    config.grid.widths = "128"
    config.grid.learning_rates = "2e-3"
    config.grid.seeds = 5
    config.grid.length_shifts = "parity:1,modular_arithmetic:1"
    config.model.a_activation = "softplus"
    config.model.scan_layers = False  # on a GPU half as fast again as a loop, which copies what it keeps
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.weight_decay = 0.01
    config.train.stages = "40:100000"
    config.train.array_lengths = "40"
    config.train.packed = True
    config.train.block_steps = 200
    config.train.validate_every = 5000
    config.train.stop_accuracy = 0.9995
    config.train.matmul_precision = "tensorfloat32"
    config.evaluation.lengths = "40-256"
    return config
