"""A run's directory: one process group at a time writes in it, and what it holds must fit the config."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3jax.config import Config, config_to_dict
from m3jax.errors import CheckpointError, TrainingError

# The keys of the model that decide how it is computed, not what it computes or which parameters it has.
FREE_MODEL_KEYS = ("dtype", "state_dtype", "chunk_size", "scan_implementation", "remat", "scan_layers")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates the directory and holds its lock while entered.

    Raises:
      TrainingError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with lock(workdir / ".lock") as holder:
        if holder is not None:
            raise TrainingError(
                f"{workdir} is in use by process {holder}: wait for it to end or choose another --workdir."
            )
        yield


@contextlib.contextmanager
def lock(path: Path) -> Iterator[str | None]:
    """Takes a file's lock, which ends with the process, however that ends; yields who has it, None for this one."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or "?"
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield None


def changed_keys(stored: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"a.b": (stored value, new value)} of the keys that differ."""
    old, now = config_to_dict(stored), config_to_dict(new)
    return {
        f"{group}.{key}": (old[group][key], value)
        for group, keys in now.items()
        for key, value in keys.items()
        if old[group][key] != value
    }


def check_resumable(changed: dict[str, tuple[Any, Any]], checkpoint: Path) -> None:
    """Checks that a run can continue from a checkpoint although these keys of its config changed.

    Of the data, the training iterator itself checks what its position means.

    Raises:
      CheckpointError: one of them decides which parameters the model has or what it computes with them.
    """
    for key, (old, new) in changed.items():
        group, name = key.split(".")
        average_switched = key == "train.ema_decay" and (old == 0) != (new == 0)
        if average_switched or (group == "model" and name not in FREE_MODEL_KEYS):
            raise CheckpointError(
                f"config.{key} = {new!r}: the run in {checkpoint.parent.parent} has {old!r}, which cannot change from "
                f"its checkpoint {checkpoint.name} on. Set it back, or start a new run with another --workdir."
            )
