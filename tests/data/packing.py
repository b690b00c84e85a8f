"""What packing means, in plain Python: an oracle for the windows and batches of m3jax.data."""

import itertools

import numpy as np

Row = list[tuple]


def pack(texts: list[str], length: int, keep_remainder: bool) -> list[Row]:
    """Packs the bytes of texts into rows of (token, target, document within the row from 1, weight)."""
    stream = []
    for number, text in enumerate(text for text in texts if text):
        stream += [(token, number) for token in [256, *text.encode(), 257]]
    rows = []
    for first in range(0, len(stream) - 1, length):
        pairs = list(itertools.pairwise(stream[first : first + length + 1]))
        if len(pairs) < length and not keep_remainder:
            break
        row = [(a, b, 1 + i - pairs[0][0][1], float(i == j)) for (a, i), (b, j) in pairs]
        rows.append(row + [(0, 0, 0, 0.0)] * (length - len(pairs)))
    return rows


def rows(batch: dict[str, np.ndarray]) -> list[Row]:
    """Turns a batch into rows like those of `pack`."""
    names = ("tokens", "targets", "segment_ids", "weights")
    return [list(zip(*row, strict=True)) for row in zip(*(batch[name].tolist() for name in names), strict=True)]
