"""Hugging Face data sets, streamed: from the hub, or from a local folder or builder that `datasets` can load."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

from m3jax.config import DataConfig
from m3jax.data.text_source import Piece
from m3jax.errors import DataError

HELD_OUT_DOCUMENTS = 1000


class HuggingFaceText:
    """A split of a data set; a document is a row. Satisfies `TextSource`."""

    held_out_documents = HELD_OUT_DOCUMENTS
    splits_documents = False

    def __init__(self, name: str, config: DataConfig, limit: int | None = None):
        """Finds the data set.

        Args:
          name: hf:NAME or hf:NAME:SPLIT; NAME is a name on the hub or a local path, SPLIT defaults to config.hf_split.
          config: gives hf_subset, hf_split and text_field.
          limit: of the number of documents in `pieces`, from the first; None = all.

        Raises:
          DataError: no such data set, subset or split, or no network.
        """
        # The import takes seconds, and only these sources need it.
        import datasets  # noqa: PLC0415

        self.name = name
        self._limit = limit
        self._text_field = config.text_field
        path, _, split = name.removeprefix("hf:").partition(":")
        self._split = split or config.hf_split
        if not path or os.path.isfile(path):
            what = "is a file: write it without hf:" if path else "has no name: expected hf:NAME or hf:FOLDER"
            raise DataError(f"config.data.source = {name!r} {what}.")
        try:
            self._builder = datasets.load_dataset_builder(path, config.hf_subset)
            self._builder.as_streaming_dataset(split=self._split)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Hugging Face data set {path!r} (subset {config.hf_subset!r}, split {self._split!r}) cannot be opened "
                f"({type(error).__name__}: {error}). A name on the hub needs a network; without one, set "
                "config.data.source to a local folder as hf:PATH, a glob of files or tokens:DIR."
            ) from error

    def identity(self) -> Any:
        """Returns the names and, for the files behind them, the commit on the hub or the local times of change."""
        files = (self._builder.config.data_files or {}).get(self._split)
        origin = [list(map(str, part)) for part in files.origin_metadata] if files else self._builder.config_id
        return [self.name, self._split, self._text_field, self._builder.config.name, self._limit, origin]

    def pieces(self) -> Iterator[Piece]:
        """Yields the rows' text, at most `limit` of them."""
        for text in itertools.islice(self.documents(), self._limit):
            yield Piece(text, begins_document=True)

    def documents(self, state: Any = None) -> "DocumentStream":
        """Returns the documents, from the first or from where a stream with this state was."""
        return DocumentStream(self._builder.as_streaming_dataset(split=self._split), self.name, self._text_field, state)


class DocumentStream(Iterator[str]):
    """Iterates over the text of the rows, null and empty ones skipped, and can be resumed after any of them."""

    def __init__(self, dataset: Any, name: str, text_field: str, state: Any = None):
        """Starts at the first row, or at a state.

        Args:
          dataset: a `datasets.IterableDataset`, used by this iterator alone.
          name: of the data set, for messages.
          text_field: the field that holds the text.
          state: what `get_state` returned; None = the beginning.
        """
        self._dataset, self._name, self._text_field = dataset, name, text_field
        self._state = state
        self._started = False
        if state is not None:
            dataset.load_state_dict(state)
        self._rows = iter(dataset)

    def __next__(self) -> str:
        """Returns the next document.

        Raises:
          DataError: a row without the text field, or with something else than text in it.
        """
        text = None
        while not text:
            row = next(self._rows)
            if self._text_field not in row:
                fields = ", ".join(map(repr, row))
                raise DataError(
                    f"{self._name}: no field {self._text_field!r}; its fields are {fields}. Set config.data.text_field."
                )
            text = row[self._text_field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{self._name}: field {self._text_field!r} is a {type(text).__name__}, expected text.")
        self._started = True
        return text

    def get_state(self) -> Any:
        """Returns the position after the last document returned, as JSON values; None at the beginning."""
        return self._dataset.state_dict() if self._started else self._state
