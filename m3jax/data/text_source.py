"""What a source of text is: pieces of text in a fixed order, streamed, with the documents' beginnings marked."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Piece(NamedTuple):
    """Consecutive text of one document."""

    text: str
    begins_document: bool


class TextSource(Protocol):
    """A text corpus that can be read any number of times.

    Attributes:
      name: what the user called it, for messages.
      held_out_documents: None = the held-out part is a share of the bytes, from the end; a number = that many documents
        from the beginning, for a corpus whose end is out of reach.
      splits_documents: the held-out part may begin inside a document.
    """

    name: str
    held_out_documents: int | None
    splits_documents: bool

    def identity(self) -> Any:
        """Returns a JSON value that changes whenever the text may have changed."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Yields the whole text in order.

        Raises:
          DataError: a file that cannot be read, naming it and the line.
        """
        ...
