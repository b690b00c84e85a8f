"""Streamed Hugging Face data sets, from local folders: packing, order, processes, resuming at every step, errors."""

import itertools
import json

import numpy as np
import pytest

from m3jax.config import DataConfig
from m3jax.data import huggingface, load_tokenizer, open_train, open_validation, parts, pipeline, streamed_windows
from m3jax.data.huggingface import HuggingFaceText
from m3jax.data.parts import open_part
from m3jax.data.streamed_windows import StreamedWindows
from m3jax.errors import ConfigError, DataError
from tests.data.packing import Row, pack, rows

BYTES = load_tokenizer("bytes")
HELD_OUT = 3
TEXTS = [f"document {i} " + "x" * (i * 7 % 40) for i in range(25)]


@pytest.fixture
def folder(tmp_path, write_jsonl) -> str:
    """Twenty-five documents, and empty ones, in three files."""
    for number in range(3):
        write_jsonl(tmp_path / "set" / f"{number}.jsonl", ["", *TEXTS[number * 9 : number * 9 + 9]])
    return f"hf:{tmp_path / 'set'}"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streamed_windows, "_GROUP_DOCUMENTS", 4)
    monkeypatch.setattr(pipeline, "_SHUFFLE_WINDOWS", 5)
    for module in (huggingface, parts):
        monkeypatch.setattr(module, "HELD_OUT_DOCUMENTS", HELD_OUT)


def _windows(source: str, length: int, skip=0, process_index=0, process_count=1) -> StreamedWindows:
    text = HuggingFaceText(source, DataConfig())
    return StreamedWindows(text, BYTES, length, skip, process_index, process_count)


def _row(window: dict[str, np.ndarray]) -> Row:
    return rows({name: array[None] for name, array in window.items()})[0]


def _take(iterator, count: int) -> list[list[Row]]:
    return [rows(batch) for batch in itertools.islice(iterator, count)]


@pytest.mark.parametrize("length", [1, 7, 64, 300])
@pytest.mark.parametrize(("process_index", "process_count"), [(0, 1), (0, 3), (2, 3)])
def test_windows_are_the_packed_documents_over_and_over(folder, length, process_index, process_count):
    own = TEXTS[HELD_OUT:][process_index::process_count]
    expected = pack(own * 3, length, keep_remainder=False)
    iterator = iter(_windows(folder, length, HELD_OUT, process_index, process_count))
    assert [_row(window) for window in itertools.islice(iterator, len(expected))] == expected


@pytest.mark.parametrize("length", [7, 64])
def test_resume_at_every_window(folder, length):
    windows = _windows(folder, length, skip=1, process_index=1, process_count=2)
    iterator = iter(windows)
    states, expected = [], []
    for _ in range(2 * len(pack(TEXTS[2::2], length, keep_remainder=False))):
        states.append(json.dumps(iterator.get_state()))
        expected.append(_row(next(iterator)))
    for step, state in enumerate(states):
        resumed = iter(windows)
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        upcoming = expected[step : step + 12]
        assert [_row(window) for window in itertools.islice(resumed, len(upcoming))] == upcoming


def test_state_stays_small(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "set" / "a.jsonl", ["y" * 50_000, "z" * 50_000])
    iterator = iter(_windows(f"hf:{tmp_path / 'set'}", 32))
    for _ in range(2000):
        next(iterator)
    assert len(json.dumps(iterator.get_state())) < 1500


def test_training_resumes_at_every_step(make_config, folder):
    config = make_config(source=folder)
    iterator = open_train(config, BYTES)
    states, batches = [], []
    for _ in range(14):
        states.append(json.dumps(iterator.get_state()))
        batches.append(rows(next(iterator)))
    iterator.close()
    resumed = open_train(config, BYTES)
    for step, state in enumerate(states):
        resumed.set_state(json.loads(state))
        assert _take(resumed, 14 - step) == batches[step:]
    resumed.close()


def test_training_shuffles_within_blocks_by_the_seed(make_config, folder):
    def order(seed):
        iterator = open_train(make_config(source=folder, batch_size=1, seed=seed), BYTES)
        found = [row for (row,) in _take(iterator, 20)]
        iterator.close()
        return found

    found, expected = order(0), pack(TEXTS[HELD_OUT:] * 2, 16, keep_remainder=False)[:20]
    assert found == order(0) != order(1)
    assert found != expected
    for first in range(0, 20, 5):
        assert sorted(found[first : first + 5]) == sorted(expected[first : first + 5])


