"""Windows: the fixed-length training examples that a stream of tokens is cut into.

Window i covers the tokens [i * length, i * length + length] of the stream, both ends included, so that it overlaps the
next one by a token and every token but the first is predicted exactly once.
"""

import numpy as np

from m3jax.data.shards import TokenStream

Batch = dict[str, np.ndarray]


def make_window(tokens: np.ndarray, document_starts: np.ndarray, length: int) -> Batch:
    """Builds an example out of consecutive tokens.

    Args:
      tokens: int [n + 1], n <= length.
      document_starts: positions in [1, n] at which documents begin.
      length: of the window; what is beyond n is padding: 0 everywhere.

    Returns:
      tokens, targets (the tokens that follow), segment_ids (documents counted from 1) int32 [length], and weights
      float32 [length], 1 where the target belongs to the same document as the token.
    """
    n = len(tokens) - 1
    segments = np.zeros(n + 1, np.int32)
    segments[document_starts] = 1
    segments = 1 + np.cumsum(segments, dtype=np.int32)
    window = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids")}
    window["weights"] = np.zeros(length, np.float32)
    window["tokens"][:n] = tokens[:-1]
    window["targets"][:n] = tokens[1:]
    window["segment_ids"][:n] = segments[:-1]
    window["weights"][:n] = segments[1:] == segments[:-1]
    return window


class TokenWindows:
    """The windows of a part of a token stream, by number: a data source for grain."""

    def __init__(self, stream: TokenStream, begin: int, end: int, length: int, *, keep_remainder: bool):
        """Describes the windows.

        Args:
          stream: the tokens.
          begin: the part's first token.
          end: one past its last token.
          length: tokens predicted per window.
          keep_remainder: whether the tokens that fill no whole window make a last, padded one.
        """
        self._stream, self._begin, self._end, self._length = stream, begin, end, length
        predicted = max(end - begin - 1, 0)
        self._n_windows = -(-predicted // length) if keep_remainder else predicted // length

    def __len__(self) -> int:
        """Number of windows."""
        return self._n_windows

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index`, see `make_window`."""
        if not 0 <= index < self._n_windows:
            raise IndexError(index)
        start = self._begin + int(index) * self._length
        stop = min(start + self._length + 1, self._end)
        document_starts = self._stream.document_starts(start + 1, stop) - start
        return make_window(self._stream.read(start, stop), document_starts, self._length)
