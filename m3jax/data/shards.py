"""Token shards: raw little-endian files of token ids beside a meta.json. Written here; read from here or anywhere.

docs/data.md describes the format. Reading maps the files into memory and shows them as one stream of tokens.
"""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.data.atomic import build_once
from m3jax.data.progress import Progress
from m3jax.data.tokenizer import Tokenizer
from m3jax.errors import DataError

META_FILE = "meta.json"
_DOCUMENTS_FILE = "documents.idx"
_INDEX_FILE = "index.json"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SHARD_TOKENS = 1 << 28
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class ShardsMeta:
    """The meta.json. Only dtype is required of shards made elsewhere."""

    dtype: str
    vocab_size: int | None = None
    tokenizer: str | None = None  # id of the tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    text_bytes: int | None = None  # UTF-8 bytes of the text in the shards
    documents: int | None = None
    shards: list[dict[str, Any]] | None = None  # file, tokens, sha256; None = every .bin of the folder, sorted by name


class ShardWriter:
    """Writes documents, as bos + tokens + eos, into the shards of a directory; a context manager."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        """Opens an existing, empty directory for the tokens of a tokenizer."""
        self._directory, self._tokenizer = directory, tokenizer
        self._dtype_name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._bos, self._eos = (
            np.array([] if i is None else [i], _DTYPES[self._dtype_name]) for i in (tokenizer.bos_id, tokenizer.eos_id)
        )
        self._shards: list[dict[str, Any]] = []
        self._file, self._hash = None, None
        self._documents = open(directory / _DOCUMENTS_FILE, "wb")  # noqa: SIM115 - closed by __exit__
        self._n_tokens, self._n_documents, self._text_bytes = 0, 0, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._documents.close()
        if self._file is not None:
            self._file.close()

    def add(self, ids: np.ndarray, begins_document: bool, text_bytes: int) -> None:
        """Appends tokens.

        Args:
          ids: [n], every one below the tokenizer's vocab_size.
          begins_document: whether they begin a document or continue the last one.
          text_bytes: UTF-8 bytes of the text they stand for.
        """
        if begins_document:
            self._end_document()
            self._documents.write(np.array(self._n_tokens, "<u8").tobytes())
            self._n_documents += 1
            self._write(self._bos)
        self._write(ids)
        self._text_bytes += text_bytes

    def finish(self) -> ShardsMeta:
        """Finishes the last document and shard and writes meta.json, which it returns."""
        self._end_document()
        self._end_shard()
        t = self._tokenizer
        meta = ShardsMeta(
            self._dtype_name, t.vocab_size, t.id, t.bos_id, t.eos_id, self._text_bytes, self._n_documents, self._shards
        )
        (self._directory / META_FILE).write_text(json.dumps(asdict(meta), indent=1))
        return meta

    def _end_document(self) -> None:
        if self._n_documents:
            self._write(self._eos)

    def _write(self, ids: np.ndarray) -> None:
        if len(ids) == 0:
            return
        if self._file is None:
            name = f"tokens-{len(self._shards):05d}.bin"
            self._shards.append({"file": name, "tokens": 0})
            self._file = open(self._directory / name, "wb")  # noqa: SIM115 - closed by __exit__
            self._hash = hashlib.sha256()
        data = ids.astype(_DTYPES[self._dtype_name]).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._n_tokens += len(ids)
        self._shards[-1]["tokens"] += len(ids)
        if self._shards[-1]["tokens"] >= _SHARD_TOKENS:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._shards[-1]["sha256"] = self._hash.hexdigest()
            self._file = None


class TokenStream:
    """The shards of a directory, one after the other, as one memory-mapped stream of tokens.

    Attributes:
      directory: where they are.
      meta: the meta.json.
      digest: a hash of all tokens.
    """

    def __init__(self, directory: Path, cache_dir: Path):
        """Opens shards and checks them: sizes each time, contents once for as long as the files do not change.

        Args:
          directory: holds meta.json and the shards.
          cache_dir: where the result of the check is kept.

        Raises:
          DataError: missing, truncated, empty or damaged files, or a meta.json that does not fit; the message names
            the file.
        """
        self.directory = directory
        self.meta = read_meta(directory)
        self._paths, self._sizes = _check_sizes(directory, self.meta)
        dtype = _DTYPES[self.meta.dtype]
        self._arrays = [np.asarray(np.memmap(path, dtype, mode="r")) for path in self._paths]
        self._ends = np.cumsum(self._sizes)
        own = directory / _DOCUMENTS_FILE
        files = [*self._paths, own] if own.exists() else self._paths
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = hashlib.sha256(json.dumps([asdict(self.meta), stats]).encode()).hexdigest()[:32]
        index = cache_dir / "shard_indexes" / key
        build_once(index, self._build_index)
        self._index = json.loads((index / _INDEX_FILE).read_text())
        self.digest = hashlib.sha256("".join(shard["sha256"] for shard in self._index).encode()).hexdigest()[:32]
        documents = own if own.exists() else index / _DOCUMENTS_FILE
        self._documents = _map_documents(documents, self.meta)

    @functools.cached_property
    def documents_digest(self) -> str:
        """A hash of where documents begin."""
        return hashlib.sha256(np.ascontiguousarray(self._documents)).hexdigest()[:32]

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens [start, stop) as int32 [stop - start]."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            begin = int(self._ends[first]) - self._sizes[first]
            end = min(stop, int(self._ends[first]))
            parts.append(self._arrays[first][start - begin : end - begin])
            start, first = end, first + 1
        return np.concatenate(parts).astype(np.int32)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Returns the positions in [start, stop) at which documents begin, ascending, int64 [n]."""
        low, high = np.searchsorted(self._documents, np.array([start, stop], "<u8"))
        return np.array(self._documents[low:high], np.int64)

    def check_ids(self, vocab_size: int) -> None:
        """Raises DataError, naming the shard, if a token id is not below vocab_size."""
        for path, shard in zip(self._paths, self._index, strict=True):
            if shard["max"] >= vocab_size:
                raise DataError(
                    f"{path}: holds token id {shard['max']}, but config.model.vocab_size = {vocab_size}. Raise it "
                    f"to at least {shard['max'] + 1}, or check the dtype in {self.directory / META_FILE}."
                )

    def _build_index(self, directory: Path) -> None:
        """Reads every token once: largest id and hash of each shard, and where documents begin unless that is known."""
        own = self.directory / _DOCUMENTS_FILE
        derive = not own.exists()
        if not derive:
            _check_documents(own, _map_documents(own, self.meta), len(self))
        index = []
        progress = Progress(f"checking {self.directory}", sum(path.stat().st_size for path in self._paths))
        with open(directory / _DOCUMENTS_FILE, "wb") as documents, progress:
            for number, (path, array) in enumerate(zip(self._paths, self._arrays, strict=True)):
                begin = int(self._ends[number]) - len(array)
                largest, digest = 0, hashlib.sha256()
                for offset in range(0, len(array), _SCAN_TOKENS):
                    chunk = np.array(array[offset : offset + _SCAN_TOKENS])
                    largest = max(largest, int(chunk.max()))
                    digest.update(chunk)
                    progress.advance(chunk.nbytes)
                    if derive:
                        starts = self._find_documents(chunk, begin + offset, begins_shard=offset == 0)
                        documents.write(starts.astype("<u8").tobytes())
                index.append({"max": largest, "sha256": digest.hexdigest()})
                self._check_contents(number, path, index[-1])
        (directory / _INDEX_FILE).write_text(json.dumps(index))

    def _find_documents(self, chunk: np.ndarray, begin: int, begins_shard: bool) -> np.ndarray:
        if self.meta.bos_id is not None:
            return begin + np.flatnonzero(chunk == self.meta.bos_id)
        if self.meta.eos_id is not None:
            starts = begin + 1 + np.flatnonzero(chunk == self.meta.eos_id)
            starts = starts[starts < len(self)]
            return np.concatenate([[0], starts]) if begin == 0 else starts
        return np.array([begin] if begins_shard else [])

    def _check_contents(self, number: int, path: Path, found: dict[str, Any]) -> None:
        recorded = self.meta.shards[number].get("sha256") if self.meta.shards else None
        if recorded is not None and recorded != found["sha256"]:
            raise DataError(
                f"{path}: damaged, its SHA-256 is not the one in {META_FILE}. Make the shards "
                "again (those of a cache come back by themselves once their folder is deleted)."
            )
        if self.meta.vocab_size is not None and found["max"] >= self.meta.vocab_size:
            raise DataError(
                f"{path}: holds token id {found['max']}, but {META_FILE} says vocab_size {self.meta.vocab_size}; "
                f"is the dtype really {self.meta.dtype}?"
            )


