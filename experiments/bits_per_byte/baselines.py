"""Bits per byte of held-out text under two compressors that need no model: xz, and a 5-byte-context n-gram model.

    python experiments/bits_per_byte/baselines.py [--config configs/tiny_mimo.py] [--config.data.KEY=VALUE] [--json OUT]

The split is the one that training and evaluation use. Both baselines may look at the training part and at the held-out
text that comes before a byte, nothing else:

- xz: the bytes by which xz -9e grows when the held-out part is appended to the training part, with a window over all of
  it; and, for comparison, xz of the held-out part alone.
- n-gram: interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1999) over bytes, counted on the training part,
  contexts of up to order = 5 preceding bytes; below them the uniform distribution over the 256 bytes.
"""

import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3jax.cli import Parser, read_config, run_main
from m3jax.config import Config, DataConfig, build_config, override
from m3jax.data.corpus import divide, open_text_source
from m3jax.errors import ConfigError

ORDER = 5


def read_split(data: DataConfig) -> tuple[bytes, bytes]:
    """Returns the training and the held-out text of a data config, whole.

    Raises:
      ConfigError: nothing is held out.
      DataError: a source that cannot be read or is no text.
    """
    holdout = data.holdout if data.validation_source is None else 0.0
    if holdout == 0 and data.validation_source is None:
        raise ConfigError("config.data.holdout = 0 and config.data.validation_source = None: nothing is held out.")
    parts = {"train": [], "validation": []}
    for part, piece in divide(open_text_source(data.source, data), holdout)[0]:
        parts[part].append(piece.text.encode())
    if data.validation_source is not None:
        held_out = open_text_source(data.validation_source, data).pieces()
        parts["validation"] = [piece.text.encode() for piece in held_out]
    return b"".join(parts["train"]), b"".join(parts["validation"])


def xz_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Returns the bits per byte of `held_out` when xz has seen `train` (which may be empty) before it."""
    grown = _xz_size(train + held_out) - (_xz_size(train) if train else 0)
    return 8 * grown / len(held_out)


@dataclass(frozen=True)
class _Order:
    """Counts for the contexts of k bytes; both key arrays ascend."""

    sequences: np.ndarray  # [m] keys of the sequences of k + 1 bytes that occur
    discounted: np.ndarray  # [m] their counts, less the discount
    contexts: np.ndarray  # [c] keys of the contexts of k bytes that occur
    totals: np.ndarray  # [c] sum of the counts of the sequences that continue each
    left_over: np.ndarray  # [c] what the discounts took from each: the weight of the shorter context, times totals


class NGramModel:
    """An interpolated modified Kneser-Ney model of bytes."""

    def __init__(self, train: bytes, order: int = ORDER):
        """Counts.

        Args:
          train: the text to learn from.
          order: bytes of context, 0 to 6.
        """
        self.order = order
        text = np.frombuffer(train, np.uint8)
        sequences, counts = np.unique(_keys(text, order + 1), return_counts=True)
        orders = []
        for k in range(order, -1, -1):
            orders.append(_discount(sequences, counts, k))
            # A sequence one byte shorter counts once for each different byte that it follows.
            sequences, counts = np.unique(sequences & ((1 << 8 * k) - 1), return_counts=True)
        self._orders = orders[::-1]

    def probabilities(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns p(target | context).

        Args:
          contexts: [n, order] bytes, the last one nearest to the target.
          targets: [n] bytes.

        Returns:
          [n] float64; for any context the 256 targets sum to 1.
        """
        p = np.full(len(targets), 1 / 256)
        key = np.zeros(len(targets), np.int64)
        for k, counts in enumerate(self._orders):
            if k:
                key |= contexts[:, self.order - k].astype(np.int64) << 8 * (k - 1)
            where, seen = _find(counts.contexts, key)
            total = counts.totals[where]
            position, occurs = _find(counts.sequences, key << 8 | targets.astype(np.int64))
            longer = (np.where(occurs, counts.discounted[position], 0) + counts.left_over[where] * p) / total
            p = np.where(seen, longer, p)
        return p

    def bits_per_byte(self, before: bytes, text: bytes) -> float:
        """Returns the mean of -log2 p over the bytes of `text`, whose first contexts reach into `before`."""
        joined = np.frombuffer(before[len(before) - self.order :] + text, np.uint8)
        contexts = np.lib.stride_tricks.sliding_window_view(joined, self.order)[:-1]
        return float(-np.log2(self.probabilities(contexts, joined[self.order :])).mean())


def measure(config: Config) -> dict[str, float]:
    """Returns the bits per byte of the held-out text under each baseline, and the sizes of both parts in bytes."""
    train, held_out = read_split(config.data)
    return {
        "train_bytes": len(train),
        "held_out_bytes": len(held_out),
        "xz_alone": xz_bits_per_byte(b"", held_out),
        "xz_given_train": xz_bits_per_byte(train, held_out),
        f"ngram_order_{ORDER}": NGramModel(train).bits_per_byte(train, held_out),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments after the program's name; None = those of this process."""
    parser = Parser("experiments/bits_per_byte/baselines.py", "Bits per byte of held-out text without a model.")
    parser.add_argument("--config", type=Path, help="a config file; default: the bundled text")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments, overrides = parser.parse(argv)
    config = read_config(arguments.config, overrides) if arguments.config else build_config(override({}, overrides))
    result = measure(config)
    print(
        f"{result['held_out_bytes']:,} held-out bytes after {result['train_bytes']:,} of training text, bits per byte:"
    )
    print(f"  xz -9e, held-out part alone         {result['xz_alone']:.4f}")
    print(f"  xz -9e, given the training part     {result['xz_given_train']:.4f}")
    print(f"  order-{ORDER} n-gram (Kneser-Ney)         {result[f'ngram_order_{ORDER}']:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _xz_size(data: bytes) -> int:
    window = 1 << max(26, math.ceil(math.log2(len(data))))  # 64 MiB, what preset 9 has, or as much as there is text
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(window, 3 << 29)}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def _keys(text: np.ndarray, length: int) -> np.ndarray:
    """Returns every `length` consecutive bytes as one integer, the last byte lowest, int64 [n - length + 1]."""
    keys = np.zeros(len(text) - length + 1, np.int64)
    for offset in range(length):
        keys = keys << 8 | text[offset : offset + len(keys)]
    return keys


def _discount(sequences: np.ndarray, counts: np.ndarray, k: int) -> _Order:
    """Discounts the counts of sequences of k + 1 bytes: by D1, D2 or D3+ for counts of one, two or more."""
    n = [int(np.sum(counts == i)) for i in range(5)]
    discounts = np.full(4, 0.5)  # where n gives no estimate
    discounts[0] = 0
    for i in (1, 2, 3):
        if n[1] and n[i]:
            estimate = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i]
            discounts[i] = estimate if estimate > 0 else 0.5
    discounts = discounts[np.minimum(counts, 3)]
    contexts, first = np.unique(sequences >> 8, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    return _Order(sequences, counts - discounts, contexts, totals, np.add.reduceat(discounts, first))


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each wanted key is, and whether it is there at all (its place is then an arbitrary valid one)."""
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return position, keys[position] == wanted


if __name__ == "__main__":
    run_main(main)
