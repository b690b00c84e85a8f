"""The training and the held-out part of config.data as token streams."""

from dataclasses import dataclass
from pathlib import Path

from m3jax.config import Config, DataConfig
from m3jax.data.corpus import Part, open_text_source
from m3jax.data.huggingface import HELD_OUT_DOCUMENTS, HuggingFaceText
from m3jax.data.shards import META_FILE, TokenStream
from m3jax.data.tokenise import cached_tokens
from m3jax.data.tokenizer import Tokenizer, check_vocabulary
from m3jax.errors import ConfigError, DataError

_TOKENS_PREFIX = "tokens:"
_STREAM_PREFIX = "hf:"


@dataclass(frozen=True)
class TokenPart:
    """The tokens [begin, end) of a stream."""

    name: str
    stream: TokenStream
    begin: int
    end: int
    text_bytes: int | None  # UTF-8 bytes of the text behind the tokens, if known

    @property
    def n_predicted(self) -> int:
        """Tokens that have a token of their own document before them."""
        inside = len(self.stream.document_starts(self.begin + 1, self.end))
        return max(self.end - self.begin - 1, 0) - inside


def open_part(config: Config, tokenizer: Tokenizer, part: Part) -> TokenPart:
    """Opens a part of config.data, tokenising text into the cache the first time.

    Args:
      config: the run's configuration.
      tokenizer: must be the one that made the shards, if those say which.
      part: "train" (not for hf: sources, which are streamed) or "validation".

    Raises:
      DataError: a source that is missing, empty, damaged or made with another tokenizer; token ids that the model has
        no embedding for.
      ConfigError: a vocabulary smaller than the tokenizer's; a held-out part that the config does not ask for.
    """
    data, holdout = config.data, config.data.holdout
    source = data.source
    if data.validation_source is not None:
        holdout = 0.0
        source = data.validation_source if part == "validation" else source
    if not source.startswith(_TOKENS_PREFIX):
        check_vocabulary(tokenizer, config)
        _require_held_out(data, part, holdout)
        directory = _tokenised(source, data, tokenizer, holdout)
    else:
        directory = Path(source.removeprefix(_TOKENS_PREFIX)).expanduser()
    found = _open_directory(source, directory, data, part, holdout)
    recorded = found.stream.meta.tokenizer
    if recorded is not None:
        check_vocabulary(tokenizer, config)
        if recorded != tokenizer.id:
            raise DataError(
                f"{found.stream.directory / META_FILE}: these shards were made with tokenizer {recorded}, but "
                f"config.data.tokenizer = {tokenizer.name!r} is {tokenizer.id}."
            )
    found.stream.check_ids(config.model.vocab_size)
    return found


def streamed_source(config: Config) -> tuple[HuggingFaceText, int] | None:
    """Returns the data set to stream training text from and the number of held-out documents at its beginning."""
    data = config.data
    if not data.source.startswith(_STREAM_PREFIX):
        return None
    skip = HELD_OUT_DOCUMENTS if data.validation_source is None and data.holdout > 0 else 0
    return HuggingFaceText(data.source, data), skip


def cache_dir(data: DataConfig) -> Path:
    """Returns the folder for tokenised text and for what is known of shards."""
    return Path(data.cache_dir or "~/.cache/m3jax").expanduser()


def _tokenised(source: str, data: DataConfig, tokenizer: Tokenizer, holdout: float) -> Path:
    if source.startswith(_STREAM_PREFIX) and holdout > 0:
        text = HuggingFaceText(source, data, limit=HELD_OUT_DOCUMENTS)
        return cached_tokens(text, tokenizer, 0.0, cache_dir(data))
    return cached_tokens(open_text_source(source, data), tokenizer, holdout, cache_dir(data))


def _open_directory(source: str, directory: Path, data: DataConfig, part: Part, holdout: float) -> TokenPart:
    if (directory / "train").is_dir():
        stream = TokenStream(directory / part, cache_dir(data))
        return _whole(source, stream)
    stream = TokenStream(directory, cache_dir(data))
    if holdout == 0 or source.startswith(_STREAM_PREFIX):
        _require_held_out(data, part, holdout)
        return _whole(source, stream)
    cut = _cut(stream, holdout)
    begin, end = (0, cut) if part == "train" else (cut, len(stream))
    if begin == end:
        raise DataError(
            f"{directory}: config.data.holdout = {holdout} of {len(stream)} tokens leaves an empty {part} part."
        )
    return TokenPart(source, stream, begin, end, None)


def _whole(source: str, stream: TokenStream) -> TokenPart:
    # Without a bos the first token of a document is never predicted, so some bytes are not accounted for.
    text_bytes = None if stream.meta.bos_id is None else stream.meta.text_bytes
    return TokenPart(source, stream, 0, len(stream), text_bytes)


def _cut(stream: TokenStream, holdout: float) -> int:
    """Returns where the last `holdout` of the tokens begin: at a document, if that leaves half of them or more."""
    span = int(len(stream) * holdout)
    cut = len(stream) - span
    starts = stream.document_starts(cut, len(stream) - -(-span // 2) + 1)
    return int(starts[0]) if len(starts) else cut


def _require_held_out(data: DataConfig, part: Part, holdout: float) -> None:
    if part == "validation" and holdout == 0 and data.validation_source is None:
        raise ConfigError(
            "config.data.holdout = 0 and config.data.validation_source = None: nothing is held out to evaluate on."
        )
