"""Text files matched by a glob: .txt, .jsonl and .parquet, each optionally compressed, read without holding one whole.

A .txt file is a document; it comes in several pieces when it is large. In the other formats a row is a document.
"""

import codecs
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from m3jax.data.compression import COMPRESSED_SUFFIXES, open_binary, open_seekable
from m3jax.data.text_source import Piece
from m3jax.errors import DataError

_PIECE_BYTES = 1 << 16


class TextFiles:
    """Files matched by a glob: .txt (a document each), .jsonl and .parquet (a document per row), sorted by path."""

    held_out_documents = None
    splits_documents = False

    def __init__(self, pattern: str, text_field: str):
        """Finds the files.

        Args:
          pattern: a path or glob; ** matches folders at any depth.
          text_field: the field of .jsonl and .parquet rows that holds the text.

        Raises:
          DataError: nothing matches, a file of a format that is not read, or a compressed one without a byte.
        """
        self.name = pattern
        self._text_field = text_field
        matched = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        self._paths = [path for path in matched if os.path.isfile(path)]
        if not self._paths:
            hint = f" It is a folder: write {pattern.rstrip('/')}/**/*.txt, for example." if matched else ""
            raise DataError(f"Text source {pattern!r}: no file matches (searched from {Path.cwd()}).{hint}")
        for path in self._paths:
            if _format(path) not in _READERS:
                raise DataError(
                    f"{path}: not a format that is read. Expected {', '.join(_READERS)}, "
                    f"each also with {', '.join(COMPRESSED_SUFFIXES)}."
                )
            # The readers of .gz and .zst would take it for an archive of an empty text, which has some bytes.
            if path.endswith(COMPRESSED_SUFFIXES) and not os.path.getsize(path):
                raise DataError(f"{path} has no bytes, as after a download that failed: get it again or remove it.")

    def identity(self) -> Any:
        """Returns path, size and time of change of every file."""
        stats = [(os.path.realpath(path), os.stat(path)) for path in self._paths]
        return [self._text_field, [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]]

    def pieces(self) -> Iterator[Piece]:
        """Yields the text of the files, one after the other."""
        for path in self._paths:
            yield from _READERS[_format(path)](path, self._text_field)


def _format(path: str) -> str:
    """Returns the suffix that tells the format: .jsonl of a.jsonl.gz."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_txt(path: str, text_field: str) -> Iterator[Piece]:
    """Yields the text of a file, cut at ends of lines into pieces of about _PIECE_BYTES."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, begins, position = "", True, 0
    with open_binary(path) as file:
        while True:
            block = file.read(_PIECE_BYTES)
            undecoded = position - len(decoder.getstate()[0])
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not UTF-8 at byte {undecoded + error.start} ({error.reason}). "
                    "Convert it, for example with iconv -t utf-8."
                ) from error
            position += len(block)
            cut = rest.rfind("\n") + 1 or len(rest)
            if block and len(rest) < _PIECE_BYTES:
                continue
            text, rest = (rest[:cut], rest[cut:]) if block else (rest, "")
            if text:
                yield Piece(text, begins)
                begins = False
            if not block:
                return


def _read_jsonl(path: str, text_field: str) -> Iterator[Piece]:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, found a {type(row).__name__}.")
            if text_field not in row:
                raise DataError(_missing_field(where, text_field, row))
            text = row[text_field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{where}: field {text_field!r} is a {type(text).__name__}, expected text.")
            if text:
                # JSON can spell half a surrogate pair, which is no text in any encoding.
                yield Piece(text.encode(errors="replace").decode(), begins_document=True)


def _read_parquet(path: str, text_field: str) -> Iterator[Piece]:
    with open_seekable(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if text_field not in table.schema_arrow.names:
                raise DataError(_missing_field(path, text_field, table.schema_arrow.names))
            kind = table.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: field {text_field!r} is a {kind}, expected text.")
            for batch in table.iter_batches(columns=[text_field], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    if text:
                        yield Piece(text, begins_document=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as parquet ({error}).") from error


def _missing_field(where: str, text_field: str, fields: Any) -> str:
    return (
        f"{where}: no field {text_field!r}; its fields are {', '.join(map(repr, fields))}. Set config.data.text_field."
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
