"""Directories and files that either exist whole or not at all, whoever is killed when."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock

from m3jax.errors import DataError


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a file for writing. When the block ends it has its name and is on disk; until then the old one has it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open(mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until what a file has, or which files a directory has, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build_once(directory: Path, build: Callable[[Path], None]) -> None:
    """Makes a directory, unless it is there: built under another name beside it, flushed to disk and renamed.

    Processes that want the same directory at the same time wait for the first one; what a killed one left is removed.

    Args:
      directory: the directory that is wanted.
      build: fills the empty directory that it is given.

    Raises:
      DataError: the file system refuses, for example because it is full; nothing is left behind.
    """
    try:
        _build_unless_there(directory, build)
    except OSError as error:
        raise DataError(
            f"Cannot write {error.filename or directory}: {error.strerror or error}. "
            "The cache of tokenised text is at config.data.cache_dir."
        ) from error


def build_new(directory: Path, build: Callable[[Path], None]) -> None:
    """Makes a directory as `build_once` does, but one that is there is an error.

    Raises:
      FileExistsError: it is there.
      OSError: the file system refuses; nothing is left behind.
    """
    if not _build_unless_there(directory, build):
        raise FileExistsError(errno.EEXIST, "it exists already, and nothing is ever overwritten", str(directory))


def _build_unless_there(directory: Path, build: Callable[[Path], None]) -> bool:
    if directory.exists():
        return False
    partial = directory.with_name(f".{directory.name}.partial")
    lock = directory.with_name(f".{directory.name}.lock")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        try:
            there = directory.exists()
            if not there:
                _build(directory, partial, build)
        finally:
            lock.unlink(missing_ok=True)  # whoever waits for it notices and makes a new one
    return not there


def _build(directory: Path, partial: Path, build: Callable[[Path], None]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
