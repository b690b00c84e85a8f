"""Batches of few shapes hold every sequence once and keep their limits."""

from hypothesis import given
from hypothesis import strategies as st

from m3jax.inference.batches import Batch, length_batches
from m3jax.inference.prompts import length_bucket

LENGTHS = st.lists(st.integers(1, 200), max_size=60)


@given(LENGTHS, st.integers(1, 500), st.none() | st.integers(1, 9))
def test_every_sequence_once_within_the_limits(lengths, batch_tokens, most_rows):
    batches = list(length_batches(lengths, batch_tokens, most_rows))
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(lengths)))
    for batch in batches:
        assert {length_bucket(lengths[i]) for i in batch.members} == {batch.size}
        assert 1 <= len(batch.members) <= batch.rows < 2 * len(batch.members) or batch.rows == 1
        assert batch.rows == 1 or batch.rows * batch.size <= batch_tokens
        assert most_rows is None or batch.rows <= most_rows
    sizes = [batch.size for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert len({(batch.rows, batch.size) for batch in batches}) <= 2 * len(set(sizes))


def test_those_left_over_make_a_power_of_two():
    assert list(length_batches([16] * 13, 6 * 16)) == [
        Batch([0, 1, 2, 3, 4, 5], 6, 16),
        Batch([6, 7, 8, 9, 10, 11], 6, 16),
        Batch([12], 1, 16),
    ]
    assert [batch.rows for batch in length_batches([16] * 3, 100 * 16)] == [4]
