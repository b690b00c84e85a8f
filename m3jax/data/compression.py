"""Opens .gz, .bz2, .xz and .zst files as the bytes inside them; a damaged or cut-off file is an error that names it."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow

from m3jax.errors import DataError

_OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pyarrow.input_stream(path, compression="zstd")),
}
COMPRESSED_SUFFIXES = tuple(_OPENERS)


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed as its suffix says.

    Args:
      path: the file.

    Yields:
      A binary file, read forwards.

    Raises:
      DataError: the file cannot be opened or, while the block runs, cannot be decompressed to its end.
    """
    suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if path.endswith(suffix)), None)
    try:
        with _OPENERS[suffix](path) if suffix else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: not readable, damaged or cut off ({error}).") from error


@contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """Opens a file as `open_binary` does, for reading in any order; a compressed one goes to a temporary file."""
    with open_binary(path) as file:
        if not path.endswith(COMPRESSED_SUFFIXES):
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            unpacked.seek(0)
            yield unpacked
