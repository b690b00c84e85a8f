"""The cache of tokenised text: reused, renewed, never half written; and the command that makes shards."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m3jax.data import load_tokenizer, prepare, tokenise
from m3jax.data.shards import TokenStream
from m3jax.data.text_files import TextFiles
from m3jax.data.text_source import Piece
from m3jax.errors import ConfigError, DataError

BYTES = load_tokenizer("bytes")


class Source:
    """Ten small documents, counting how often they are read."""

    name = "ten"
    held_out_documents = None
    splits_documents = False
    reads = 0

    def identity(self):
        return "ten"

    def pieces(self):
        self.reads += 1
        for number in range(10):
            yield Piece(f"document {number}\n", begins_document=True)


class BrokenSource(Source):
    def __init__(self, error: BaseException):
        self._error = error

    def pieces(self):
        yield from super().pieces()
        raise self._error


def _text(directory: Path, cache: Path) -> str:
    stream = TokenStream(directory, cache)
    return BYTES.decode(stream.read(0, len(stream)))


def test_text_is_tokenised_once(tmp_path):
    source = Source()
    first = tokenise.cached_tokens(source, BYTES, 0.2, tmp_path)
    assert source.reads == 2  # measured, then tokenised
    assert tokenise.cached_tokens(source, BYTES, 0.2, tmp_path) == first
    assert source.reads == 2
    assert _text(first / "train", tmp_path) == "".join(f"document {i}\n" for i in range(8))
    assert _text(first / "validation", tmp_path) == "document 8\ndocument 9\n"
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name]


def test_what_the_cache_depends_on(tmp_path, bpe_file):
    path = tmp_path / "a.txt"
    path.write_text("some text\nof two lines")

    def where(tokenizer=BYTES, holdout=0.5):
        return tokenise.cached_tokens(TextFiles(str(path), "text"), tokenizer, holdout, tmp_path / "cache")

    first = where()
    others = [where(holdout=0.0), where(tokenizer=load_tokenizer(str(bpe_file)))]
    path.write_text("some other text\nof two lines")
    others.append(where())
    assert len({first, *others}) == 4
    assert _text(others[-1] / "train", tmp_path) == "some other text\n"


def test_pieces_are_batched_without_a_change(tmp_path, monkeypatch):
    whole = tokenise.cached_tokens(Source(), BYTES, 0.0, tmp_path / "whole")
    monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 25)
    batched = tokenise.cached_tokens(Source(), BYTES, 0.0, tmp_path / "batched")
    for name in ("tokens-00000.bin", "documents.idx", "meta.json"):
        assert (whole / name).read_bytes() == (batched / name).read_bytes()


@pytest.mark.parametrize(
    "error", [DataError("bad line"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_failure_leaves_nothing(tmp_path, error):
    expected = DataError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        tokenise.tokenise(BrokenSource(error), BYTES, 0.0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write .*file.*config\.data\.cache_dir"):
        tokenise.cached_tokens(Source(), BYTES, 0.0, tmp_path / "file")


KILLED = """
import sys, time
from pathlib import Path
from m3jax.data import load_tokenizer, tokenise
from m3jax.data.text_source import Piece

class Slow:
    name, held_out_documents, splits_documents = "ten", None, False
    def identity(self):
        return "ten"
    def pieces(self):
        for number in range(5):
            yield Piece(f"document {number}", begins_document=True)
        print("half", flush=True)
        time.sleep(600)

tokenise._BATCH_CHARACTERS = 1
tokenise.cached_tokens(Slow(), load_tokenizer("bytes"), 0.0, Path(sys.argv[1]))
"""


def test_killed_while_writing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    left = list((tmp_path / "tokens").iterdir())
    assert left
    assert all(path.name.startswith(".") for path in left)
    directory = tokenise.cached_tokens(Source(), BYTES, 0.0, tmp_path)
    assert _text(directory, tmp_path / "other") == "".join(f"document {i}\n" for i in range(10))
    assert list((tmp_path / "tokens").iterdir()) == [directory]


def test_two_at_once_make_it_once(tmp_path):
    began, go_on = threading.Event(), threading.Event()

    class Waiting(Source):
        def pieces(self):
            began.set()
            assert go_on.wait(30)
            yield from super().pieces()

    source = Waiting()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(tokenise.cached_tokens, source, BYTES, 0.0, tmp_path)
        assert began.wait(30)
        second = threads.submit(tokenise.cached_tokens, source, BYTES, 0.0, tmp_path)
        go_on.set()
        assert first.result() == second.result()
    assert source.reads == 1


def test_empty_source_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for holdout in (0.0, 0.1):
        with pytest.raises(DataError, match=r"a\.txt: the source holds no text"):
            tokenise.tokenise(TextFiles(str(tmp_path / "a.txt"), "text"), BYTES, holdout, tmp_path / "out")


def test_prepare_command(tmp_path, write_jsonl, bpe_file, capsys):
    write_jsonl(tmp_path / "a.jsonl", [f"the earth {i:02}" for i in range(20)])
    out = tmp_path / "out"
    prepare.main(
        ["--source", str(tmp_path / "*.jsonl"), "--tokenizer", str(bpe_file), "--holdout", "0.25", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    assert f"{out}/train: " in printed
    assert "15 documents" in printed
    assert f"--config.data.source=tokens:{out} --config.data.tokenizer={bpe_file}" in printed
    tokenizer = load_tokenizer(str(bpe_file))
    stream = TokenStream(out / "validation", tmp_path / "cache")
    assert stream.meta.tokenizer == tokenizer.id
    assert tokenizer.decode(stream.read(0, len(stream))) == "".join(f"the earth {i:02}" for i in range(15, 20))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_prepare_without_holdout_makes_a_plain_folder(tmp_path, write_jsonl, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    prepare.main(["--source", str(tmp_path / "a.jsonl"), "--holdout", "0", "--out", str(tmp_path / "out")])
    assert _text(tmp_path / "out", tmp_path / "cache") == "ab"
    assert "2 documents" in capsys.readouterr().out


def test_prepare_overwrites_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"--out .*out: is already there"):
        prepare.main(["--out", str(tmp_path / "out")])


def test_prepare_takes_config_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    arguments = ["--source", str(tmp_path / "a.jsonl"), "--holdout", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no field 'text'"):
        prepare.main(arguments)
    prepare.main([*arguments, "--config.data.text_field=body"])
    assert _text(tmp_path / "out", tmp_path / "cache") == "text"
    with pytest.raises(ConfigError, match=r"config\.data\.holdout = 2\.0"):
        prepare.main(["--out", str(tmp_path / "other"), "--holdout", "2"])
