"""The text that ships with the package, so that everything runs on real text without a download."""

import hashlib
import lzma
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from m3jax.data.text_source import Piece

_CHAPTER_HEADING = re.compile(r"^.+\n\n", re.MULTILINE)


class BundledText:
    """The King James Bible, shipped with the package; a document is a chapter."""

    name = "kjv"
    held_out_documents = None
    splits_documents = True

    def __init__(self):
        self._compressed = (resources.files("m3jax.data") / "bundled" / "kjv.txt.xz").read_bytes()

    def identity(self) -> Any:
        """Returns the hash of the compressed text."""
        return [self.name, hashlib.sha256(self._compressed).hexdigest()]

    def pieces(self) -> Iterator[Piece]:
        """Yields the chapters."""
        text = lzma.decompress(self._compressed).decode()
        starts = [match.start() for match in _CHAPTER_HEADING.finditer(text)]
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
            yield Piece(text[start:stop], begins_document=True)