def _map_documents(path: Path, meta: ShardsMeta) -> np.ndarray:
    size = path.stat().st_size
    if size % 8 or (meta.documents is not None and size != 8 * meta.documents):
        raise DataError(
            f"{path}: truncated or damaged, it has {size} bytes for {meta.documents or 'whole'} documents of 8."
        )
    return np.asarray(np.memmap(path, "<u8", mode="r")) if size else np.array([], "<u8")


def _check_documents(path: Path, starts: np.ndarray, n_tokens: int) -> None:
    if np.any(starts[1:] <= starts[:-1]) or (len(starts) and starts[-1] >= n_tokens):
        raise DataError(
            f"{path}: damaged, expected ascending positions of the {n_tokens} tokens, each below {n_tokens}."
        )


def read_meta(directory: Path) -> ShardsMeta:
    """Reads the meta.json of a folder of shards; raises DataError, naming it, when it is missing or does not fit."""
    path = directory / META_FILE
    example = '{"dtype": "uint16", "bos_id": 0}'
    if not path.is_file():
        raise DataError(f"{path}: no such file. A folder of token shards needs one, at least like {example}.")
    try:
        values = json.loads(path.read_text())
        known = {name: values[name] for name in ShardsMeta.__dataclass_fields__ if name in values}
        meta = ShardsMeta(**known)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a description of shards ({error}). Expected at least {example}.") from error
    if meta.dtype not in _DTYPES:
        raise DataError(f"{path}: dtype {meta.dtype!r}, expected {' or '.join(_DTYPES)} (little-endian).")
    for name in ("vocab_size", "bos_id", "eos_id", "text_bytes", "documents"):
        value = getattr(meta, name)
        if value is not None and type(value) is not int:
            raise DataError(f"{path}: {name} = {value!r}, expected an integer or null.")
    for shard in meta.shards or []:
        if not isinstance(shard, dict) or Path(str(shard.get("file", "/"))).name != shard.get("file"):
            raise DataError(
                f"{path}: shards lists {shard!r}, expected an object with the name of a file of this folder."
            )
        if type(shard.get("tokens", 0)) is not int:
            raise DataError(f"{path}: shards lists {shard!r}, expected tokens to be their number.")
    return meta


def _check_sizes(directory: Path, meta: ShardsMeta) -> tuple[list[Path], list[int]]:
    """Returns the files that hold tokens and how many each holds."""
    itemsize = _DTYPES[meta.dtype].itemsize
    shards = meta.shards or [{"file": path.name} for path in sorted(directory.glob("*.bin"))]
    if not shards:
        raise DataError(f"{directory}: no token shards (*.bin) in this folder.")
    paths, sizes = [], []
    for shard in shards:
        path = directory / shard["file"]
        if not path.is_file():
            raise DataError(f"{path}: missing, {META_FILE} lists it.")
        size = path.stat().st_size
        expected = shard.get("tokens", size // itemsize) * itemsize
        if size != expected or size % itemsize:
            why = f"{META_FILE} says {expected}" if "tokens" in shard else f"not a whole number of {meta.dtype}"
            raise DataError(f"{path}: truncated or damaged, it has {size} bytes ({why}).")
        paths.append(path)
        sizes.append(size // itemsize)
    if 0 in sizes:
        raise DataError(f"{paths[sizes.index(0)]}: the shard is empty.")
    return paths, sizes
