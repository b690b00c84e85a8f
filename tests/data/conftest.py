"""Fixtures of the data tests: small configs with their own cache, a small tokenizer.json, corpora in files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m3jax.config import Config, build_config


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Returns build_config with small defaults; keyword arguments are fields of config.data, vocab_size the model's."""

    def make(vocab_size: int = 258, **data) -> Config:
        defaults = {"sequence_length": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        return build_config({"model": {"vocab_size": vocab_size}, "data": defaults | data})

    return make


@pytest.fixture
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    def write(path: Path, texts: list[str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[[list[str]], str]:
    """Returns a function that makes the tokenizer.json of a small byte-level BPE with the given special tokens."""

    def train(special_tokens: list[str]) -> str:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["the earth and the heaven and the waters\n" * 20], trainer)
        return tokenizer.to_str()

    return train


@pytest.fixture
def bpe_file(tmp_path: Path, train_tokenizer) -> Path:
    path = tmp_path / "bpe" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(train_tokenizer(["<|begin_of_text|>", "<|end_of_text|>"]))
    return path
