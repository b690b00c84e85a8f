"""A text corpus by name, and its division into a training part and a held-out part."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Literal

from m3jax.config import DataConfig
from m3jax.data.bundled_text import BundledText
from m3jax.data.huggingface import HuggingFaceText
from m3jax.data.progress import Progress
from m3jax.data.text_files import TextFiles
from m3jax.data.text_source import Piece, TextSource
from m3jax.errors import DataError

Part = Literal["train", "validation"]


def open_text_source(name: str, config: DataConfig) -> TextSource:
    """Returns the text source called `name`: kjv, hf:NAME or a glob.

    Args:
      name: a value of config.data.source other than tokens:DIR.
      config: gives the text field, and subset and split of Hugging Face data sets.

    Raises:
      DataError: nothing there, or not readable.
    """
    if name == BundledText.name:
        return BundledText()
    if name.startswith("tokens:"):
        raise DataError(f"{name}: holds tokens, where text is needed.")
    if name.startswith("hf:"):
        return HuggingFaceText(name, config)
    return TextFiles(name, config.text_field)


def divide(source: TextSource, holdout: float) -> tuple[Iterator[tuple[Part, Piece]], int | None]:
    """Divides a corpus into training and held-out text, by a rule that does not depend on the tokenizer.

    The held-out part is the last `holdout` of the bytes of text. It begins at the first document that begins inside
    that span, if at least half of the span is left then; otherwise, or if the source says so, at the first line that
    begins inside it; in a last line longer than the span, at the character there. Sources that cannot be read to their
    end just to be measured hold out their first documents instead.

    Args:
      source: the corpus.
      holdout: the share to hold out, in [0, 1); 0 = nothing.

    Returns:
      The pieces in order with the part they belong to, and the bytes of the whole text if they had to be counted.

    Raises:
      DataError: the corpus has no text, or too little for a held-out part.
    """
    if holdout == 0:
        return (("train", piece) for piece in source.pieces()), None
    if source.held_out_documents is not None:
        return _divide_by_documents(source, source.held_out_documents), None
    starts, total = array("q"), 0
    with Progress(f"measuring {source.name}", None) as progress:
        for piece in source.pieces():
            if piece.begins_document:
                starts.append(total)
            size = len(piece.text.encode())
            total += size
            progress.advance(size)
    if total == 0:
        raise DataError(f"{source.name}: the source holds no text.")
    span = int(total * holdout)
    cut, at_document = total - span, False
    if not source.splits_documents:
        after = bisect_left(starts, cut)
        if after < len(starts) and total - starts[after] >= span / 2:
            cut, at_document = starts[after], True
    if span == 0 or cut == 0:
        raise DataError(
            f"{source.name}: config.data.holdout = {holdout} of {total} bytes leaves an empty "
            f"{'held-out' if span == 0 else 'training'} part."
        )
    return _divide_by_bytes(source, cut, at_document, total), total


def _divide_by_documents(source: TextSource, held_out: int) -> Iterator[tuple[Part, Piece]]:
    document = 0
    for piece in source.pieces():
        document += piece.begins_document
        yield ("validation" if document <= held_out else "train"), piece


def _divide_by_bytes(source: TextSource, cut: int, at_document: bool, total: int) -> Iterator[tuple[Part, Piece]]:
    """Yields train up to byte `cut`, or to the first line that begins after it, then validation."""
    part, stop = "train", 0
    for text, begins_document in source.pieces():
        data = text.encode()
        start, stop = stop, stop + len(data)
        if part == "train" and stop > cut:
            offset = cut - start if at_document else _line_start(data, cut - start, is_last=stop == total)
            if offset < len(data):
                if offset > 0:
                    yield "train", Piece(data[:offset].decode(), begins_document)
                part, text, begins_document = "validation", data[offset:].decode(), True
            else:
                cut = stop
        yield part, Piece(text, begins_document)


def _line_start(data: bytes, offset: int, is_last: bool) -> int:
    """Returns where a line begins from `offset` on, or the piece ends; in the last piece, where a character begins."""
    newline = data.find(b"\n", offset - 1, len(data) - 1) if offset > 0 else -1
    if newline >= 0:
        return newline + 1
    if offset > 0 and not is_last:
        return len(data)
    while data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset
