"""Mamba-3 SISO, 1.5B: the paper's language model and recipe (arXiv 2603.15569, section 4.1).

Parameters: 1,494,723,584

python -m m3jax.train --config configs/1b_siso.py

trains on the bundled text, so that it runs anywhere. The paper's data (100B tokens, 190,735 steps of 524,288) are

    --config.data.source=hf:HuggingFaceFW/fineweb-edu --config.data.tokenizer=meta-llama/Llama-3.1-8B

One device takes a step's 256 sequences in 32 parts of 8; set train.grad_accumulation to what fits.

Run so far: 15 steps of 8 sequences on one H200, 55.9k tokens/s, 52.2 % MFU, 51 GB (docs/performance.md).
"""

from ml_collections import ConfigDict

from m3jax.config import default_config


def get_config() -> ConfigDict:
    """The run; every other key has the default of m3jax/config.py."""
    config = default_config()
    config.model.d_model = 2048
    config.model.n_layers = 24
    config.model.d_intermediate = 4096
    config.model.pad_vocab_multiple = 16  # as the released 1.5B models
    config.model.remat = "dots"
    config.model.scan_layers = False
    config.optimizer.learning_rate = 1e-3
    config.train.grad_accumulation = 32
    config.train.loss_chunk = 4096
    return config
