"""What a study keeps in its directory: a group's training as it goes on, its results when it is finished.

    groups/NAME.npz    parameters, optimizer state and learning curves after the block that was saved last
    groups/NAME.json   the results of a finished group
    groups/NAME.lock   held by the process that trains it
    results.json       those of all groups, results.md and *.png what they say (report.py)

Every file is written under another name and renamed, so that it is whole or not there. Files of a group say what they
are of; a study whose config asks for something else is refused, but for the evaluation, which is then done again.
"""

import contextlib
import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m3jax.data.atomic import whole_file
from m3jax.errors import CheckpointError
from m3jax.studies.config import StudyConfig
from m3jax.studies.grid import Group
from m3jax.studies.runs import Kept, RunsState
from m3jax.training.manifest import write_json
from m3jax.training.workdir import lock

_DO_NOT_MATTER = ("runs_at_once", "save_seconds")  # to what a run learns


@dataclass
class Training:
    """A group's training so far.

    Attributes:
      state: of its runs.
      step: steps taken.
      kept: where train.validate_every is set, what of every run was best on the validation sequences.
      curves: of every block: "step", its last one; "seconds", compilation included; and the fields of BlockMetrics, a
        list with an entry for every run. Of every validation "validated_step" and "validated", likewise.
    """

    state: RunsState
    kept: Kept | None = None
    step: int = 0
    curves: dict[str, list] = field(default_factory=lambda: {"step": [], "seconds": []})


class GroupFiles:
    """Reads and writes the files of one group."""

    def __init__(self, workdir: Path, study: StudyConfig, group: Group):
        folder = workdir / "groups"
        folder.mkdir(parents=True, exist_ok=True)
        self._training, self._results = folder / f"{group.name}.npz", folder / f"{group.name}.json"
        self._lock = folder / f"{group.name}.lock"
        self._trained_as = _plain({
            "model": dataclasses.asdict(group.model), "optimizer": dataclasses.asdict(study.optimizer),
            "train": {k: v for k, v in dataclasses.asdict(study.train).items() if k not in _DO_NOT_MATTER},
            "grid": {"task": group.task_name, "shift": group.shift, "runs": group.runs},
        })  # fmt: skip
        self._evaluated_as = _plain(dataclasses.asdict(study.evaluation))

    def claimed(self) -> contextlib.AbstractContextManager[str | None]:
        """While entered no other process has the group; yields the process that has it, None for this one."""
        return lock(self._lock)

    def was_claimed(self) -> bool:
        """Whether any process has begun with it."""
        return self._lock.exists()

    def save_training(self, training: Training) -> None:
        """Saves a training, over the one before."""
        arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((training.state, training.kept)))}
        progress = {"step": training.step, "curves": training.curves}
        header = json.dumps({"of": self._trained_as, "training": progress})
        with whole_file(self._training, "wb") as file:
            np.savez(file, header=np.array(header), **arrays)

    def load_training(self, initial: Training) -> Training | None:
        """Reads what was saved; None = nothing was.

        Args:
          initial: a training of the same structure.

        Raises:
          CheckpointError: it is of another study, or damaged.
        """
        if not self._training.exists():
            return None
        try:
            with self._training.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
            header = json.loads(str(arrays.pop("header")))
            leaves = [arrays[str(i)] for i in range(len(arrays))]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self._training} cannot be read: {error}. Remove it to train anew.") from error
        _check_same(header["of"], self._trained_as, self._training)
        structure = jax.tree.structure((initial.state, initial.kept))
        return Training(*jax.tree.unflatten(structure, leaves), **header["training"])

    def save_results(self, results: dict[str, Any]) -> None:
        """Saves the results of a finished group."""
        header = {"of": self._trained_as, "evaluation": self._evaluated_as}
        write_json(self._results, header | {"results": results})

    def load_results(self) -> dict[str, Any] | None:
        """Reads the results; None = not finished, or evaluated otherwise.

        Raises:
          CheckpointError: they are of another study.
        """
        if not self._results.exists():
            return None
        content = json.loads(self._results.read_text())
        _check_same(content["of"], self._trained_as, self._results)
        return content["results"] if content["evaluation"] == self._evaluated_as else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As they are when read from JSON."""
    return json.loads(json.dumps(values))


def _check_same(stored: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for group, keys in now.items():
        for key, value in keys.items():
            if (old := stored[group].get(key)) != value:
                raise CheckpointError(
                    f"{path} was trained with {group}.{key} = {old!r}, this study has {value!r}: set it back, or "
                    "choose another --workdir."
                )
