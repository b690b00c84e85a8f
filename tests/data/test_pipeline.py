"""Windows and batches against brute force: packing, order, processes, resuming at every step, held-out text, errors."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3jax.data import load_tokenizer, open_train, open_validation
from m3jax.data.parts import open_part
from m3jax.data.shards import TokenStream
from m3jax.data.windows import TokenWindows, make_window
from m3jax.errors import ConfigError, DataError
from tests.data.packing import pack, rows

BYTES = load_tokenizer("bytes")
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "a",
    "",
    "bc",
    *(f"verse {i} of it" for i in range(9)),
]
N_TOKENS = sum(len(text) + 2 for text in TEXTS if text)


@pytest.fixture
def corpus(tmp_path, write_jsonl) -> str:
    return str(write_jsonl(tmp_path / "corpus" / "a.jsonl", TEXTS))


def _take(iterator, count: int) -> list[list[list[tuple]]]:
    return [rows(next(iterator)) for _ in range(count)]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    missing=st.integers(0, 5),
)
def test_a_window_separates_its_documents(lengths, missing):
    segments = [number for number, length in enumerate(lengths) for _ in range(length)]
    tokens = np.arange(100, 100 + len(segments) + 1)
    segments.append(segments[-1])
    starts = [i for i in range(1, len(tokens)) if segments[i] != segments[i - 1]]
    window = make_window(tokens, np.array(starts, int), len(tokens) - 1 + missing)
    for name in ("tokens", "targets", "segment_ids"):
        assert window[name].dtype == np.int32
    assert window["weights"].dtype == np.float32
    padding = [0] * missing
    assert window["tokens"].tolist() == [*tokens[:-1], *padding]
    assert window["targets"].tolist() == [*tokens[1:], *padding]
    assert window["segment_ids"].tolist() == [*(1 + s for s in segments[:-1]), *padding]
    same = [float(a == b) for a, b in itertools.pairwise(segments)]
    assert window["weights"].tolist() == same + padding


@pytest.mark.parametrize("length", [1, 2, 5, 16, N_TOKENS - 2, N_TOKENS - 1, N_TOKENS, 500])
@pytest.mark.parametrize("keep_remainder", [False, True])
def test_windows_are_the_packed_documents(make_config, corpus, length, keep_remainder):
    part = open_part(make_config(source=corpus, holdout=0.0), BYTES, "train")
    windows = TokenWindows(part.stream, part.begin, part.end, length, keep_remainder=keep_remainder)
    expected = pack(TEXTS, length, keep_remainder)
    assert [rows({k: v[None] for k, v in windows[i].items()})[0] for i in range(len(windows))] == expected
    if keep_remainder:
        real = sum(weight for row in expected for *_, weight in row)
        assert real == part.n_predicted == sum(len(text) + 1 for text in TEXTS if text)
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_every_window_once_an_epoch_in_an_order_of_its_own(make_config, corpus):
    expected = pack(TEXTS, 4, keep_remainder=False)
    per_epoch = len(expected)
    config = make_config(source=corpus, holdout=0.0, sequence_length=4, batch_size=1)
    iterator = open_train(config, BYTES)
    epochs = [[row for (row,) in _take(iterator, per_epoch)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected)
    assert len({json.dumps(epoch) for epoch in [expected, *epochs]}) == 4


def test_order_is_a_function_of_the_seed(make_config, corpus):
    def order(seed):
        return _take(open_train(make_config(source=corpus, seed=seed), BYTES), 8)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_batches_have_the_promised_form(make_config, corpus):
    batch = next(open_train(make_config(source=corpus), BYTES))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((4, 16), "int32"),
        "targets": ((4, 16), "int32"),
        "segment_ids": ((4, 16), "int32"),
        "weights": ((4, 16), "float32"),
    }


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(make_config, corpus, process_count):
    config = make_config(source=corpus, sequence_length=4)
    alone = _take(open_train(config, BYTES), 12)
    shared = [_take(open_train(config, BYTES, index, process_count), 12) for index in range(process_count)]
    for step, batch in enumerate(alone):
        for index in range(process_count):
            assert shared[index][step] == batch[index::process_count]


def test_resume_at_every_step(make_config, corpus):
    config = make_config(source=corpus)
    iterator = open_train(config, BYTES)
    states, batches = [], []
    for _ in range(12):  # more than two epochs
        states.append(json.dumps(iterator.get_state()))
        batches.append(rows(next(iterator)))
    assert len(states[-1]) < 1000
    resumed = open_train(config, BYTES)
    for step, state in enumerate(states):
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        assert _take(resumed, 12 - step) == batches[step:]
    resumed.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"config\.data\.seed was 0 and is now 1"),
        ({"sequence_length": 8}, r"config\.data\.sequence_length was 16 and is now 8"),
        ({"batch_size": 2}, r"config\.data\.batch_size was 4 and is now 2"),
        ({"source": "kjv"}, "tokens was"),
        ({"holdout": 0.3}, "tokens was"),
    ],
)
def test_a_state_of_other_data_is_refused(make_config, corpus, change, named):
    state = open_train(make_config(source=corpus), BYTES).get_state()
    other = open_train(make_config(**{"source": corpus} | change), BYTES)
    with pytest.raises(DataError, match=named):
        other.set_state(state)


def test_a_state_does_not_depend_on_where_the_cache_is(make_config, corpus, tmp_path):
    state = open_train(make_config(source=corpus), BYTES).get_state()
    open_train(make_config(source=corpus, cache_dir=str(tmp_path / "other")), BYTES).set_state(state)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_held_out_text_in_order(make_config, corpus, batch_size):
    config = make_config(source=corpus, holdout=0.4, batch_size=batch_size, sequence_length=8)
    held_out = open_validation(config, BYTES)
    batches = [rows(batch) for batch in held_out.batches()]
    texts = TEXTS[-5:]
    expected = pack(texts, 8, keep_remainder=True)
    found = [row for batch in batches for row in batch]
    assert found[: len(expected)] == expected
    assert all(row == [(0, 0, 0, 0.0)] * 8 for row in found[len(expected) :])
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == held_out.n_batches == -(-len(expected) // batch_size)
    assert held_out.n_bytes == sum(map(len, texts))
    assert held_out.n_tokens == held_out.n_bytes + len(texts) == sum(w for row in found for *_, w in row)
    assert [rows(batch) for batch in held_out.batches(limit=2)] == batches[:2]
    assert list(held_out.batches(limit=0)) == []


def test_training_and_held_out_text_do_not_overlap(make_config):
    config = make_config(sequence_length=512)
    train, held_out = (open_part(config, BYTES, part) for part in ("train", "validation"))
    assert train.text_bytes + held_out.text_bytes == 4_234_844
    assert held_out.text_bytes == 211_696
    text = BYTES.decode(train.stream.read(0, train.end)) + BYTES.decode(held_out.stream.read(0, held_out.end))
    assert len(text) == 4_234_844


def test_another_source_for_validation(make_config, corpus, tmp_path):
    (tmp_path / "v.txt").write_text("held out")
    config = make_config(source=corpus, validation_source=str(tmp_path / "v.txt"))
    held_out = open_validation(config, BYTES)
    assert (held_out.n_bytes, held_out.n_tokens) == (8, 9)
    assert open_part(config, BYTES, "train").text_bytes == sum(map(len, TEXTS))


def test_json_tokenizer(make_config, corpus, bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    held_out = open_validation(make_config(source=corpus, vocab_size=280, holdout=0.4), tokenizer)
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in held_out.batches()])
    assert tokenizer.decode(tokens) == "".join(TEXTS[-5:])
    assert held_out.n_bytes == len("".join(TEXTS[-5:]))


def test_without_special_tokens_segments_separate_the_documents(make_config, corpus, train_tokenizer):
    tokenizer = load_tokenizer("plain", train_tokenizer([]))
    held_out = open_validation(make_config(source=corpus, vocab_size=280, holdout=0.4, sequence_length=500), tokenizer)
    (batch,) = held_out.batches()
    for number, text in enumerate(TEXTS[-5:], start=1):
        inside = batch["segment_ids"][0] == number
        ids = tokenizer.encode(text)
        # The very last token is a target only.
        assert batch["tokens"][0][inside].tolist() == (ids if number < 5 else ids[:-1]).tolist()
        assert batch["weights"][0][inside].sum() == len(ids) - 1
    assert held_out.n_bytes is None


class TestTokenShards:
    """Sources tokens:DIR."""

    @staticmethod
    def _make(directory: Path, documents: int, **meta) -> str:
        directory.mkdir()
        ids = [i for number in range(documents) for i in (9, 1, number % 8, 8)]
        np.array(ids, "<u2").tofile(directory / "a.bin")
        (directory / "meta.json").write_text(json.dumps({"dtype": "uint16", "bos_id": 9, **meta}))
        return f"tokens:{directory}"

    def test_plain_folder_holds_out_its_end(self, make_config, tmp_path):
        config = make_config(vocab_size=10, source=self._make(tmp_path / "s", 30), holdout=0.17)
        train, held_out = (open_part(config, BYTES, part) for part in ("train", "validation"))
        # 20 of 120 tokens asked for; the first document after that begins there.
        assert (train.begin, train.end, held_out.begin, held_out.end) == (0, 100, 100, 120)
        assert held_out.n_predicted == 15
        assert open_validation(config, BYTES).n_bytes is None

    def test_a_cut_inside_a_document_if_none_fits(self, make_config, tmp_path):
        config = make_config(vocab_size=10, source=self._make(tmp_path / "s", 30), holdout=0.017)
        assert open_part(config, BYTES, "validation").begin == 118

    def test_folder_for_validation(self, make_config, tmp_path):
        source, held_out = self._make(tmp_path / "s", 30), self._make(tmp_path / "v", 2, text_bytes=77)
        config = make_config(vocab_size=10, source=source, validation_source=held_out)
        assert open_part(config, BYTES, "train").end == 120
        assert (open_validation(config, BYTES).n_tokens, open_validation(config, BYTES).n_bytes) == (6, 77)

    def test_divided_folder(self, make_config, corpus, tmp_path):
        cached = open_part(make_config(source=corpus, holdout=0.4), BYTES, "train").stream.directory.parent
        config = make_config(source=f"tokens:{cached}", holdout=0.0)
        assert open_validation(config, BYTES).n_bytes == sum(map(len, TEXTS[-5:]))
        assert open_part(config, BYTES, "train").text_bytes == sum(map(len, TEXTS[:-5]))

    def test_another_tokenizer(self, make_config, corpus, bpe_file):
        cached = open_part(make_config(source=corpus), BYTES, "train").stream.directory.parent
        config = make_config(vocab_size=300, source=f"tokens:{cached}")
        with pytest.raises(DataError, match=r"train/meta\.json: these shards were made with tokenizer bytes, but"):
            open_train(config, load_tokenizer(str(bpe_file)))

    def test_token_id_beyond_the_vocabulary(self, make_config, tmp_path):
        source = self._make(tmp_path / "s", 30)
        with pytest.raises(DataError, match=r"a\.bin: holds token id 9, but config\.model\.vocab_size = 9\."):
            open_train(make_config(vocab_size=9, source=source), BYTES)

    def test_damage_is_found_at_open(self, make_config, tmp_path):
        source = self._make(tmp_path / "s", 30)
        config = make_config(vocab_size=10, source=source)
        open_train(config, BYTES)
        with open(tmp_path / "s" / "a.bin", "ab") as file:
            file.write(b"x")
        with pytest.raises(DataError, match=r"a\.bin: truncated or damaged"):
            open_train(config, BYTES)
        with pytest.raises(DataError, match=r"nowhere/meta\.json: no such file"):
            open_train(make_config(source=f"tokens:{tmp_path}/nowhere"), BYTES)

    def test_nothing_to_hold_out(self, make_config, tmp_path):
        config = make_config(vocab_size=10, source=self._make(tmp_path / "s", 1))
        with pytest.raises(DataError, match=r"holdout = 0\.05 of 4 tokens leaves an empty validation part"):
            open_validation(config, BYTES)


def test_tokenizer_larger_than_the_vocabulary(make_config, corpus):
    for open_data in (open_train, open_validation):
        with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 257: expected at least 258"):
            open_data(make_config(vocab_size=257, source=corpus), BYTES)


def test_less_than_a_window(make_config, corpus):
    open_train(make_config(source=corpus, holdout=0.0, sequence_length=N_TOKENS - 1), BYTES)
    message = rf"a\.jsonl: {N_TOKENS} training tokens are less than one window.*sequence_length \+ 1 = {N_TOKENS + 1}"
    with pytest.raises(DataError, match=message):
        open_train(make_config(source=corpus, holdout=0.0, sequence_length=N_TOKENS), BYTES)


def test_nothing_is_held_out(make_config, corpus):
    with pytest.raises(ConfigError, match=r"config\.data\.holdout = 0 and config\.data\.validation_source = None"):
        open_validation(make_config(source=corpus, holdout=0.0), BYTES)


def test_missing_files(make_config, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*no file matches"):
        open_train(make_config(source=f"{tmp_path}/nowhere/*.txt"), BYTES)


def test_batch_must_divide_among_processes(make_config, corpus):
    with pytest.raises(ConfigError, match=r"config\.data\.batch_size = 4: expected a multiple of 3 processes"):
        open_train(make_config(source=corpus), BYTES, 0, 3)


def test_default_cache_is_in_the_home_folder(make_config, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    part = open_part(make_config(source=corpus, cache_dir=None), BYTES, "train")
    assert part.stream.directory.is_relative_to(tmp_path / "home" / ".cache" / "m3jax")
    assert isinstance(part.stream, TokenStream)
