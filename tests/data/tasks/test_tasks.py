"""All tasks: answers against the oracles, lengths, vocabularies, keys, jit, vmap, padding, errors."""

from functools import cache

import jax
import numpy as np
import pytest

from m3jax.data.tasks import TASKS, TaskBatch, get_task, scaled_accuracy
from m3jax.errors import ConfigError
from tests.data.tasks.frequencies import assert_frequencies, evenly
from tests.data.tasks.oracles import ORACLES

VOCABULARIES = {
    "parity": 3, "even_pairs": 3, "cycle_navigation": 9, "modular_arithmetic": 10,
    "modular_arithmetic_brackets": 12, "modular_arithmetic_brackets_without_times": 12,
    "z60": 67, "s3": 13, "a4": 19, "a5": 67, "s5": 127, "mqar_4": 8192, "mqar_blank_4": 8192,
}  # fmt: skip
EVERY_TASK = pytest.mark.parametrize("name", VOCABULARIES)
# Examples of the docstrings: tokens, length, answer.
EXAMPLES = {
    "parity": ([2, 1, 2, 2, 1], 6, 2),
    "even_pairs": ([2, 1, 1, 2, 1], 5, 2),
    "cycle_navigation": ([3, 3, 1, 2], 4, 8),
    "modular_arithmetic": ([7, 2, 6, 3, 9, 1, 8, 4], 9, 6),
    "modular_arithmetic_brackets": ([8, 8, 6, 2, 9, 5, 8, 1, 9, 9, 10], 13, 4),
    "z60": ([61, 20, 50, 7], 3, 17),
}
# Tokens and answers of the key 7 at the length 11, 16 for recall: what a key gives stays.
ROWS = {
    "parity": ([2, 1, 1, 2, 1, 1, 1, 1, 2, 2], [1]),
    "even_pairs": ([2, 1, 1, 2, 1, 1, 1, 1, 2, 2, 1], [2]),
    "cycle_navigation": ([2, 3, 1, 2, 1, 1, 2, 1, 3, 1, 2], [6]),
    "modular_arithmetic": ([9, 2, 8, 2, 5, 2, 8, 1, 8, 4], [6]),
    "modular_arithmetic_brackets": ([8, 8, 6, 1, 9, 6, 2, 9, 10], [2]),
    "modular_arithmetic_brackets_without_times": ([8, 8, 6, 1, 9, 5, 2, 9, 10], [1]),
    "z60": ([61, 19, 38, 0, 13, 18, 30, 16, 54, 53, 3, 4], [61, 19, 57, 57, 10, 28, 58, 14, 8, 1, 4, 8]),
    "s3": ([7, 1, 2, 0, 1, 0, 0, 4, 0, 5, 3, 4], [7, 1, 4, 4, 5, 5, 5, 1, 1, 3, 4, 3]),
    "a4": ([13, 7, 2, 0, 1, 6, 6, 4, 6, 5, 3, 4], [13, 7, 6, 6, 7, 11, 5, 11, 5, 9, 2, 10]),
    "a5": ([61, 19, 38, 0, 13, 18, 30, 16, 54, 53, 3, 4], [61, 19, 2, 2, 12, 9, 18, 38, 23, 33, 26, 34]),
    "s5": ([121, 79, 38, 60, 13, 78, 30, 76, 114, 53, 63, 4], [121, 79, 43, 13, 23, 67, 99, 92, 51, 87, 44, 47]),
    "mqar_4": (
        [4011, 8100, 1926, 5890, 535, 6515, 3263, 8104, 1926, 6962, 535, 1635, 4011, 7452, 3263, 690],
        [5890, 6515, 8100, 8104],
    ),
    "mqar_blank_4": (
        [4011, 8100, 1926, 5890, 535, 6515, 3263, 8104, 1926, 0, 535, 0, 4011, 0, 3263, 0],
        [5890, 6515, 8100, 8104],
    ),
}  # fmt: skip


