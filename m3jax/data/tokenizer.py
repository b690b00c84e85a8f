"""Tokenizers: plain bytes, and any Hugging Face tokenizer.json from a file or the hub.

A document becomes bos + tokens + eos. Text is always text: the name of a special token inside a document or a prompt is
tokenised as the characters it is made of.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import tokenizers

from m3jax.config import Config
from m3jax.errors import ConfigError, DataError

_BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<bos>", "<s>", "[BOS]", "[CLS]")
_EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "<|eos|>", "<eos>", "</s>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the data pipeline, evaluation and generation need of a tokenizer.

    Attributes:
      name: what the user called it, for messages.
      id: identifies its contents; equal ids give equal tokens. Stored with checkpoints and token shards.
      json_text: the tokenizer.json, from which `load_tokenizer` rebuilds it anywhere; None when no file is needed.
      vocab_size: every token id is below it.
      bos_id: begins every document; None = the tokenizer has no such token.
      eos_id: ends every document; None = the tokenizer has no such token.
      adds_bos: whether other programs that use it put bos in front of a text.
    """

    name: str
    id: str
    json_text: str | None
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of a text, int32 [n], without bos and eos."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, as `encode` does, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, then bos and eos."""

    name = "bytes"
    id = "bytes"
    json_text = None
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    adds_bos = True

    def encode(self, text: str) -> np.ndarray:
        """Returns the bytes of the text, int32 [n]."""
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids, bos and eos left out."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    def __init__(self, name: str, json_text: str):
        """Builds it.

        Args:
          name: where the text comes from, for messages.
          json_text: the contents of the tokenizer.json.

        Raises:
          DataError: it is not one.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"Tokenizer {name}: not a tokenizer.json ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"Tokenizer {name}: its vocabulary is empty.")
        self.name = name
        self.id = f"sha256:{hashlib.sha256(json_text.encode()).hexdigest()[:16]}"
        self.json_text = json_text
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _first_present(_EOS_NAMES, vocabulary)
        # Where one token serves as both (GPT-2's <|endoftext|>) it also begins each document.
        bos_id = _first_present(_BOS_NAMES, vocabulary)
        self.bos_id = self.eos_id if bos_id is None else bos_id
        self.adds_bos = self.bos_id is not None and self._tokenizer.encode("").ids[:1] == [self.bos_id]

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of a text, int32 [n]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, computed in parallel."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; special tokens and ids outside the vocabulary are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(name: str, json_text: str | None = None) -> Tokenizer:
    """Returns a tokenizer.

    Args:
      name: "bytes", the path of a tokenizer.json or of a folder that holds one, or a name on the Hugging Face hub.
      json_text: the tokenizer.json itself, as stored with a checkpoint; `name` is then only a name.

    Raises:
      DataError: no such file or hub name, no network, or not a tokenizer.json.
    """
    if name == "bytes":
        return ByteTokenizer()
    return JsonTokenizer(name, _read_json(name) if json_text is None else json_text)


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raises ConfigError when the tokenizer makes ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {config.model.vocab_size}: expected at least {tokenizer.vocab_size}, "
            f"the vocabulary of config.data.tokenizer = {tokenizer.name!r}."
        )


def _first_present(names: tuple[str, ...], vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _read_json(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.suffix == ".json" or path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Tokenizer {path}: {getattr(error, 'strerror', None) or error}.") from error
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json")).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"Tokenizer {name!r}: no such file or folder here, and the Hugging Face hub did not give its "
            f"tokenizer.json ({type(error).__name__}: {_first_line(error)}). Without a network, set "
            "config.data.tokenizer to the path of a tokenizer.json, or to 'bytes'."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
