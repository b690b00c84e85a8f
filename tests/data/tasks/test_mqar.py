"""Recall: what stands where, distinct keys and values, the law of the gaps, blanks filled or not."""

import itertools

import jax
import numpy as np
import pytest

from m3jax.data.tasks import TASKS, TaskBatch, mqar
from m3jax.errors import ConfigError
from tests.data.tasks import oracles
from tests.data.tasks.frequencies import assert_frequencies, evenly
from tests.data.tasks.test_tasks import sample


def small(batch_size: int, longest: int, seed: int = 0, *, pairs: int = 2, shortest: int | None = None, **options):
    task = mqar("small", pairs, vocab_size=12, **options)
    draw = jax.jit(lambda key: task.sample(key, batch_size, shortest or longest, longest, longest))
    return TaskBatch(*(np.asarray(array) for array in draw(jax.random.key(seed))))


def power_law(space: int) -> np.ndarray:
    weights = 0.01 * np.arange(1, space + 1) ** (0.01 - 1)
    return weights / weights.sum()


def test_sizes_of_the_sweep():
    assert [name for name in TASKS if name.startswith("mqar")] == [
        *(f"mqar{kind}_{pairs}" for kind in ("", "_blank") for pairs in (4, 8, 16, 32, 64, 128, 256)),
        *(f"mqar_few_{pairs}" for pairs in (2, 4, 8, 16)),
    ]
    assert TASKS["mqar_64"].shortest == 256
    assert TASKS["mqar_64"].chance == 1 / 4096


@pytest.mark.parametrize("length", [8, 16])
def test_answers_with_few_tokens(length):
    batch = small(512, length, random_blanks=False)
    answers = oracles.mqar(2, 12, blank=True)
    for tokens, targets, mask, n in zip(*batch, strict=True):
        expected = answers(tokens.tolist(), int(n))
        assert len(expected) == 2
        assert {int(i): int(targets[i]) for i in np.flatnonzero(mask)} == expected


@pytest.mark.parametrize(("pairs", "length"), [(4, 64), (16, 64), (64, 256)])
def test_filled_blanks(pairs, length):
    batch = sample(f"mqar_{pairs}", 0, 32, length, length, width=length + 4)
    form = oracles.mqar(pairs, 8192, blank=False)
    for tokens, targets, mask, n in zip(*batch, strict=True):
        form(tokens.tolist(), int(n))
        memory = dict(zip(tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        places = np.flatnonzero(mask)
        assert (places >= 2 * pairs).all()
        assert (places % 2 == 0).all()
        assert sorted(tokens[places].tolist()) == sorted(memory), "each key is asked for once"
        assert targets[places].tolist() == [memory[key] for key in tokens[places].tolist()]


def test_filled_and_blank_differ_only_in_the_blanks():
    filled, blank = small(512, 16, random_blanks=True), small(512, 16, random_blanks=False)
    np.testing.assert_array_equal(filled.targets, blank.targets)
    np.testing.assert_array_equal(filled.tokens[blank.tokens != 0], blank.tokens[blank.tokens != 0])
    assert_frequencies(filled.tokens[blank.tokens == 0], evenly(range(12)))


def test_keys_and_values_are_drawn_without_replacement():
    context = small(32768, 16, pairs=4).tokens[:, :8]
    for drawn, among in ((context[:, ::2], range(1, 6)), (context[:, 1::2], range(6, 12))):
        ordered = itertools.permutations(among, 4)
        assert_frequencies(
            drawn @ [12**3, 12**2, 12, 1], evenly(int(np.dot(v, [12**3, 12**2, 12, 1])) for v in ordered)
        )


def test_gaps_follow_the_power_law_without_replacement():
    batch = small(32768, 16)
    p = power_law(6)
    ordered = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(6), 2)}
    gaps = []
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        place = {int(tokens[i]): (i - 4) // 2 for i in np.flatnonzero(mask)}
        gaps.append(10 * place[int(tokens[0])] + place[int(tokens[2])])
    assert_frequencies(np.array(gaps) // 10, dict(enumerate(p)))
    assert_frequencies(gaps, {10 * i + j: probability for (i, j), probability in ordered.items()})


def test_gaps_keep_within_each_length():
    batch = small(16384, 16, pairs=1, shortest=4)
    for length in range(4, 17, 2):
        rows = batch.mask[batch.lengths == length]
        expected = {2 + 2 * gap: p for gap, p in enumerate(power_law(length // 2 - 1))}
        assert_frequencies(rows.argmax(axis=1), expected)


def test_too_short_for_the_pairs():
    with pytest.raises(ConfigError, match="task 'mqar_4': shortest = 14: expected at least 16"):
        TASKS["mqar_4"].sample(jax.random.key(0), 4, 14, 64, 64)


def test_odd_lengths():
    """Those that are traced, as lengths of packed rows are, count as the even ones below."""
    for shortest, longest, message in ((17, 64, "shortest = 17"), (16, 63, "longest = 63")):
        with pytest.raises(ConfigError, match=f"task 'mqar_4': {message}: expected an even length"):
            TASKS["mqar_4"].sample(jax.random.key(0), 4, shortest, longest, 64)
    traced, even = sample("mqar_blank_4", 0, 32, 17, 17), sample("mqar_blank_4", 0, 32, 16, 16, width=17)
    for one, other in zip(traced, even, strict=True):
        np.testing.assert_array_equal(one, other)