@cache
def sampler(name: str, batch_size: int, width: int):
    """The task's sample, compiled with traced lengths."""
    return jax.jit(lambda key, low, high: TASKS[name].sample(key, batch_size, low, high, width))


def sample(name: str, seed: int, batch_size: int, shortest: int, longest: int, width: int | None = None) -> TaskBatch:
    width = width or TASKS[name].positions(longest)
    batch = sampler(name, batch_size, width)(jax.random.key(seed), shortest, longest)
    return TaskBatch(*(np.asarray(array) for array in batch))


def assert_answers(name: str, batch: TaskBatch) -> None:
    assert all(array.dtype == np.int32 for array in (batch.tokens, batch.targets, batch.lengths))
    assert batch.mask.dtype == bool
    for tokens, targets, mask, length in zip(*batch, strict=True):
        expected = ORACLES[name](tokens.tolist(), int(length))
        assert np.flatnonzero(mask).tolist() == list(expected)
        assert targets[mask].tolist() == list(expected.values())
        assert not targets[~mask].any()


def lengths_at_hand(name: str) -> tuple[int, int]:
    """A range whose lower end is the least the task has, or 3, and whose upper end is odd."""
    least = max(TASKS[name].shortest, 3)
    return least, least + 18


@EVERY_TASK
def test_vocabulary(name):
    assert TASKS[name].vocab_size == VOCABULARIES[name]
    batch = sample(name, 0, 1024, *lengths_at_hand(name))
    for tokens in (batch.tokens, batch.targets):
        assert tokens.min() >= 0
        assert tokens.max() < VOCABULARIES[name]


@pytest.mark.parametrize("name", ORACLES)
def test_answers_by_brute_force(name):
    low, high = lengths_at_hand(name)
    assert_answers(name, sample(name, 0, 1024, low, high))
    assert_answers(name, sample(name, 1, 256, low, high, width=64))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("longer", [0, 1])
