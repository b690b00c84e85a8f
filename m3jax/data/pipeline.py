"""The pipeline: batches for training in an order that the seed fixes, and the held-out windows for evaluation."""

import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from m3jax.config import Config
from m3jax.data.parts import TokenPart, open_part, streamed_source
from m3jax.data.streamed_windows import StreamedWindows
from m3jax.data.tokenizer import Tokenizer, check_vocabulary
from m3jax.data.windows import Batch, TokenWindows
from m3jax.errors import ConfigError, DataError

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches
_PREFETCHED_BATCHES = 4  # of streamed text
_SHUFFLE_WINDOWS = 1024  # streamed windows are shuffled within consecutive blocks of this many


class TrainIterator(Iterator[Batch]):
    """Endless training batches of this process, resumable after any of them."""

    def __init__(self, batches: grain.IterDataset, identity: dict[str, Any]):
        """Starts at the first batch; `identity` is all that the order of the batches depends on."""
        self._iterators = [iter(batches)]  # none once closed
        self._identity = identity
        # Runs at exit too: grain's threads and destructors complain when the interpreter goes down around them.
        self._close = weakref.finalize(self, _close_all, self._iterators)

    def __next__(self) -> Batch:
        """Returns tokens, targets, segment_ids int32 and weights float32, each [b, l]; see `make_window`."""
        return next(self._iterators[0])

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch returned, as JSON values."""
        return {"data": self._identity, "position": self._iterators[0].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Args:
          state: what `get_state` returned, in this process or an earlier one.

        Raises:
          DataError: the state is of other data or another order; the message names what differs.
        """
        for key, value in self._identity.items():
            was = state["data"].get(key, value)  # older states have less
            if was != value:
                raise DataError(
                    f"Cannot continue at the saved position in the data: {key} was {was!r} and is "
                    f"now {value!r}. Restore it, or start a run in a new workdir from the saved parameters."
                )
        self._iterators[0].set_state(state["position"])

    def close(self) -> None:
        """Stops reading ahead; the iterator cannot be used any more."""
        self._close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class HeldOut:
    """The held-out part, in order.

    Attributes:
      n_bytes: UTF-8 bytes of its text, for bits per byte; None = not known.
      n_tokens: the tokens predicted in all of it, the sum of the weights of all batches.
      n_batches: the number of batches.
    """

    def __init__(self, part: TokenPart, length: int, batch_size: int):
        """Cuts the part into windows of `length`, the last one padded."""
        self.n_bytes = part.text_bytes
        self.n_tokens = part.n_predicted
        self._windows = TokenWindows(part.stream, part.begin, part.end, length, keep_remainder=True)
        self._length, self._batch_size = length, batch_size
        self.n_batches = -(-len(self._windows) // batch_size)

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yields the first `limit` batches, or all, as `TrainIterator` does; missing rows of the last one are 0."""
        n_batches = self.n_batches if limit is None else min(limit, self.n_batches)
        for first in range(0, n_batches * self._batch_size, self._batch_size):
            rows = range(first, min(first + self._batch_size, len(self._windows)))
            windows = [self._windows[row] for row in rows]
            missing = self._batch_size - len(windows)
            yield {
                name: np.pad(np.stack([window[name] for window in windows]), ((0, missing), (0, 0)))
                for name in windows[0]
            }


def open_train(config: Config, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1) -> TrainIterator:
    """Opens the training data.

    The order of the windows is a new permutation each epoch, a function of config.data.seed alone; the global batch
    number k holds the same windows however many processes share it. Streamed data sets are shuffled in blocks.

    Args:
      config: the run's configuration.
      tokenizer: see `load_tokenizer`.
      process_index: which process this is; it gets every process_count-th row.
      process_count: number of processes, a divisor of config.data.batch_size.

    Raises:
      ConfigError: sizes that do not fit together.
      DataError: data that is missing, damaged, empty or too small, with its name.
    """
    data = config.data
    if data.batch_size % process_count:
        raise ConfigError(
            f"config.data.batch_size = {data.batch_size}: expected a multiple of {process_count} processes."
        )
    batch_size = data.batch_size // process_count
    identity = {
        "config.data.seed": data.seed,
        "config.data.sequence_length": data.sequence_length,
        "config.data.batch_size": data.batch_size,
        "number of processes": process_count,
    }
    streamed = streamed_source(config)
    if streamed is not None:
        check_vocabulary(tokenizer, config)
        source, skip = streamed
        identity |= {
            f"config.data.{key}": getattr(data, key) for key in ("source", "hf_subset", "hf_split", "text_field")
        }
        identity |= {"tokenizer": tokenizer.id, "held-out documents": skip, "data set": source.identity()}
        windows = StreamedWindows(source, tokenizer, data.sequence_length, skip, process_index, process_count)
        shuffled = grain.experimental.WindowShuffleIterDataset(windows, window_size=_SHUFFLE_WINDOWS, seed=data.seed)
        batches = shuffled.batch(batch_size, drop_remainder=True)
        return TrainIterator(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES), identity
        )
    part = open_part(config, tokenizer, "train")
    windows = TokenWindows(part.stream, part.begin, part.end, data.sequence_length, keep_remainder=False)
    if not len(windows):
        raise DataError(
            f"{part.name}: {part.end - part.begin} training tokens are less than one window of "
            f"config.data.sequence_length + 1 = {data.sequence_length + 1}."
        )
    identity |= {"tokens": part.stream.digest, "first token": part.begin, "end of the tokens": part.end}
    identity |= {"documents": part.stream.documents_digest}
    rows = grain.MapDataset.source(windows).seed(data.seed).shuffle().repeat()[process_index::process_count]
    batches = rows.batch(batch_size, drop_remainder=True).to_iter_dataset(_READ_OPTIONS)
    return TrainIterator(batches, identity)


def open_validation(config: Config, tokenizer: Tokenizer) -> HeldOut:
    """Opens the held-out data: config.data.validation_source, or the held-out part of config.data.source.

    Args:
      config: the run's configuration.
      tokenizer: see `load_tokenizer`.

    Raises:
      ConfigError: nothing is held out.
      DataError: data that is missing, damaged or empty, with its name.
    """
    part = open_part(config, tokenizer, "validation")
    if part.n_predicted == 0:
        raise DataError(
            f"{part.name}: the held-out part has {part.end - part.begin} tokens, none of them to be predicted."
        )
    return HeldOut(part, config.data.sequence_length, config.data.batch_size)
