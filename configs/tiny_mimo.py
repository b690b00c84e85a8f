"""Mamba-3 MIMO rank 2, tiny: bytes of the bundled text, for two CPU cores and a few minutes.

Parameters: 693,872

python -m m3jax.train --config configs/tiny_mimo.py

Record, two CPU cores (AMD EPYC), 2026-11-26, 3:33 by `make train`, seed 0:

    step                 20     60    100    140    180    220    260    300    340    360
    training loss      2.58   1.99   1.82   1.65   1.59   1.45   1.38   1.47   1.38   1.39
    held-out loss                                 1.670                               1.501   (2.1673 bits per byte)

docs/images/tiny_mimo.png has the curve.
"""

from ml_collections import ConfigDict

from m3jax.config import default_config


def get_config() -> ConfigDict:
    """The run; every other key has the default of m3jax/config.py."""
    config = default_config()
    config.model.vocab_size = 258
    config.model.d_model = 128
    config.model.n_layers = 3
    config.model.d_intermediate = 256
    config.model.headdim = 32
    config.model.d_state = 32
    config.model.mimo_rank = 2
    config.model.chunk_size = 16  # a CPU's caches like smaller chunks than a GPU does
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.sequence_length = 256
    config.data.batch_size = 8
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_fraction = 0.05
    config.train.steps = 360
    config.train.log_every = 20
    config.train.eval_every = 180
    config.train.eval_batches = 0
    config.checkpoint.every = 180
    return config
