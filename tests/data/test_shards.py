"""Token shards: written and read back, made elsewhere, and every way in which they can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from m3jax.data import load_tokenizer, shards
from m3jax.data.shards import ShardWriter, TokenStream
from m3jax.errors import DataError

DOCUMENTS = ["In the beginning", "", "God created the heaven", "and the earth." * 3]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _write(directory: Path, documents=DOCUMENTS, tokenizer=None) -> list[int]:
    """Writes documents in pieces of five characters; returns the tokens that are to be there."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    directory.mkdir()
    expected = []
    with ShardWriter(directory, tokenizer) as writer:
        for text in documents:
            pieces = [text[i : i + 5] for i in range(0, len(text), 5)] or [""]
            for number, piece in enumerate(pieces):
                writer.add(tokenizer.encode(piece), number == 0, len(piece))
            ids = [i for piece in pieces for i in tokenizer.encode(piece).tolist()]
            expected += [i for i in [tokenizer.bos_id, *ids, tokenizer.eos_id] if i is not None]
        writer.finish()
    return expected


def _foreign(directory: Path, *shards: list[int], dtype="uint16", **meta) -> Path:
    directory.mkdir()
    for number, ids in enumerate(shards):
        np.array(ids, f"<u{2 if dtype == 'uint16' else 4}").tofile(directory / f"part{number}.bin")
    (directory / "meta.json").write_text(json.dumps({"dtype": dtype, **meta}))
    return directory


@pytest.mark.parametrize("shard_tokens", [1, 7, 1 << 20])
def test_round_trip(tmp_path, cache, monkeypatch, shard_tokens):
    monkeypatch.setattr(shards, "_SHARD_TOKENS", shard_tokens)
    expected = _write(tmp_path / "s")
    stream = TokenStream(tmp_path / "s", cache)
    assert len(stream) == len(expected)
    for start in range(len(expected)):
        for stop in {start, start + 1, start + 9, len(expected)}:
            read = stream.read(start, min(stop, len(expected))) if stop > start else np.array([])
            assert read.tolist() == expected[start:stop]
            starts = [i for i in range(start, min(stop, len(expected))) if expected[i] == 256]
            assert stream.document_starts(start, stop).tolist() == starts
    assert stream.meta.text_bytes == sum(map(len, DOCUMENTS))
    assert stream.meta.documents == len(DOCUMENTS)
    assert sum(shard["tokens"] for shard in stream.meta.shards) == len(expected)


def test_written_dtype_holds_the_vocabulary(tmp_path, cache):
    tokenizer = load_tokenizer("bytes")
    tokenizer.vocab_size = 65_537
    expected = _write(tmp_path / "s", tokenizer=tokenizer)
    stream = TokenStream(tmp_path / "s", cache)
    assert stream.meta.dtype == "uint32"
    assert stream.read(0, len(stream)).tolist() == expected


def test_without_special_tokens_the_documents_are_still_known(tmp_path, cache, train_tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_TOKENS", 4)
    tokenizer = load_tokenizer("plain", train_tokenizer([]))
    expected = _write(tmp_path / "s", ["the earth", "the waters"], tokenizer)
    stream = TokenStream(tmp_path / "s", cache)
    assert stream.read(0, len(stream)).tolist() == expected
    first = sum(len(tokenizer.encode(piece)) for piece in ("the e", "arth"))
    assert stream.document_starts(0, len(stream)).tolist() == [0, first]


@pytest.mark.parametrize(
    ("meta", "starts"),
    [({"bos_id": 9}, [0, 4, 7]), ({"eos_id": 8}, [0, 3, 7]), ({}, [0, 5]), ({"bos_id": 9, "eos_id": 8}, [0, 4, 7])],
)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_made_elsewhere(tmp_path, cache, monkeypatch, meta, starts, dtype):
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 2)
    directory = _foreign(tmp_path / "s", [9, 1, 8, 3, 9], [2, 8, 9, 8], dtype=dtype, **meta)
    stream = TokenStream(directory, cache)
    assert stream.read(0, 9).tolist() == [9, 1, 8, 3, 9, 2, 8, 9, 8]
    assert stream.document_starts(0, 9).tolist() == starts
    stream.check_ids(10)
    with pytest.raises(DataError, match=r"part0\.bin: holds token id 9, but config\.model\.vocab_size = 9"):
        stream.check_ids(9)


