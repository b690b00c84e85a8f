"""Windows made on the fly from a streamed Hugging Face data set, for corpora that are never on this machine whole."""

import copy
from typing import Any

import grain
import numpy as np

from m3jax.data.huggingface import HuggingFaceText
from m3jax.data.tokenizer import Tokenizer
from m3jax.data.windows import Batch, make_window
from m3jax.errors import DataError

_GROUP_DOCUMENTS = 64  # tokenised at a time


class StreamedWindows(grain.IterDataset):
    """The windows of this process' documents, without end: after the last document the first one follows."""

    def __init__(
        self,
        source: HuggingFaceText,
        tokenizer: Tokenizer,
        length: int,
        skip: int,
        process_index: int,
        process_count: int,
    ):
        """Describes them.

        Args:
          source: the documents.
          tokenizer: makes tokens of them.
          length: tokens predicted per window.
          skip: documents at the beginning to leave out.
          process_index: this process takes every process_count-th document, beginning with this one.
          process_count: number of processes.
        """
        super().__init__()
        self.source, self.tokenizer, self.length, self.skip = source, tokenizer, length, skip
        self.process_index, self.process_count = process_index, process_count

    def __iter__(self) -> "_StreamedWindowsIterator":
        """Starts at the first document."""
        return _StreamedWindowsIterator(self)

    def __str__(self) -> str:
        return f"StreamedWindows({self.source.name})"


class _StreamedWindowsIterator(grain.DatasetIterator):
    """Keeps the tokens of one group of documents, after those left over from the groups before.

    The state is where the stream was before that group, the left-over tokens, and how many windows have been taken
    since: small, and enough to make the same group again.
    """

    def __init__(self, windows: StreamedWindows):
        super().__init__()
        self._windows = windows
        self.set_state({"stream": None, "document": 0, "tokens": [], "document_starts": [], "windows": 0})

    def __next__(self) -> Batch:
        length = self._windows.length
        while len(self._tokens) - self._taken * length < length + 1:
            self._next_group()
        start = self._taken * length
        self._taken += 1
        inside = (self._document_starts > start) & (self._document_starts <= start + length)
        return make_window(self._tokens[start : start + length + 1], self._document_starts[inside] - start, length)

    def get_state(self) -> dict[str, Any]:
        return {**self._before_group, "windows": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before_group = copy.deepcopy(state)
        self._documents = self._windows.source.documents(state["stream"])
        self._document = state["document"]
        self._taken = 0
        self._tokens = np.array(state["tokens"], np.int32)
        self._document_starts = np.array(state["document_starts"], np.int64)
        if state["windows"]:
            self._read_group()
            self._taken = state["windows"]

    def _next_group(self) -> None:
        start = self._taken * self._windows.length
        self._taken = 0
        self._tokens = self._tokens[start:]
        self._document_starts = self._document_starts[self._document_starts >= start] - start
        self._before_group = {
            "stream": self._documents.get_state(),
            "document": self._document,
            "tokens": self._tokens.tolist(),
            "document_starts": self._document_starts.tolist(),
            "windows": 0,
        }
        self._read_group()

    def _read_group(self) -> None:
        tokenizer = self._windows.tokenizer
        bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
        parts, starts, position = [self._tokens], [self._document_starts], len(self._tokens)
        for ids in tokenizer.encode_batch(self._read_documents()):
            starts.append([position])
            parts += [bos, ids, eos]
            position += len(bos) + len(ids) + len(eos)
        self._tokens = np.concatenate(parts).astype(np.int32)
        self._document_starts = np.concatenate(starts).astype(np.int64)

    def _read_documents(self) -> list[str]:
        """Returns the next documents that are this process' own; the last ones of the data set may be fewer."""
        w, texts = self._windows, []
        while len(texts) < _GROUP_DOCUMENTS:
            try:
                text = next(self._documents)
            except StopIteration:
                if self._document <= w.skip + w.process_index:
                    raise DataError(
                        f"{w.source.name}: has {self._document} documents, of which the first {w.skip} are held out; "
                        f"none is left for process {w.process_index} of {w.process_count}. Set "
                        "config.data.validation_source, or config.data.holdout to 0."
                    ) from None
                self._documents, self._document = w.source.documents(), 0
                return texts
            if self._document >= w.skip and (self._document - w.skip) % w.process_count == w.process_index:
                texts.append(text)
            self._document += 1
        return texts
