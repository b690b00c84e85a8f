"""The bundled text, and the division into training and held-out text against a brute-force statement of its rule."""

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3jax.config import DataConfig
from m3jax.data.bundled_text import BundledText
from m3jax.data.corpus import divide, open_text_source
from m3jax.data.text_source import Piece
from m3jax.errors import DataError


class Pieces:
    """A text source out of a list of documents, each a list of pieces."""

    name = "pieces"

    def __init__(
        self, documents: list[list[str]], splits_documents: bool = False, held_out_documents: int | None = None
    ):
        self._documents = documents
        self.splits_documents, self.held_out_documents = splits_documents, held_out_documents

    def pieces(self) -> Iterator[Piece]:
        for document in self._documents:
            for number, text in enumerate(document):
                yield Piece(text, begins_document=number == 0)


def _parts(source, holdout: float) -> dict[str, list[Piece]]:
    parts = {"train": [], "validation": []}
    order = []
    for part, piece in divide(source, holdout)[0]:
        parts[part].append(piece)
        order.append(part)
    if source.held_out_documents is None:
        assert order == sorted(order)
    return parts


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_bundled_text():
    pieces = list(BundledText().pieces())
    text = _text(pieces)
    assert len(text.encode()) == 4_234_844
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a58be2a2191747f29fd2a9a963cc412ecdc12c986f1fae720865c17d6b74254a"
    )
    assert len(pieces) == 1189
    assert all(piece.begins_document for piece in pieces)
    assert pieces[0].text.startswith("Genesis 1\n\n1 In the beginning God created")
    assert pieces[-1].text.startswith("Revelation 22\n\n1 And he shewed me")


def test_bundled_text_holds_out_the_last_five_percent():
    source = open_text_source("kjv", DataConfig())
    parts = _parts(source, 0.05)
    train, held_out = _text(parts["train"]), _text(parts["validation"])
    whole = _text(list(source.pieces()))
    assert train + held_out == whole
    assert train.endswith("\n")
    # The first beginning of a line within the last 5 %.
    assert len(held_out) <= 0.05 * len(whole) < len(held_out) + len(train.splitlines()[-1]) + 1
    assert held_out.startswith("16 For by him were all things created")
    assert parts["validation"][0].begins_document


@pytest.mark.parametrize("splits_documents", [False, True])
@given(
    documents=st.lists(
        st.lists(st.text("ab\né", min_size=1, max_size=12), min_size=1, max_size=3), min_size=1, max_size=8
    ),
    holdout=st.floats(0.02, 0.9),
)
def test_division_follows_its_rule(documents, holdout, splits_documents):
    whole = "".join("".join(pieces) for pieces in documents).encode()
    span = int(len(whole) * holdout)
    source = Pieces(documents, splits_documents)
    if span == 0:
        with pytest.raises(DataError, match="leaves an empty held-out part"):
            divide(source, holdout)
        return
    parts = _parts(source, holdout)
    train, held_out = _text(parts["train"]).encode(), _text(parts["validation"]).encode()
    assert train + held_out == whole

    starts, ends = [], []
    for pieces in documents:
        starts.append(ends[-1] if ends else 0)
        for text in pieces:
            ends.append((ends[-1] if ends else 0) + len(text.encode()))
    asked = len(whole) - span
    fitting = [start for start in starts if start >= asked and len(whole) - start >= span / 2]
    if fitting and not splits_documents:
        assert len(train) == fitting[0]
    else:
        lines = [0, *(i + 1 for i in range(len(whole) - 1) if whole[i : i + 1] == b"\n")]
        allowed = sorted({place for place in [*lines, *starts, *ends[:-1]] if place >= asked})
        characters = [i for i in range(asked + 1) if whole[i] & 0xC0 != 0x80]
        assert len(train) == (allowed[0] if allowed else characters[-1])
    assert parts["validation"][0].begins_document


def test_the_first_documents_are_held_out_where_the_end_is_out_of_reach():
    source = Pieces([["a", "b"], ["c"], ["d"]], held_out_documents=2)
    parts = _parts(source, 0.05)
    assert (_text(parts["validation"]), _text(parts["train"])) == ("abc", "d")


def test_no_holdout():
    parts = _parts(Pieces([["a"], ["b"]]), 0.0)
    assert (_text(parts["train"]), parts["validation"]) == ("ab", [])


def test_no_text():
    with pytest.raises(DataError, match="pieces: the source holds no text"):
        divide(Pieces([]), 0.05)


def test_tokens_are_no_text():
    with pytest.raises(DataError, match="holds tokens, where text is needed"):
        open_text_source("tokens:x", DataConfig())
