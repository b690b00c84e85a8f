"""Turns a text source into token shards, once: into the cache, or into a folder of the user's."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from m3jax.data.atomic import build_once
from m3jax.data.corpus import Part, divide
from m3jax.data.progress import Progress
from m3jax.data.shards import ShardWriter
from m3jax.data.text_source import Piece, TextSource
from m3jax.data.tokenizer import Tokenizer
from m3jax.errors import DataError

_FORMAT_VERSION = 1  # of what the cache holds; raise it when the shards of the same text would change
_BATCH_CHARACTERS = 1 << 20


def tokenise(source: TextSource, tokenizer: Tokenizer, holdout: float, directory: Path) -> None:
    """Writes the shards of a corpus; all of them are there or, if this fails, none.

    Args:
      source: the text.
      tokenizer: makes the tokens.
      holdout: share of the text to hold out, see `divide`.
      directory: to be made; gets the folders train and validation, or the shards themselves if holdout is 0.

    Raises:
      DataError: no text, text that cannot be read, or no place to write.
    """
    build_once(directory, lambda partial: _write_shards(source, tokenizer, holdout, partial))


def cached_tokens(source: TextSource, tokenizer: Tokenizer, holdout: float, cache_dir: Path) -> Path:
    """Returns a directory as `tokenise` makes it, from the cache if neither text nor tokenizer nor holdout changed."""
    key = json.dumps([_FORMAT_VERSION, source.identity(), tokenizer.id, holdout])
    directory = cache_dir / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    tokenise(source, tokenizer, holdout, directory)
    return directory


def _write_shards(source: TextSource, tokenizer: Tokenizer, holdout: float, directory: Path) -> None:
    folders: dict[Part, Path] = {"train": directory}
    if holdout > 0:
        folders = {"train": directory / "train", "validation": directory / "validation"}
        for folder in folders.values():
            folder.mkdir()
    pieces, total = divide(source, holdout)
    with contextlib.ExitStack() as stack:
        writers = {part: stack.enter_context(ShardWriter(folder, tokenizer)) for part, folder in folders.items()}
        progress = stack.enter_context(Progress(f"tokenising {source.name}", total))
        for batch in _batches(pieces):
            ids = tokenizer.encode_batch([piece.text for _, piece in batch])
            for (part, piece), piece_ids in zip(batch, ids, strict=True):
                size = len(piece.text.encode())
                writers[part].add(piece_ids, piece.begins_document, size)
                progress.advance(size)
        for part, writer in writers.items():
            if writer.finish().text_bytes == 0:
                raise DataError(_nothing_left(source, part if holdout > 0 else None))


def _batches(pieces: Iterator[tuple[Part, Piece]]) -> Iterator[list[tuple[Part, Piece]]]:
    """Groups pieces so that a tokenizer can work on several at once."""
    batch, characters = [], 0
    for part, piece in pieces:
        batch.append((part, piece))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_left(source: TextSource, part: Part | None) -> str:
    if part is None:
        return f"{source.name}: the source holds no text."
    if source.held_out_documents is not None:
        return (
            f"{source.name}: no text for the {part} part when the first {source.held_out_documents} documents are held "
            "out. Set config.data.validation_source, or config.data.holdout to 0."
        )
    return f"{source.name}: the source holds no text for the {part} part. Change config.data.holdout."
