"""Modular arithmetic: digits and operators are even, trees are cut evenly, answers have their exact distribution."""

from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from m3jax.data.tasks import TASKS
from tests.data.tasks.frequencies import assert_frequencies, evenly
from tests.data.tasks.oracles import spell, tree
from tests.data.tasks.test_tasks import sample

OPERATORS = {"modular_arithmetic_brackets": "+-*", "modular_arithmetic_brackets_without_times": "+-"}
VARIANTS = pytest.mark.parametrize("name", OPERATORS)


def joined(left: np.ndarray, right: np.ndarray, operator: str) -> np.ndarray:
    """The distribution, [5], of the result when the sides are independent."""
    a, b = np.arange(5)[:, None], np.arange(5)[None, :]
    results = {"+": a + b, "-": a - b, "*": a * b}[operator] % 5
    return np.bincount(results.ravel(), weights=np.outer(left, right).ravel(), minlength=5)


@cache
def bracket_answers(size: int, operators: str) -> tuple[float, ...]:
    """The exact distribution of the value of an expression of the grammar."""
    if size < 5:
        return (1 / 5,) * 5
    cuts = range(1, size - 3)
    sides = [
        (np.array(bracket_answers(k, operators)), np.array(bracket_answers(size - k - 3, operators))) for k in cuts
    ]
    parts = [joined(left, right, operator) for left, right in sides for operator in operators]
    return tuple(np.mean(parts, axis=0).tolist())


def flat_answers(n_digits: int) -> np.ndarray:
    """The exact distribution of the value without brackets: a chain over (sum of the terms before, present term)."""
    even = np.full(5, 1 / 5)
    chain = np.zeros((5, 5))
    chain[0] = even
    for _ in range(n_digits - 1):
        closed = np.zeros(5)
        longer = np.zeros((5, 5))
        for total in range(5):
            for term in range(5):
                closed[(total + term) % 5] += chain[total, term]
                for digit in range(5):
                    longer[total, term * digit % 5] += chain[total, term] / 5
        # A difference begins a term with the opposite of an even digit, which is even, too.
        chain = longer / 3 + 2 / 3 * closed[:, None] * even[None, :]
    return np.array([sum(chain[t, (v - t) % 5] for t in range(5)) for v in range(5)])


def test_digits_and_operators_without_brackets():
    batch = sample("modular_arithmetic", 0, 2048, 21, 21)
    text = "".join(spell(row, "modular_arithmetic")[:-1] for row in batch.tokens.tolist())
    assert_frequencies([c for c in text if c.isdigit()], evenly("01234"))
    assert_frequencies([c for c in text if not c.isdigit()], evenly("+-*"))


@pytest.mark.parametrize("length", [3, 5, 7, 21])
def test_answers_without_brackets(length):
    batch = sample("modular_arithmetic", 1, 8192, length, length)
    expected = flat_answers((length - 1) // 2)
    assert_frequencies(batch.targets[batch.mask], {5 + value: p for value, p in enumerate(expected)})


def nodes(parsed, found: list) -> None:
    if isinstance(parsed, tuple):
        found.append(parsed)
        nodes(parsed[1], found)
        nodes(parsed[3], found)


def leaves(parsed) -> str:
    return leaves(parsed[1]) + leaves(parsed[3]) if isinstance(parsed, tuple) else parsed


@VARIANTS
def test_grammar(name):
    batch = sample(name, 2, 2048, 43, 43)
    cuts, operators, digits = defaultdict(list), [], []
    for row in batch.tokens.tolist():
        parsed = tree(spell(row[:40], "modular_arithmetic_brackets"))
        digits += [c for c in leaves(parsed) if c.isdigit()]
        found = []
        nodes(parsed, found)
        for size, left, operator, _ in found:
            cuts[size].append(left[0] if isinstance(left, tuple) else len(left))
            operators.append(operator)
    assert_frequencies(digits, evenly("01234"))
    assert_frequencies(operators, evenly(OPERATORS[name]))
    assert cuts.keys() == {40, *range(5, 37)}
    for size, lefts in cuts.items():
        assert_frequencies(lefts, evenly(range(1, size - 3)))


def test_half_of_the_uneven_expressions_are_cut_near_an_end():
    batch = sample("modular_arithmetic_brackets_without_times_uneven", 2, 2048, 43, 43)
    lefts = []
    for row, answer in zip(batch.tokens.tolist(), batch.targets[batch.mask], strict=True):
        text = spell(row[:40], "modular_arithmetic_brackets")
        assert eval(text) % 5 == answer
        _, left, *_ = tree(text)
        lefts.append(left[0] if isinstance(left, tuple) else len(left))
    near_an_end = (*range(1, 9), *range(29, 37))
    assert_frequencies(lefts, {n: 1 / 72 + (n in near_an_end) / 32 for n in range(1, 37)})


@VARIANTS
@pytest.mark.parametrize("length", [5, 8, 9, 12, 13, 43])
def test_answers_with_brackets(name, length):
    batch = sample(name, 3, 8192, length, length, width=41)
    expected = bracket_answers(length - 3, OPERATORS[name])
    assert_frequencies(batch.targets[batch.mask], dict(enumerate(expected)))


def test_what_a_constant_answer_reaches():
    # The figures of the docstrings.
    for length, figure in ((3, 0.2), (5, 0.2533), (21, 0.2003), (255, 0.2)):
        assert max(flat_answers((length - 1) // 2)) == pytest.approx(figure, abs=1e-4)
    for length, figure in ((40, 0.2904), (256, 0.3114)):
        assert bracket_answers(length - 3, "+-*")[0] == pytest.approx(figure, abs=1e-4)
        assert max(bracket_answers(length - 3, "+-")) == pytest.approx(0.2)
    for name in ("modular_arithmetic", *OPERATORS):
        assert TASKS[name].chance == 0.2