def test_answers_at_single_lengths(name, longer):
    # Arithmetic draws the odd length below an even one, recall needs an even one.
    length = TASKS[name].shortest + (2 * longer if name == "mqar_blank_4" else longer)
    batch = sample(name, longer, 32, length, length, width=TASKS[name].positions(TASKS[name].shortest + 6))
    assert set(batch.lengths) == {
        "modular_arithmetic": {2 * ((length + 1) // 2) - 1},
        "modular_arithmetic_brackets": {max(length, 5)},
        "modular_arithmetic_brackets_without_times": {max(length, 5)},
    }.get(name, {length})
    assert_answers(name, batch)


@pytest.mark.parametrize("name", ORACLES)
def test_answers_at_the_lengths_of_the_evaluation(name):
    assert_answers(name, sample(name, 2, 64, 40, 256))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_docstrings(name):
    tokens, length, answer = EXAMPLES[name]
    last, got = list(ORACLES[name]([*tokens, 0] if "brackets" in name else tokens, length).items())[-1]
    assert (last, got) == (len(tokens) - 1, answer)


@EVERY_TASK
def test_lengths_are_drawn_evenly(name):
    low, high = lengths_at_hand(name)
    lengths = range(low, high + 1)
    expected = evenly(lengths)
    if name == "modular_arithmetic":
        expected = evenly(range(low, high + 1, 2))
    elif "brackets" in name:
        expected = {n: (3 if n == 5 else 1) / len(lengths) for n in lengths if n >= 5}
    elif "mqar" in name:
        expected = evenly(range(low, high + 1, 2))
    batches = [sample(name, seed, 1024, low, high) for seed in range(4)]
    assert_frequencies(np.concatenate([batch.lengths for batch in batches]), expected)


def test_an_even_shortest_length_of_arithmetic_admits_the_odd_one_below():
    assert_frequencies(sample("modular_arithmetic", 0, 2048, 4, 8).lengths, evenly([3, 5, 7]))


@EVERY_TASK
def test_a_key_determines_its_batch(name):
    low, high = lengths_at_hand(name)
    first, again, other = (sample(name, seed, 1024, low, high) for seed in (4, 4, 5))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.tokens != other.tokens).any()
    assert len({tuple(row) for row in first.tokens.tolist()}) > 512, "rows differ"


@EVERY_TASK
def test_rows_of_a_key_stay(name):
    length = max(TASKS[name].shortest, 11)
    batch = sample(name, 7, 1, length, length)
    assert (batch.tokens[0].tolist(), batch.targets[batch.mask].tolist()) == ROWS[name]


@EVERY_TASK
def test_other_lengths_do_not_compile_again(name):
    low, high = lengths_at_hand(name)
    draw = sampler(name, 1024, TASKS[name].positions(high))
    for longest in (low + 2, low + 7, high):
        draw(jax.random.key(0), low, longest)
    assert draw._cache_size() == 1


@pytest.mark.parametrize("name", ["modular_arithmetic", "modular_arithmetic_brackets", "s3", "mqar_4"])
def test_batches_of_several_runs_are_those_of_each(name):
    task, (low, high) = TASKS[name], lengths_at_hand(name)
    keys = jax.random.split(jax.random.key(6), 3)
    longest = np.array([low + 4, low + 9, high])

    def draw(key, longest):
        return task.sample(key, 8, low, longest, task.positions(high))

    together = jax.jit(jax.vmap(draw))(keys, longest)
    for i in range(3):
        for run, alone in zip(together, jax.jit(draw)(keys[i], longest[i]), strict=True):
            np.testing.assert_array_equal(run[i], alone)


@pytest.mark.parametrize("name", ["modular_arithmetic", "modular_arithmetic_brackets", "s3", "mqar_4"])
def test_64_bit_types_change_nothing(name, x64):
    task, (low, high) = TASKS[name], lengths_at_hand(name)
    wide = jax.jit(lambda key: task.sample(key, 1024, low, high, task.positions(high)))(jax.random.key(4))
    with jax.enable_x64(False):
        narrow = sample(name, 4, 1024, low, high)
    for a, b in zip(wide, narrow, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("lengths", "width", "message"),
    [
        ((1, 40), 40, "task 'parity': shortest = 1: expected at least 2"),
        ((5, 4), 40, "task 'parity': longest = 4: expected at least 5"),
        ((3, 40), 38, "task 'parity': width = 38: expected at least 39 positions"),
    ],
)
def test_lengths_that_cannot_be(lengths, width, message):
    with pytest.raises(ConfigError, match=message):
        TASKS["parity"].sample(jax.random.key(0), 4, *lengths, width)


def test_registry():
    assert all(get_task(name) is task and task.name == name for name, task in TASKS.items())
    with pytest.raises(ConfigError, match=r"task 'paritty': not known\. Did you mean 'parity'\?"):
        get_task("paritty")


@pytest.mark.parametrize("name", ["parity", "even_pairs", "cycle_navigation"])
def test_a_constant_answer_is_at_chance(name):
    batches = [sample(name, seed, 256, 20, 40, width=64) for seed in range(8)]
    answers = np.concatenate([batch.targets[batch.mask] for batch in batches])
    first = {"parity": 1, "even_pairs": 1, "cycle_navigation": 4}[name]
    expected = evenly(range(first, first + round(1 / TASKS[name].chance)))
    assert_frequencies(answers, expected)


def test_scaled_accuracy():
    assert scaled_accuracy(0.5, 0.5) == 0
    assert scaled_accuracy(1.0, 0.2) == 1
    assert scaled_accuracy(0.1, 0.2) == pytest.approx(-0.125)
    np.testing.assert_allclose(scaled_accuracy(np.array([0.2, 0.6]), 0.2), [0, 0.5])
