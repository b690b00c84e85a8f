"""Parity in minutes on two CPU cores: Mamba-3 learns it, without its rotation it stays at chance.

One layer of width 32 with one head, trained on lengths from 3 to at most 4, 6, 8, ... 40, tested at many times that.
Initial step sizes are near 1, where a token can turn the state by π at all; decay rates are by softplus, which reaches
slow decay sooner than the heavy tail; no weight decay. Labels are smoothed: the loss of a right answer then goes on
telling a turn of almost π from π, where without it vanishes with the error, and Adam's steps become noise. The learning
rate stays at its peak for most of the steps at 40, and falls over the last 30 %.

python experiments/state_tracking/sweep.py --config parity_quick

Two CPU cores, 2026-11-26, five seeds (docs/measurements/parity_quick.json): Mamba-3 100 % right at 40 and 256 with
each, at 512 with three (median 100 %); without rotation 48 to 51 % everywhere. 3:44 with compilation. With
--models mamba3_siso --config.grid.seeds=10 all ten are 100 % right at 256.
"""

from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.models = "mamba3_siso,mamba3_no_rope"
    config.grid.widths = "32"
    config.grid.learning_rates = "2e-3"
    config.grid.seeds = 5
    config.model.expand = 1
    config.model.headdim = 32
    config.model.d_state = 16
    config.model.rope_fraction = 1.0
    config.model.a_activation = "softplus"
    config.model.dt_min = 0.5
    config.model.dt_max = 2.0
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.3
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.weight_decay = 0.0
    config.train.stages = "4:200,6:150,8:100,12:100,16:150,24:100,32:200,40:4000"
    config.train.array_lengths = "16,40"
    config.train.batch_size = 32
    config.train.block_steps = 50
    config.train.label_smoothing = 0.1
    config.evaluation.lengths = "40,256,512,1024"
    config.evaluation.sequences = 1024
    return config
