"""A small run: text made on the spot, a config that trains in seconds, and a model that compiles at once."""

import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from m3jax import evaluate
from m3jax.config import build_config, config_to_dict, default_config, override
from m3jax.training import checkpoint, loop

SMALL = {
    "model.vocab_size": 258,
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.d_intermediate": 64,
    "model.headdim": 16,
    "model.d_state": 16,
    "model.dtype": "float32",
    "model.remat": "none",
    "data.sequence_length": 32,
    "data.batch_size": 8,
    "train.steps": 10,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.loss_chunk": 64,
    "optimizer.warmup_fraction": 0.2,
    "checkpoint.every": 5,
    "mesh.data": 1,
}


class SmallModel(nn.Module):
    """Stands in for LanguageModel where what is tested is around the model: same interface, one matrix per layer."""

    config: object

    def setup(self):
        m = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (m.padded_vocab_size, m.d_model), jnp.dtype(m.param_dtype))
        self.layers = _Layers(m)
        self.norm = nn.RMSNorm()

    def __call__(self, tokens):
        return self.hidden(tokens, None) @ self.embedding.T

    def hidden(self, tokens, segment_ids):
        return self.norm(self.layers(self.embedding[tokens]))


class _Layers(nn.Module):
    config: object

    @nn.compact
    def __call__(self, x):
        m = self.config
        kernels = self.param("kernel", nn.initializers.lecun_normal(), (m.n_layers, m.d_model, m.d_model))
        for layer in range(m.n_layers):
            x = x + jnp.tanh(x @ kernels[layer])
        return x


def use_small_model(patch):
    """Makes training, checkpoints and evaluation build SmallModel."""
    for module in (loop, checkpoint, evaluate):
        patch.setattr(module, "LanguageModel", SmallModel)


@pytest.fixture
def small_model(monkeypatch):
    use_small_model(monkeypatch)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text with something to learn: words of a vocabulary of 40."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghij", k=choose.randint(2, 7))) for _ in range(40)]
    lines = (" ".join(choose.choices(words, k=10)) for _ in range(1500))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without XLA's expensive passes: what is tested here is around the model, and runs for a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def small_config(text_file, tmp_path_factory):
    """Builds the small config with changes given as {"a.b": value}."""
    cache = tmp_path_factory.getbasetemp() / "token_cache"

    def build(changes=None):
        values = SMALL | {"data.source": str(text_file), "data.cache_dir": str(cache)} | (changes or {})
        return build_config(override(default_config().to_dict(), values))

    return build


def config_file(path, config):
    """Writes a config file whose get_config() returns `config`."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config_to_dict(config)!r})\n"
    )
    return path
