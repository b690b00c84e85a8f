"""Weights written by hand for state tracking: right at every position, in prefill and decode; rotation is needed."""

import math

import jax
import numpy as np
import pytest

from experiments.state_tracking import exact
from m3jax.data.tasks import get_task

LENGTH, DECODED = 2000, 200


@pytest.mark.parametrize("name", ["parity", "z60", "s3"])
def test_every_position_is_right(name):
    solution = exact.SOLUTIONS[name]()
    tokens, answers = exact.sequences(solution.task, LENGTH)
    for decode, length in ((False, LENGTH), (True, DECODED)):
        score = exact.score(solution, tokens[:, :length], answers[:, :length], decode=decode)
        assert score.right == score.positions == exact.ROWS * length
        assert score.longest_right_prefix == length
        assert score.smallest_margin > 0.2


@pytest.mark.parametrize("name", ["parity", "z3"])
def test_without_rotation_it_guesses(name):
    solution = exact.without_rotation(exact.SOLUTIONS[name]())
    tokens, answers = exact.sequences(solution.task, LENGTH)
    score = exact.score(solution, tokens, answers, decode=False)
    chance = solution.task.chance
    assert score.right / score.positions < chance + 6 * math.sqrt(chance * (1 - chance) / score.positions)
    assert score.longest_right_prefix < 20 and score.smallest_margin < 0


def test_answers_of_parity_end_with_the_task_s_own():
    task = get_task("parity")
    tokens, answers = exact.sequences(task, LENGTH, seed=3)
    drawn = LENGTH + 1  # which counts the answer
    batch = jax.jit(lambda key: task.sample(key, exact.ROWS, drawn, drawn, LENGTH))(jax.random.key(3))
    np.testing.assert_array_equal(tokens, batch.tokens)
    np.testing.assert_array_equal(answers[:, -1], batch.targets[:, -1])
    assert batch.mask[:, -1].all() and set(np.asarray(answers).ravel()) == {1, 2}


def test_cyclic_groups_split_into_prime_powers():
    assert exact.cyclic(60).config.n_angles == 3  # 4, 3, 5
    assert exact.cyclic(8).config.n_angles == exact.cyclic(7).config.n_angles == 1
