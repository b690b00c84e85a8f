"""Padding of prompts, and which are read together."""

import numpy as np
import pytest

from m3jax.errors import DataError
from m3jax.inference.prompts import check_prompts, left_pad, length_bucket, plan_prefills


def test_buckets_are_few_and_never_much_too_long():
    buckets = [length_bucket(n) for n in range(1, 5000)]
    assert buckets == sorted(buckets)
    assert all(n <= bucket < max(16.5, 1.5 * n) for n, bucket in enumerate(buckets, start=1))
    assert sorted(set(buckets))[:7] == [16, 24, 32, 48, 64, 96, 128]
    assert length_bucket(3, smallest=256) == 256


def test_left_pad_ends_every_prompt_at_the_last_position():
    tokens, segment_ids = left_pad([np.array([5]), np.arange(1, 19), np.array([7, 8, 9])], 4, 24)
    assert tokens.shape == segment_ids.shape == (4, 24)
    assert {tokens.dtype, segment_ids.dtype} == {np.dtype(np.int32)}
    assert segment_ids.sum(axis=1).tolist() == [1, 18, 3, 0]
    assert tokens[0, -1] == 5
    assert tokens[1, -18:].tolist() == list(range(1, 19))
    assert tokens[2, -3:].tolist() == [7, 8, 9]
    assert (np.diff(segment_ids, axis=1) >= 0).all()
    assert not (tokens * (1 - segment_ids)).any()


def test_prefills_have_every_prompt_once_in_arrays_that_its_bucket_decides():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 99, n) for n in rng.integers(1, 100, 40)]
    prompts += [prompts[i] for i in (3, 3, 17)]
    plans = plan_prefills(prompts, most_rows=7, tokens=200)
    members = [i for plan in plans for i in plan.members]
    assert sorted(members) == list(range(43))
    read = {(plan.tokens[row][plan.segment_ids[row] == 1].tobytes()) for plan in plans for row in set(plan.source)}
    assert len(read) == sum(len(set(plan.source)) for plan in plans) == 40
    for plan in plans:
        n_rows, size = plan.tokens.shape
        assert n_rows == max(1, min(7, 200 // size))
        for i, row in zip(plan.members, plan.source, strict=True):
            assert length_bucket(len(prompts[i])) == size
            assert plan.tokens[row][plan.segment_ids[row] == 1].tolist() == prompts[i].tolist()


@pytest.mark.parametrize(
    ("prompt_tokens", "message"),
    [
        ([], "no rows"),
        (np.zeros((0, 4), int), "no rows"),
        ([[1], []], r"prompt_tokens\[1\] is empty"),
        (np.zeros((2, 0), int), r"prompt_tokens\[0\] is empty"),
        ([[1, 2], [3, 10]], r"prompt_tokens\[1\]\[1\] = 10: expected a token id in \[0, 10\)"),
        (np.array([[0, -1]]), r"prompt_tokens\[0\]\[1\] = -1: expected"),
        ([[0.5]], "expected integer token ids"),
        ([[True]], "expected integer token ids"),
        (["In the beginning"], "expected a sequence of token ids"),
        ("In the beginning", "expected a sequence of token ids"),
        ([1, 2, 3], "expected a sequence of token ids"),
        (np.arange(3), r"shape \(3,\): expected \[prompts, length\]"),
        (7, r"shape \(\): expected \[prompts, length\]"),
    ],
)
def test_bad_prompts_are_named(prompt_tokens, message):
    with pytest.raises(DataError, match=message):
        check_prompts(prompt_tokens, vocab_size=10)
