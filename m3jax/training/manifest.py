"""The manifest of a checkpoint: the size and SHA-256 of each of its files, written last and checked on load.

A step directory without a manifest is unfinished: the process was killed while it was written. One with a manifest is
finished, on disk (every file is flushed before the manifest is), and any later change to it is found.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m3jax.data.atomic import flush, whole_file
from m3jax.errors import CheckpointError

NAME = "MANIFEST.json"


def write_manifest(directory: Path) -> None:
    """Hashes and flushes every file under `directory`, then writes the manifest in one atomic rename."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(_hash_and_flush, paths))
    for folder in {path.parent for path in paths} | {directory}:
        flush(folder)
    files = {path.relative_to(directory).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    write_json(directory / NAME, {"files": files, "sha256": _digest(files)})


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or the whole new one, on disk when this returns."""
    with whole_file(path) as file:
        json.dump(value, file, indent=1)


def is_finished(directory: Path) -> bool:
    """Says whether the checkpoint was written to its end."""
    return (directory / NAME).is_file()


def finished_steps(root: Path) -> list[int]:
    """Returns the steps that have a finished checkpoint in `root`, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal() and is_finished(path))


def verify(directory: Path, items: tuple[str, ...] | None = None) -> None:
    """Checks a checkpoint against its manifest.

    Args:
      directory: a step directory.
      items: the files and folders directly in it whose content is about to be read; None = all. Of the others only
        presence and size are checked.

    Raises:
      CheckpointError: no manifest, or a file that is missing, truncated or changed; the message names the file.
    """
    files = _read_manifest(directory)
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete.")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, {NAME} says {entry['size']}: the checkpoint is corrupt."
            )
    read = [name for name in files if items is None or name.split("/")[0] in items]
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: _hash(directory / name), read)
        for name, digest in zip(read, digests, strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(
                    f"{directory / name} does not have the SHA-256 that {NAME} says: it was changed after it was "
                    "written, the checkpoint is corrupt."
                )


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint was not written to its end.")
    try:
        manifest = json.loads(path.read_text())
        if manifest["sha256"] == _digest(manifest["files"]):
            return manifest["files"]
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is damaged: the checkpoint is corrupt.")


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_and_flush(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
