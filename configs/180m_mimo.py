"""Mamba-3 MIMO rank 4, 180M: the paper's language model and recipe (arXiv 2603.15569, section 4.1).

Parameters: 187,291,968

python -m m3jax.train --config configs/180m_mimo.py

trains on the bundled text, so that it runs anywhere. The paper's data (100B tokens, 190,735 steps of 524,288) are

    --config.data.source=hf:HuggingFaceFW/fineweb-edu --config.data.tokenizer=meta-llama/Llama-3.1-8B

One device takes a step's 256 sequences in 8 parts of 32; set train.grad_accumulation to what fits.

Record, one H200, 2026-11-22, 7 min 33 s at 34.8k tokens/s: 225 steps of 32 sequences on 120 MB of program source and
documentation, a byte-level BPE of 32,768 tokens trained on an eighth of it:

    python -m m3jax.train --config configs/180m_mimo.py --config.data.source='corpus/*.jsonl'
        --config.data.tokenizer=tokenizer.json --config.data.batch_size=32 --config.train.grad_accumulation=4
        --config.train.steps=225 --config.optimizer.warmup_fraction=0.09 --config.optimizer.learning_rate=1.5e-3
        --config.train.eval_every=75 --config.train.eval_batches=4 --config.train.log_every=5

    step              5     25     50     75    100    125    150    175    200    225
    training loss  10.21   6.43   5.05   5.05   4.48   4.17   3.99   3.72   3.63   3.62
    held-out loss                        5.03                 4.31                 4.10  (1.738 bits per byte)

docs/images/180m_mimo.png has the curve.
"""

from ml_collections import ConfigDict

from m3jax.config import default_config


def get_config() -> ConfigDict:
    """The run; every other key has the default of m3jax/config.py."""
    config = default_config()
    config.model.d_model = 768
    config.model.n_layers = 12
    config.model.d_intermediate = 1264
    config.model.mimo_rank = 4
    config.optimizer.learning_rate = 3e-3
    config.train.grad_accumulation = 8
    return config
