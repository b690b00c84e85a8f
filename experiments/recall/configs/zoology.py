"""Multi-query associative recall as HazyResearch/zoology sweeps it (original_mqar_configs.py): mixed lengths and pairs.

Theirs are the task, the mixture, test lengths, vocabulary of 8,192, two layers without MLP, batch, learning rates,
weight decay, cosine without warm-up, the optimizer's betas and the number of steps: 32 epochs of 180,000 sequences are
22,624 of theirs (100,000 with 4 pairs, 20,000 with each other number) and 22,680 here. Different here:

- Every step draws fresh sequences; theirs come again in every epoch.
- Lengths take turns, five of nine steps with 4 pairs; theirs go through an epoch from the shortest to the longest.
- The learning rate falls with every step, not every epoch. Gradients are clipped at a norm of 1.
- A model ends once all seeds of one learning rate are right in 99 % of their training answers; theirs, once a run
  is in 99 % of its test answers. (Fresh sequences are as unknown as those of a test.)
- Heads of width 64, four at d_model = 128, in all models.

python experiments/recall/sweep.py --config zoology

Run so far: all models at one rate, and shorter forms (docs/recall.md).
"""

import numpy as np
from ml_collections import ConfigDict

from m3jax.studies.config import default_study


def get_config() -> ConfigDict:
    """The study; every other key has the default of m3jax/studies/config.py."""
    config = default_study()
    config.grid.tasks = "mqar:2"
    config.grid.models = (
        "mamba3_siso@64,mamba3_siso@128,mamba3_mimo@64,mamba3_mimo@128,mamba2@128,gdn@64,hybrid@64,transformer"
    )
    config.grid.widths = "128"
    config.grid.learning_rates = ",".join(f"{rate:.3g}" for rate in np.logspace(-3, -1.5, 4))
    config.grid.seeds = 3
    config.optimizer.beta2 = 0.999
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.final_learning_rate = 0.0
    config.train.stages = "64/4 128/8 64/4 256/16 64/4 256/32 64/4 256/64 64/4:22680"
    config.train.shortest = 0
    config.train.array_lengths = "64,128,256"
    config.train.block_steps = 180
    config.train.stop_accuracy = 0.99
    config.train.runs_at_once = 4
    config.train.matmul_precision = "tensorfloat32"
    config.train.save_seconds = 120.0
    config.evaluation.lengths = "64/4,64/8,64/16,128/32,256/64,512/128,1024/256"
    config.evaluation.sequences = 1000
    return config
