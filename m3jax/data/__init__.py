"""Data: text or tokens in, batches of packed windows out. docs/data.md is the user's page."""

from m3jax.data.pipeline import HeldOut, TrainIterator, open_train, open_validation
from m3jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "HeldOut",
    "Tokenizer",
    "TrainIterator",
    "check_vocabulary",
    "load_tokenizer",
    "open_train",
    "open_validation",
]
