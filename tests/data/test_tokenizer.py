"""Tokenizers: round trips, special tokens, storage in a checkpoint, errors."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3jax.data import check_vocabulary, load_tokenizer
from m3jax.errors import ConfigError, DataError


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@given(st.lists(st.integers(0, 300)))
def test_bytes_decode_takes_any_ids(ids):
    assert load_tokenizer("bytes").decode(ids) == bytes(i for i in ids if i < 256).decode(errors="replace")


def test_bytes_layout():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.json_text) == (258, 256, 257, None)


def test_whether_the_tokenizer_itself_adds_bos(bpe_file):
    assert load_tokenizer("bytes").adds_bos
    assert not load_tokenizer(str(bpe_file)).adds_bos
    values = json.loads(bpe_file.read_text())
    bos = "<|begin_of_text|>"
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    bpe_file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.adds_bos
    assert tokenizer.bos_id not in tokenizer.encode("the earth")


@pytest.mark.parametrize("as_folder", [False, True])
def test_json_round_trip(bpe_file, as_folder):
    tokenizer = load_tokenizer(str(bpe_file.parent if as_folder else bpe_file))
    texts = ["the earth", "In the beginning\n\n  ünïcödé 🌍", ""]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 280)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert len(tokenizer.encode("the earth")) < len("the earth")


def test_names_of_special_tokens_in_text_are_text(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    text = "the <|end_of_text|> of the earth"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_truncation_and_padding_of_the_file_do_not_apply(bpe_file):
    values = json.loads(bpe_file.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin_of_text|>",
    }  # fmt: skip
    bpe_file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(bpe_file))
    text = "the earth and the heaven and the waters and xyz"
    assert 4 < len(tokenizer.encode(text)) < 64
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stored_json_rebuilds_the_tokenizer_without_its_file(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    bpe_file.unlink()
    again = load_tokenizer("somewhere/else.json", tokenizer.json_text)
    assert again.id == tokenizer.id
    assert again.encode("the earth").tolist() == tokenizer.encode("the earth").tolist()


@pytest.mark.parametrize(
    ("special_tokens", "bos_id", "eos_id"),
    [
        (["<s>", "</s>"], 0, 1),
        (["<|endoftext|>"], 0, 0),
        (["[EOS]", "[BOS]"], 1, 0),
        (["<bos>"], 0, None),
        ([], None, None),
    ],
)
def test_special_tokens_are_found_by_name(train_tokenizer, special_tokens, bos_id, eos_id):
    tokenizer = load_tokenizer("t", train_tokenizer(special_tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)


def test_id_follows_the_contents(train_tokenizer):
    first, second = train_tokenizer(["<s>"]), train_tokenizer(["<s>", "</s>"])
    assert load_tokenizer("a", first).id == load_tokenizer("b", first).id != load_tokenizer("a", second).id


def test_vocabulary_must_fit_the_model(make_config):
    tokenizer = load_tokenizer("bytes")
    check_vocabulary(tokenizer, make_config(vocab_size=258))
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 257: expected at least 258.*'bytes'"):
        check_vocabulary(tokenizer, make_config(vocab_size=257))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere/tokenizer\.json: No such file"):
        load_tokenizer(str(tmp_path / "nowhere" / "tokenizer.json"))


@pytest.mark.parametrize("contents", ["", "{}", '{"model": {"type": "BPE"}}', "GIF89a"])
def test_a_file_of_something_else_is_named(tmp_path: Path, contents):
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["some-org/some-model", "bites", "not a name"])
def test_a_hub_name_without_network(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=rf"'{name}'.*Without a network, set config\.data\.tokenizer"):
        load_tokenizer(name)


def test_a_hub_name_with_network(monkeypatch, bpe_file):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name: asked.append(name) or str(bpe_file))
    tokenizer = load_tokenizer("some-org/some-model")
    assert asked == [("some-org/some-model", "tokenizer.json")]
    assert tokenizer.id == load_tokenizer(str(bpe_file)).id
