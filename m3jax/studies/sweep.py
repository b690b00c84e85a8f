"""Trains and measures the groups of a study one after another, from wherever its directory stands.

The host is a block ahead of what it knows: it draws and dispatches one, then reads the numbers of the one before.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.studies.config import StudyConfig
from m3jax.studies.evaluation import Accuracies, evaluate_group
from m3jax.studies.files import GroupFiles, Training
from m3jax.studies.grid import Group
from m3jax.studies.questions import draw_block
from m3jax.studies.runs import BlockMetrics, Recipe, init_runs, train_block
from m3jax.training.interrupt import StopRequest
from m3jax.training.progress import LiveLine, format_seconds

_SECONDS_BETWEEN_LOGS = 10.0


def run_sweep(study: StudyConfig, workdir: Path, groups: Sequence[Group]) -> bool:
    """Trains and measures the groups that are not finished.

    Args:
      study: how.
      workdir: where everything is kept, see files.py.
      groups: what make_groups gives for the study.

    Returns:
      False when a signal ended it early; the same call continues.

    Raises:
      CheckpointError: the directory is of another study.
    """
    with jax.default_matmul_precision(study.train.matmul_precision), LiveLine() as line, StopRequest() as stop:
        for number, group in enumerate(groups, start=1):
            files = GroupFiles(workdir, study, group)
            place = f"{number}/{len(groups)} {group.name}"
            if files.load_results() is not None:
                line.message(f"{place}: finished before")
                continue
            trainer = GroupTrainer(study, group, files)
            if not trainer.train(line, stop, place):
                line.message(f"{stop.signal_name}: stopped. Run the same command again to continue.")
                return False
            accuracies = evaluate_group(study, group, trainer.training.state.params)
            results = _results(group, trainer.training, accuracies)
            files.save_results(results)
            line.message(f"{place}: {_summary(accuracies)}; trained for {format_seconds(results['seconds'])}")
    return True


class GroupTrainer:
    """Trains one group.

    Attributes:
      training: how far it is.
    """

    def __init__(self, study: StudyConfig, group: Group, files: GroupFiles):
        """Takes up what the files have, or initialises."""
        self._train, self._group, self._files = study.train, group, files
        self._recipe = Recipe(group.model, study.optimizer, study.train.steps)
        stages = study.train.curriculum
        self._longest = np.repeat([stage.longest for stage in stages], [stage.steps for stage in stages])
        seeds = [run.seed for run in group.runs]
        self._seeds = np.unique(seeds).astype(np.int32)
        self._data_of_run = jnp.asarray(np.searchsorted(self._seeds, seeds), jnp.int32)
        self._rates = jnp.asarray([run.learning_rate for run in group.runs], jnp.float32)
        initial = init_runs(self._recipe, jnp.asarray(seeds, jnp.int32))
        self.training = files.load_training(initial) or Training(initial)

    def train(self, line: LiveLine, stop: StopRequest, place: str) -> bool:
        """Trains to the last step; False when a signal ended it early. What was trained is saved in either case."""
        self._last_read = saved = time.monotonic()
        self._logged = -math.inf
        training, unread = self.training, None
        while training.step < self._train.steps:
            training.state, metrics = train_block(*self.block(training.step))
            training.step += self._train.block_steps
            if unread is not None:
                self._read(unread, line, place)
            unread = metrics
            stopping = stop.pending(ask_others=False)
            if stopping or training.step == self._train.steps or time.monotonic() - saved >= self._train.save_seconds:
                self._read(unread, line, place)
                unread = None
                self._files.save_training(training)
                saved = time.monotonic()
            if stopping:
                return False
        return True

    def block(self, step: int) -> tuple:
        """The arguments of train_block for the block that starts after `step` steps."""
        train, group = self._train, self._group
        longest = self._longest[step : step + train.block_steps]
        array = next(length for length in train.arrays if length >= longest.max())
        questions = draw_block(
            jnp.asarray(self._seeds), jnp.int32(step), jnp.asarray(longest + group.shift, jnp.int32), task=group.task,
            batch_size=train.batch_size, shortest=train.shortest + group.shift, width=group.width(array, train.bos),
            answers=group.task.answers(array + group.shift), bos=train.bos,
        )  # fmt: skip
        return self._recipe, self.training.state, self._rates, self._data_of_run, jnp.int32(step), questions

    def _read(self, metrics: BlockMetrics, line: LiveLine, place: str) -> None:
        """Waits for a block's numbers and notes them."""
        numbers = {name: np.asarray(value, float) for name, value in metrics._asdict().items()}
        now = time.monotonic()
        seconds, self._last_read = now - self._last_read, now
        curves = self.training.curves
        step = len(curves["step"]) * self._train.block_steps + self._train.block_steps
        curves["step"].append(step)
        curves["seconds"].append(seconds)
        for name, values in numbers.items():
            curves.setdefault(name, []).append([_json_number(v) for v in values])
        logged = now - self._logged >= _SECONDS_BETWEEN_LOGS or step == self._train.steps
        self._logged = now if logged else self._logged
        left = (self._train.steps - step) * seconds / self._train.block_steps
        finite = [loss for loss in numbers["loss"] if math.isfinite(loss)] or [math.nan]
        line.show(
            f"{place}  step {step}/{self._train.steps}  loss {statistics.mean(finite):.4f}, best "
            f"{min(finite):.4f}  accuracy {np.mean(numbers['accuracy']):.3f}, best "
            f"{np.max(numbers['accuracy']):.3f}  {self._train.block_steps / seconds:.3g} steps/s  "
            f"{format_seconds(left)} left in this group",
            last=step == self._train.steps, logged=logged,
        )  # fmt: skip


def _results(group: Group, training: Training, accuracies: Accuracies) -> dict[str, Any]:
    """What is reported of a finished group."""
    curves = training.curves
    steps_of_block, seconds = curves["step"][0], curves["seconds"]
    one_run = jax.tree.leaves(training.state.params)
    runs = [
        run._asdict()
        | {name: {label: values[i] for label, values in of_set.items()} for name, of_set in accuracies.items()}
        | {"loss": [block[i] for block in curves["loss"]], "accuracy": [block[i] for block in curves["accuracy"]]}
        | {"skipped_steps": round(sum(block[i] for block in curves["skipped"]) * steps_of_block)}
        for i, run in enumerate(group.runs)
    ]
    return {
        "task": group.task.name,
        "chance": group.task.chance,
        "model": group.model_name,
        "d_model": group.model.d_model,
        "n_layers": group.model.n_layers,
        "parameters": sum(leaf.size for leaf in one_run) // len(group.runs),
        "seconds": sum(seconds),
        "steps_per_second": steps_of_block / statistics.median(seconds),
        "steps": curves["step"],
        "runs": runs,
    }


def _summary(accuracies: Accuracies) -> str:
    return "accuracy " + ", ".join(
        f"{statistics.median(values):.3f} (best {max(values):.3f}) at {label}"
        for label, values in accuracies["test"].items()
    )


def _json_number(value: float) -> float | None:
    """None instead of what JSON does not have; six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
