"""Tensors in safetensors files: one file, or several and an index that says which tensor is in which.

Reading and writing hold one tensor beside what the caller holds: a file is mapped for one tensor at a time, and written
as its tensors are made (the library's own writer wants all of a file's tensors at once, and copies them).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from m3jax.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ROWS = 4096  # of each of two tensors that are compared at one time
SHARD_BYTES = 5 * 10**9  # what Hugging Face's writers put into one file
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is wanted."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        """Size in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def has_tensors(directory: Path) -> bool:
    """Whether a directory has such files."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


class StoredTensors(Mapping[str, np.ndarray]):
    """The tensors in a directory's files, each read when it is asked for.

    Attributes:
      shapes: of each tensor; None where its file is missing.
      problems: a line for each thing that is wrong with the files as a whole: a file that is missing, a tensor that the
        index names twice or that is elsewhere than the index says.
    """

    def __init__(self, directory: Path):
        """Reads the headers.

        Raises:
          CheckpointError: a file that cannot be read, or numbers of a kind that is no parameter's.
        """
        self._directory = directory
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.problems: list[str] = []
        self._files: dict[str, str] = {}
        self._dtypes: set[str] = set()
        if (directory / WEIGHTS).is_file():
            self._add(WEIGHTS, None)
            return
        index = self._read_index()
        for file in sorted(set(index.values())):
            if (directory / file).is_file():
                self._add(file, index)
            else:
                names = [name for name, where in index.items() if where == file]
                self.problems.append(f"missing file: {file}, which has {len(names)} tensors")
                self.shapes |= dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        with self._open(name) as file:
            return file.get_tensor(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and numbers; a part of each is read at one time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        rows = self.shapes[one][0]
        parts = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
        return all(np.array_equal(self._rows(one, part), self._rows(other, part), equal_nan=True) for part in parts)

    @property
    def dtype(self) -> str:
        """The narrowest of float32, bfloat16 and float64 that holds every number exactly."""
        # JAX would take float64 for float32 unless it is told to have 64-bit numbers.
        narrow = self._dtypes - {"float64"}
        widest = "float64" if narrow != self._dtypes else str(jnp.result_type(*narrow)) if narrow else "float32"
        return "float32" if widest == "float16" else widest

    def _open(self, name: str) -> safe_open:
        # Anew for each read: a mapping that stays open keeps every page that was read.
        return safe_open(self._directory / self._files[name], framework="np")

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        with self._open(name) as file:
            return file.get_slice(name)[rows]

    def _add(self, name_of_file: str, index: dict[str, str] | None) -> None:
        path = self._directory / name_of_file
        try:
            with safe_open(path, framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                header = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}") from error
        for name, (shape, code) in header.items():
            if index is not None and index.get(name) != name_of_file:
                says = f"in {index[name]}" if name in index else "nowhere"
                self.problems.append(f"{name} is in {name_of_file}, and {says} by the index")
                continue
            if code not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is stored as {code}, expected one of {', '.join(_DTYPES)}.")
            self.shapes[name], self._files[name] = shape, name_of_file
            self._dtypes.add(_DTYPES[code])

    def _read_index(self) -> dict[str, str]:
        def keep_track(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            self.problems += [f"named twice in {INDEX}: {name}" for name in sorted(set(names)) if names.count(name) > 1]
            return dict(pairs)

        path = self._directory / INDEX
        try:
            index = dict(json.loads(path.read_text(), object_pairs_hook=keep_track)["weight_map"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"Cannot read {path}: {type(error).__name__}: {error}") from error
        for name, file in index.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{path} says that {name} is in {file!r}: expected the name of a file.")
        return index


def write_tensors(directory: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors into files of at most `shard_bytes` each (or of one tensor that is larger)."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.n_bytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.n_bytes
    if len(shards) == 1:
        _write_file(directory / WEIGHTS, shards[0])
        return
    index = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard)
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.n_bytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (directory / INDEX).write_text(text + "\n")


def _write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    # Wide numbers first, so that all are aligned; the header is padded for the same reason.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.n_bytes
        header[name] = {
            "dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.make().reshape(-1).view(np.uint8).data)
