"""Recall in minutes on two CPU cores: four pairs in 16 tokens, 64 tokens in all.

Two layers of width 64 and one recipe for all models; what each finds within 800 steps differs. Tested with as many
pairs as in training, and with more of them in longer sequences.

python experiments/recall/sweep.py --config quick

Two CPU cores, 2026-11-26, 2:36: of 16/4 the models with attention answer 99 % and more, Mamba-3 SISO 46 %, Mamba-2 42 %
(docs/recall.md).
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "mqar_few:2"
    config.grid.models = "mamba3_siso,mamba2,hybrid,transformer"
    config.grid.widths = "64"
    config.grid.learning_rates = "1e-2"
    config.grid.seeds = 2
    config.model.expand = 1
    config.model.headdim = 32
    config.model.d_state = 32
    config.optimizer.warmup_fraction = 0.1
    config.train.stages = "16/2:200,16/4:600"
    config.train.shortest = 0
    config.train.array_lengths = "16"
    config.train.batch_size = 64
    config.train.block_steps = 100
    config.evaluation.lengths = "16/2,16/4,32/8,64/16"
    config.evaluation.sequences = 1024
    return config
