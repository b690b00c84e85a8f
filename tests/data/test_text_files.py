"""Text files: every format under every compression, documents and pieces, errors that name file and line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from m3jax.data.text_files import TextFiles
from m3jax.errors import DataError

TEXTS = ["In the beginning\n", "God said, Lét there be light 🌍", "x" * 3000 + "\nand\r\nmore"]


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def _parquet(values: list, field: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(values))), field: values}), sink)
    return sink.getvalue().to_pybytes()


def _documents(pattern: Path | str, text_field: str = "text") -> list[str]:
    documents = []
    for piece in TextFiles(str(pattern), text_field).pieces():
        if piece.begins_document:
            documents.append("")
        documents[-1] += piece.text
    return documents


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".txt"])
def test_every_format_under_every_compression(tmp_path, kind, compression):
    contents = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": lambda texts: "".join(texts).encode()}[kind](TEXTS)
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESSORS[compression](contents))
    assert _documents(path) == (["".join(TEXTS)] if kind == ".txt" else TEXTS)


def test_concatenated_compressed_members(tmp_path):
    for suffix, compress in COMPRESSORS.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"one\n") + compress(b"two\n"))
    assert _documents(tmp_path / "*") == ["one\ntwo\n"] * len(COMPRESSORS)


def test_globs_are_sorted_and_recursive(tmp_path):
    for name in ("b.txt", "sub/c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert _documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert _documents(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


@pytest.mark.parametrize("line", ["ünïcödé line 🌍 of text\n", "no line ends 🌍 "])
def test_large_text_comes_in_pieces(tmp_path, line):
    text = line * 20_000
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = list(TextFiles(str(path), "text").pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.begins_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(piece.text.encode()) for piece in pieces) < 200_000 < len(text.encode())
    if line.endswith("\n"):
        assert all(piece.text.endswith("\n") for piece in pieces)


def test_empty_and_null_documents_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "a"}\n')
    (tmp_path / "b.parquet").write_bytes(_parquet(["", None, "b"]))
    (tmp_path / "c.txt").write_text("")
    assert _documents(tmp_path / "*") == ["a", "b"]


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    (tmp_path / "b.parquet").write_bytes(_parquet(["yes"], field="body"))
    assert _documents(tmp_path / "*", "body") == ["yes", "yes"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}')
    assert _documents(tmp_path / "a.jsonl") == ["a?b"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txet": "b", "id": 1}\n', r"a\.jsonl, line 2: no field 'text'.*'txet', 'id'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: expected a JSON object, found a list"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: field 'text' is a int"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not JSON"),
        ("a.parquet", _parquet(["a"], field="body"), r"a\.parquet: no field 'text'.*'id', 'body'"),
        ("a.parquet", _parquet([1, 2]), r"a\.parquet: field 'text' is a int64"),
        ("a.parquet", _parquet(TEXTS)[:-20], r"a\.parquet: not readable as parquet"),
        ("a.txt", b"fine \xff not", r"a\.txt: not UTF-8 at byte 5"),
        ("a.txt", b"cut \xf0\x9f", r"a\.txt: not UTF-8 at byte 4"),
        ("a.csv", b"text\n", r"a\.csv: not a format that is read\. Expected \.txt, \.jsonl, \.parquet"),
        ("a", b"text\n", r"a: not a format"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=message):
        _documents(tmp_path / name)


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSORS if suffix])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_damaged_compressed_files_are_named(tmp_path, kind, suffix, damage):
    data = COMPRESSORS[suffix](_jsonl(TEXTS * 50) if kind == ".jsonl" else _parquet(TEXTS * 50))
    (tmp_path / f"a{kind}{suffix}").write_bytes(data[: len(data) // 2] if damage == "cut" else b"garbage" * 20)
    with pytest.raises(DataError, match=rf"a{kind}{suffix}: not readable, damaged or cut off"):
        _documents(tmp_path / "*")


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSORS if suffix])
def test_compressed_files_without_a_byte_are_named(tmp_path, suffix):
    """Not when they are reached, which may take hours; archives of nothing are fine."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](b""))
    assert _documents(path) == []
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"a\.txt{suffix} has no bytes"):
        TextFiles(str(path), "text")


def test_nothing_matches(tmp_path):
    with pytest.raises(DataError, match=r"\*\.txt': no file matches"):
        TextFiles(f"{tmp_path}/*.txt", "text")
    with pytest.raises(DataError, match=r"It is a folder: write .*/\*\*/\*\.txt"):
        TextFiles(str(tmp_path), "text")


def test_identity_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = TextFiles(str(path), "text").identity()
    assert TextFiles(str(path), "text").identity() == before
    path.write_text("four")
    assert TextFiles(str(path), "text").identity() != before
    assert TextFiles(str(path), "other").identity() != TextFiles(str(path), "text").identity()
