"""Loss by decode steps against the forward pass, on packed documents."""

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.config import ModelConfig
from m3jax.inference.stepwise import make_stepwise_eval
from m3jax.models.language_model import LanguageModel
from tests.tolerances import assert_close, rounding

CONFIG = ModelConfig(
    vocab_size=61, d_model=16, n_layers=2, mixers="mamba3, attention", d_intermediate=0, headdim=8, d_state=8,
    dtype="float32", attention_heads=4, attention_headdim=8,
)  # fmt: skip


def test_documents_start_from_nothing():
    model, rng = LanguageModel(CONFIG), np.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, 2, 11))
    batch = {"tokens": tokens, "targets": targets, "weights": rng.integers(0, 2, (2, 11)).astype(np.float32)}
    batch["segment_ids"] = np.stack([np.repeat([1, 2, 3], [5, 1, 5]), np.repeat([4, 0], [9, 2])])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    nll, n = make_stepwise_eval(model)(params, batch)
    logits = jax.jit(model.apply)({"params": params}, tokens, batch["segment_ids"])
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    assert n == batch["weights"].sum()
    assert_close(nll, -(log_p * batch["weights"]).sum(), rounding("float32", CONFIG.d_inner), "loss")
