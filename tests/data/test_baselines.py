"""The baselines of experiments/bits_per_byte: distributions sum to one, agree with plain Python, and see one split."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bits_per_byte import baselines, report
from experiments.bits_per_byte.baselines import NGramModel, read_split, xz_bits_per_byte
from m3jax.data import load_tokenizer
from m3jax.data.parts import open_part
from m3jax.errors import ConfigError, DataError
from tests.tolerances import assert_close, rounding


def _plain_kneser_ney(train: bytes, order: int, context: bytes) -> list[float]:
    """The distribution after `context`, from the definition of interpolated modified Kneser-Ney smoothing."""
    counts = [Counter(train[i : i + order + 1] for i in range(len(train) - order))]
    for _ in range(order):
        counts.append(Counter(sequence[1:] for sequence in counts[-1]))
    p = [1 / 256] * 256
    for k, of_length in enumerate(reversed(counts)):
        n = Counter(of_length.values())
        discounts = [0.0]
        for i in (1, 2, 3):
            d = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i] if n[1] and n[i] else 0.0
            discounts.append(d if d > 0 else 0.5)
        following = {s[-1]: count for s, count in of_length.items() if s[:-1] == context[len(context) - k :]}
        if following:
            left_over = sum(discounts[min(count, 3)] for count in following.values())
            kept = [following.get(w, 0) - discounts[min(following.get(w, 0), 3)] for w in range(256)]
            p = [(kept[w] + left_over * p[w]) / sum(following.values()) for w in range(256)]
    return p


def _distribution(model: NGramModel, context: bytes) -> np.ndarray:
    contexts = np.tile(np.frombuffer(context, np.uint8), (256, 1)).reshape(256, model.order)
    return model.probabilities(contexts, np.arange(256, dtype=np.uint8))


@settings(max_examples=30)
@given(
    train=st.text("abc", min_size=7, max_size=60),
    context=st.text("abcd", min_size=6, max_size=6),
    order=st.integers(0, 6),
)
def test_ngram_probabilities_follow_their_definition(train, context, order):
    context = context.encode()[:order]
    distribution = _distribution(NGramModel(train.encode(), order), context)
    assert (distribution > 0).all()
    expected = _plain_kneser_ney(train.encode(), order, context)
    assert_close(distribution, expected, rounding("float64", 256), "p")
    assert_close(distribution.sum(), 1.0, rounding("float64", 256), "sum")


def test_ngram_takes_every_byte():
    train = bytes(range(256)) * 3 + bytes(range(255, -1, -1))
    model = NGramModel(train)
    for context in (train[:5], bytes([255] * 5), bytes([0, 255, 0, 128, 127])):
        assert_close(_distribution(model, context).sum(), 1.0, rounding("float64", 256), "sum")


def test_ngram_bits_reach_back_into_the_training_text():
    train, held_out = b"abracadabra, " * 4, b"abra"
    model = NGramModel(train, order=3)
    expected = [-math.log2(_plain_kneser_ney(train, 3, (train + held_out[:i])[-3:])[held_out[i]]) for i in range(4)]
    assert_close(model.bits_per_byte(train, held_out), np.mean(expected), rounding("float64", 256), "bits per byte")


def test_xz_profits_from_the_training_text():
    text = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    assert xz_bits_per_byte(b"", text) > 8
    assert xz_bits_per_byte(text, text[5000:10_000]) < 1


def test_the_split_is_that_of_the_training_data(make_config):
    config = make_config(source="kjv")
    train, held_out = read_split(config.data)
    tokenizer = load_tokenizer("bytes")
    for part, text in (("train", train), ("validation", held_out)):
        tokens = open_part(config, tokenizer, part)
        assert tokenizer.decode(tokens.stream.read(0, tokens.end)) == text.decode()


def test_no_split(make_config):
    with pytest.raises(ConfigError, match="nothing is held out"):
        read_split(make_config(holdout=0.0).data)


def test_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("all work and no play makes jack a dull boy\n" * 200)
    (tmp_path / "b.txt").write_text("all work and no joy\n")
    overrides = [f"--config.data.source={tmp_path}/a.txt", f"--config.data.validation_source={tmp_path}/b.txt"]
    baselines.main([*overrides, "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["train_bytes"], result["held_out_bytes"]) == (8600, 20)
    assert result["ngram_order_5"] < result["xz_alone"]
    printed = capsys.readouterr().out
    for name in ("xz_alone", "xz_given_train", "ngram_order_5"):
        assert f"{result[name]:.4f}" in printed


def test_report(tmp_path, capsys):
    files = {
        "evaluation": {"bytes": 20, "step": 3, "bits_per_byte": 2.5},
        "baselines": {"held_out_bytes": 20, "xz_alone": 3.0, "xz_given_train": 2.0, "ngram_order_5": 4.0},
    }

    def run(**changed):
        for name, values in files.items():
            (tmp_path / name).write_text(json.dumps(changed.get(name, values)))
        report.main([f"--{name}={tmp_path / name}" for name in files])

    run()
    ranked = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert ranked == ["2.0000", "2.5000", "3.0000", "4.0000"]
    with pytest.raises(DataError, match="measured on 21 bytes, the baselines on 20: evaluate all"):
        run(evaluation=files["evaluation"] | {"bytes": 21})
    for other in ([], {}, files["evaluation"]):
        with pytest.raises(DataError, match=r"baselines: expected what baselines\.py --json wrote"):
            run(baselines=other)