def test_contents_are_read_once_and_again_after_a_change(tmp_path, cache, monkeypatch):
    directory = _foreign(tmp_path / "s", [1, 2, 3])
    digest = TokenStream(directory, cache).digest
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "_build_index", None)
        assert TokenStream(directory, cache).digest == digest
    np.array([1, 2, 300], "<u2").tofile(directory / "part0.bin")
    changed = TokenStream(directory, cache)
    assert changed.digest != digest
    with pytest.raises(DataError, match="300"):
        changed.check_ids(258)


def test_documents_of_ones_own_are_checked_and_known_again(tmp_path, cache):
    directory = _foreign(tmp_path / "s", [1, 2, 1, 4], bos_id=1)
    own = directory / "documents.idx"
    digests = []
    for starts in ([0, 3], [0, 1]):
        np.array(starts, "<u8").tofile(own)
        stream = TokenStream(directory, cache)
        assert stream.document_starts(0, 4).tolist() == starts
        digests.append(stream.documents_digest)
    assert digests[0] != digests[1]
    for starts in ([1, 0], [0, 4]):
        np.array(starts, "<u8").tofile(own)
        with pytest.raises(DataError, match=r"documents\.idx: damaged, expected ascending positions"):
            TokenStream(directory, cache)
    own.unlink()
    assert TokenStream(directory, cache).document_starts(0, 4).tolist() == [0, 2]


def test_truncated_shard(tmp_path, cache):
    _write(tmp_path / "s")
    path = tmp_path / "s" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"tokens-00000\.bin: truncated or damaged, it has \d+ bytes \(meta\.json says"):
        TokenStream(tmp_path / "s", cache)


@pytest.mark.parametrize("opened_before", [False, True])
def test_flipped_bit(tmp_path, cache, opened_before):
    _write(tmp_path / "s")
    if opened_before:
        TokenStream(tmp_path / "s", cache)
    path = tmp_path / "s" / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokens-00000\.bin: damaged, its SHA-256"):
        TokenStream(tmp_path / "s", cache)


def test_missing_shard(tmp_path, cache):
    _write(tmp_path / "s")
    (tmp_path / "s" / "tokens-00000.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-00000\.bin: missing, meta\.json lists it"):
        TokenStream(tmp_path / "s", cache)


def test_damaged_document_index(tmp_path, cache):
    _write(tmp_path / "s")
    (tmp_path / "s" / "documents.idx").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"documents\.idx: truncated or damaged"):
        TokenStream(tmp_path / "s", cache)


def test_half_a_token(tmp_path, cache):
    directory = _foreign(tmp_path / "s", [1, 2, 3])
    with open(directory / "part0.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"part0\.bin: truncated or damaged, it has 7 bytes \(not a whole number"):
        TokenStream(directory, cache)


def test_empty_shards(tmp_path, cache):
    with pytest.raises(DataError, match=r"part1\.bin: the shard is empty"):
        TokenStream(_foreign(tmp_path / "one", [1], []), cache)
    with pytest.raises(DataError, match=r"none: no token shards \(\*\.bin\)"):
        TokenStream(_foreign(tmp_path / "none"), cache)


def test_ids_beyond_the_vocabulary_of_the_shards(tmp_path, cache):
    with pytest.raises(DataError, match=r"part1\.bin: holds token id 70, but meta\.json says vocab_size 50.*dtype"):
        TokenStream(_foreign(tmp_path / "s", [1], [70, 2], vocab_size=50), cache)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", r"meta\.json: not a description of shards"),
        ("[]", r"meta\.json: not a description of shards"),
        ("{}", r"meta\.json: not a description of shards.*dtype"),
        ('{"dtype": "int32"}', r"meta\.json: dtype 'int32', expected uint16 or uint32"),
        ('{"dtype": "uint16", "bos_id": "<s>"}', r"meta\.json: bos_id = '<s>', expected an integer"),
        ('{"dtype": "uint16", "shards": ["a.bin"]}', r"meta\.json: shards lists 'a\.bin'"),
        ('{"dtype": "uint16", "shards": [{"file": "../a.bin"}]}', r"meta\.json: shards lists"),
    ],
)
def test_wrong_meta(tmp_path, cache, contents, message):
    directory = _foreign(tmp_path / "s", [1, 2])
    (directory / "meta.json").write_text(contents)
    with pytest.raises(DataError, match=message):
        TokenStream(directory, cache)


def test_missing_meta(tmp_path, cache):
    with pytest.raises(DataError, match=r"nowhere/meta\.json: no such file\. .* at least like"):
        TokenStream(tmp_path / "nowhere", cache)
