"""Mamba-3 SISO, 180M: the paper's language model and recipe (arXiv 2603.15569, section 4.1).

Parameters: 186,849,600

python -m m3jax.train --config configs/180m_siso.py

trains on the bundled text, so that it runs anywhere. The paper's data (100B tokens, 190,735 steps of 524,288) are

    --config.data.source=hf:HuggingFaceFW/fineweb-edu --config.data.tokenizer=meta-llama/Llama-3.1-8B

One device takes a step's 256 sequences in 8 parts of 32; set train.grad_accumulation to what fits.

Run so far: on bytes with a small budget, beside the others of its size (docs/models.md).
"""

from ml_collections import ConfigDict

from m3jax.config import default_config


def get_config() -> ConfigDict:
    """The run; every other key has the default of m3jax/config.py."""
    config = default_config()
    config.model.d_model = 768
    config.model.n_layers = 12
    config.model.d_intermediate = 1500
    config.optimizer.learning_rate = 3e-3
    config.train.grad_accumulation = 8
    return config
