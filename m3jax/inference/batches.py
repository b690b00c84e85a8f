"""Sequences of any lengths divided into batches of few shapes, each of which compiles once."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from m3jax.inference.prompts import length_bucket


class Batch(NamedTuple):
    """Sequences that are computed together.

    Attributes:
      members: their numbers.
      rows: how many sequences it is computed with, at least as many: full batches have all the same number, the few
        that are left over a power of two.
      size: the padded length of each.
    """

    members: list[int]
    rows: int
    size: int


def length_batches(lengths: Sequence[int], batch_tokens: int, most_rows: int | None = None) -> Iterator[Batch]:
    """Divides sequences into batches of one padded length each (see `length_bucket`), the longest first.

    Args:
      lengths: of the sequences.
      batch_tokens: a batch has at most this many positions, padding included, or one sequence.
      most_rows: and at most this many sequences.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for size, group in groupby(order, key=lambda i: length_bucket(lengths[i])):
        members, full = list(group), max(1, batch_tokens // size)
        full = full if most_rows is None else min(full, most_rows)
        for start in range(0, len(members), full):
            some = members[start : start + full]
            yield Batch(some, min(full, 1 << (len(some) - 1).bit_length()), size)