def test_state_of_another_stream_is_refused(make_config, folder):
    state = open_train(make_config(source=folder), BYTES).get_state()
    other = open_train(make_config(source=folder, holdout=0.0), BYTES)
    with pytest.raises(DataError, match="held-out documents was 3 and is now 0"):
        other.set_state(state)


def test_the_first_documents_are_held_out(make_config, folder):
    held_out = open_validation(make_config(source=folder), BYTES)
    assert held_out.n_bytes == sum(map(len, TEXTS[:HELD_OUT]))
    found = [row for batch in held_out.batches() for row in rows(batch)]
    expected = pack(TEXTS[:HELD_OUT], 16, keep_remainder=True)
    assert found[: len(expected)] == expected


def test_nothing_is_held_out(make_config, folder):
    with pytest.raises(ConfigError, match="nothing is held out"):
        open_validation(make_config(source=folder, holdout=0.0), BYTES)


def test_another_split_for_validation(make_config, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "set" / "validation.jsonl", ["five", "words"])
    source = f"hf:{tmp_path / 'set'}"
    config = make_config(source=source, validation_source=f"{source}:validation", sequence_length=64)
    assert open_validation(config, BYTES).n_bytes == 9
    iterator = open_train(config, BYTES)
    found = [row for batch in _take(iterator, 5) for row in batch]
    iterator.close()
    expected = pack(TEXTS * 3, 64, keep_remainder=False)[:20]
    assert sorted(found) == sorted(expected)  # from the first document on


def test_other_formats_are_data_sets_too(make_config, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("n,body\n1,first\n2,second\n")
    config = make_config(source=f"hf:{tmp_path / 'set'}", text_field="body", validation_source=f"hf:{tmp_path / 'set'}")
    part = open_part(config, BYTES, "validation")
    assert BYTES.decode(part.stream.read(0, part.end)) == "firstsecond"


def test_cached_text_is_renewed_with_its_files(make_config, tmp_path, write_jsonl):
    source = f"hf:{tmp_path / 'set'}"
    write_jsonl(tmp_path / "set" / "a.jsonl", ["one"])
    config = make_config(source="kjv", validation_source=source)
    assert open_validation(config, BYTES).n_bytes == 3
    write_jsonl(tmp_path / "set" / "a.jsonl", ["three"])
    assert open_validation(config, BYTES).n_bytes == 5


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("hf:{}/nowhere", {}, r"data set '.*nowhere' .* cannot be opened .* needs a network; without one, set"),
        ("hf:{}/set:test", {}, r"split 'test'\) cannot be opened .*Bad split: test\. Available splits: \['train'\]"),
        ("hf:{}/set", {"hf_split": "dev"}, r"split 'dev'\) cannot be opened"),
        ("hf:{}/set", {"hf_subset": "en"}, r"subset 'en'.*cannot be opened"),
    ],
)
def test_what_cannot_be_opened(tmp_path, folder, name, config, message):
    with pytest.raises(DataError, match=message):
        HuggingFaceText(name.format(tmp_path), DataConfig(**config))


def test_hub_name_without_network(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'some-org/some-set' .*cannot be opened .*needs a network"):
        HuggingFaceText("hf:some-org/some-set", DataConfig())


@pytest.mark.parametrize(
    ("row", "message"),
    [('{"body": "x", "id": 1}', r"set: no field 'text'; its fields are 'body', 'id'"), ('{"text": 5}', "is a int")],
)
def test_rows_without_text(tmp_path, row, message):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text(row)
    with pytest.raises(DataError, match=message):
        next(HuggingFaceText(f"hf:{tmp_path / 'set'}", DataConfig()).documents())


def test_fewer_documents_than_are_held_out(make_config, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "set" / "a.jsonl", TEXTS[:HELD_OUT])
    iterator = open_train(make_config(source=f"hf:{tmp_path / 'set'}"), BYTES)
    with pytest.raises(DataError, match="has 3 documents, of which the first 3 are held out; none is left"):
        next(iterator)


def test_tokenizer_larger_than_the_vocabulary(make_config, folder):
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 100"):
        open_train(make_config(source=folder, vocab_size=100), BYTES)
