"""Trains and measures the groups of a study one after another, from wherever its directory stands.

Several processes may do so in one directory, each on a GPU of its own: each takes groups that no other has.

The host is a block ahead of what it knows: it draws and dispatches one, then reads the numbers of the one before. On a
GPU other threads compile the programs of the next groups meanwhile.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.studies.config import Span, StudyConfig
from m3jax.studies.evaluation import Accuracies, evaluate_group, lower_evaluation, measure_on
from m3jax.studies.files import GroupFiles, Training
from m3jax.studies.grid import Group
from m3jax.studies.models import state_bytes
from m3jax.studies.questions import Questions, draw_block
from m3jax.studies.runs import BlockMetrics, Kept, PyTree, Recipe, init_runs, keep_better, train_block
from m3jax.training.interrupt import StopRequest
from m3jax.training.progress import LiveLine, format_seconds

_SECONDS_BETWEEN_LOGS = 10.0
_COMPILING = 2  # groups at once; tracing, half of it, is Python


def run_sweep(study: StudyConfig, workdir: Path, groups: Sequence[Group]) -> bool:
    """Trains and measures the groups that are not finished and that no other process trains.

    Args:
      study: how.
      workdir: where everything is kept, see files.py.
      groups: what make_groups gives for the study.

    Returns:
      False when a signal ended it early; the same call continues.

    Raises:
      CheckpointError: the directory is of another study.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision(study.train.matmul_precision))
        line, stop = stack.enter_context(LiveLine()), stack.enter_context(StopRequest())
        compiled = stack.enter_context(_compiled_ahead(study, workdir, groups))
        for number, group in enumerate(groups, start=1):
            files = GroupFiles(workdir, study, group)
            place = f"{number}/{len(groups)} {group.name}"
            with files.claimed() as other:
                if files.load_results() is not None:
                    line.message(f"{place}: finished before")
                    continue
                if other is not None:
                    line.message(f"{place}: process {other} trains it")
                    continue
                compiled(group)
                trainer = GroupTrainer(study, group, files)
                if not trainer.train(line, stop, place):
                    line.message(f"{stop.signal_name}: stopped. Run the same command again to continue.")
                    return False
                accuracies = evaluate_group(study, group, trainer.params)
                results = _results(study, group, trainer.training, accuracies)
                files.save_results(results)
                line.message(f"{place}: {_summary(accuracies)}; trained for {format_seconds(results['seconds'])}")
    return True


@contextlib.contextmanager
def _compiled_ahead(study: StudyConfig, workdir: Path, groups: Sequence[Group]) -> Iterator[Callable[[Group], None]]:
    """Yields what waits until a group's programs are there; threads compile those of all unfinished groups."""
    if jax.default_backend() == "cpu":  # compiling would take cores from training
        yield lambda group: None
        return
    with ThreadPoolExecutor(_COMPILING) as threads:
        waiting = {}
        for group in groups:
            files = GroupFiles(workdir, study, group)
            if files.load_results() is None:
                waiting[group.name] = threads.submit(_compile_unclaimed, study, group, files)

        def compiled(group: Group) -> None:
            if not waiting[group.name].result():
                _compile(study, group, GroupFiles(workdir, study, group))

        try:
            yield compiled
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _compile_unclaimed(study: StudyConfig, group: Group, files: GroupFiles) -> bool:
    """Compiles a group's programs unless it has been claimed, by another process or before its turn came here."""
    if files.was_claimed():
        return False
    _compile(study, group, files)
    return True


def _compile(study: StudyConfig, group: Group, files: GroupFiles) -> None:
    """Compiles what training and measuring a group calls, which finds it by its arguments."""
    with jax.default_matmul_precision(study.train.matmul_precision):  # a thread has its own
        trainer = GroupTrainer(study, group, files)
        training = (train_block.lower(*trainer.block(step)) for step in trainer.first_of_each_kind())
        programs = itertools.chain(training, lower_evaluation(study, group, trainer.training.state.params))
        with ThreadPoolExecutor() as threads:  # while one is lowered, which is Python, XLA compiles those before it
            for compiling in [threads.submit(lowered.compile) for lowered in programs]:
                compiling.result()


class GroupTrainer:
    """Trains one group.

    Attributes:
      training: how far it is.
    """

    def __init__(self, study: StudyConfig, group: Group, files: GroupFiles):
        """Takes up what the files have, or initialises."""
        self._study, self._group, self._files = study, group, files
        self._train = train = study.train
        self._recipe = Recipe(
            group.model, study.optimizer, train.steps, train.runs_at_once, train.label_smoothing, train.ema_decay
        )
        stages = train.curriculum
        self._spans = [stage.spans[i % len(stage.spans)] for stage in stages for i in range(stage.steps)]
        seeds = [run.seed for run in group.runs]
        self._seeds = np.unique(seeds).astype(np.int32)
        self._data_of_run = jnp.asarray(np.searchsorted(self._seeds, seeds), jnp.int32)
        self._rates = jnp.asarray([run.learning_rate for run in group.runs], jnp.float32)
        initial = Training(init_runs(self._recipe, jnp.asarray(seeds, jnp.int32)))
        if train.validate_every:
            initial.kept = Kept(jax.tree.map(jnp.copy, initial.state.measured), jnp.zeros(len(seeds)))
        self.training = files.load_training(initial) or initial

    @property
    def params(self) -> PyTree:
        """What training came to, [r, ...]."""
        return self.training.state.measured if self.training.kept is None else self.training.kept.params

    def train(self, line: LiveLine, stop: StopRequest, place: str) -> bool:
        """Trains to the end; False when a signal came first. What was trained is saved in either case."""
        self._last_read = saved = time.monotonic()
        self._logged = -math.inf
        training, unread = self.training, None
        while training.step < self._train.steps and not self._learned():
            training.state, metrics = train_block(*self.block(training.step))
            training.step += self._train.block_steps
            if unread is not None:
                self._read(unread, line, place)
            unread = metrics
            every, done = self._train.validate_every, training.step == self._train.steps
            if every and (done or training.step % every == 0):
                self._validate()
            stopping = stop.pending(ask_others=False)
            late = time.monotonic() - saved >= self._train.save_seconds
            saving = stopping or late or done
            if saving or self._train.stop_accuracy:  # these numbers decide whether there is another block
                self._read(unread, line, place)
                unread = None
            if saving or self._learned():
                self._files.save_training(training)
                saved = time.monotonic()
            if stopping:
                return False
        return True

    def _validate(self) -> None:
        """Measures all runs and keeps of each the better parameters."""
        training = self.training
        by_length = measure_on("validation", self._study, self._group, training.state.measured)
        accuracy = np.mean(list(by_length.values()), axis=0)
        training.kept = keep_better(training.kept, training.state.measured, jnp.asarray(accuracy, jnp.float32))
        training.curves.setdefault("validated_step", []).append(training.step)
        training.curves.setdefault("validated", []).append([_json_number(v) for v in accuracy])

    def _learned(self) -> bool:
        """Whether all seeds of a learning rate have reached train.stop_accuracy, as far as has been read."""
        kept, blocks = self.training.kept, self.training.curves.get("accuracy")
        if not blocks or not self._train.stop_accuracy:
            return False
        accuracies = blocks[-1] if kept is None else np.asarray(kept.accuracy)
        of_rate: dict[float, list[float]] = {}
        for run, accuracy in zip(self._group.runs, accuracies, strict=True):
            of_rate.setdefault(run.learning_rate, []).append(accuracy)
        return any(min(seeds) >= self._train.stop_accuracy for seeds in of_rate.values())

    def first_of_each_kind(self) -> list[int]:
        """Where blocks to be trained start whose arrays no earlier one of them has: `step` of `block`."""
        first: dict[tuple, int] = {}
        for step in range(self.training.step, self._train.steps, self._train.block_steps):
            shapes = tuple((arrays, sum(map(len, of.values()))) for arrays, of in self._kinds(step).items())
            first.setdefault(shapes, step)
        return list(first.values())

    def _kinds(self, step: int) -> dict[Span, dict[int | None, list[int]]]:
        """{lengths that arrays are for: {pairs: steps of the block}} of the block that starts after `step` steps."""
        kinds: dict[Span, dict[int | None, list[int]]] = {}
        for i, span in enumerate(self._spans[step : step + self._train.block_steps]):
            longest = next(length for length in self._train.arrays if length >= span.longest)
            # How long the shortest is matters to the width of packed rows alone.
            shortest = span.shortest if self._train.packed and span.shortest < span.longest else longest
            arrays = Span(shortest, longest)
            kinds.setdefault(arrays, {}).setdefault(span.pairs, []).append(i)
        return kinds

    def block(self, step: int) -> tuple:
        """The arguments of train_block for the block that starts after `step` steps."""
        spans = self._spans[step : step + self._train.block_steps]
        kinds = self._kinds(step)
        kind_and_place = np.zeros((len(spans), 2), np.int32)
        questions = []
        for kind, (arrays, of_pairs) in enumerate(kinds.items()):
            steps = [i for of_task in of_pairs.values() for i in of_task]
            kind_and_place[steps] = [(kind, place) for place in range(len(steps))]
            answers = max(self._group.answers(arrays._replace(pairs=pairs)) for pairs in of_pairs)
            drawn = [self._draw(step, spans, of_task, arrays, answers) for of_task in of_pairs.values()]
            questions.append(jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *drawn))
        return (self._recipe, self.training.state, self._rates, self._data_of_run, jnp.int32(step),
                jnp.asarray(kind_and_place), tuple(questions))  # fmt: skip

    def _draw(self, before: int, spans: Sequence[Span], steps: list[int], arrays: Span, answers: int) -> Questions:
        """Draws the batches of a block's steps with one task into arrays for the lengths `arrays`."""
        train, group = self._train, self._group
        lengths = np.array([spans[i][:2] for i in steps]) + group.shift
        widest = arrays._replace(pairs=spans[steps[0]].pairs)
        task = widest.task(train.training_tasks.get(group.task_name, group.task_name))
        return draw_block(
            jnp.asarray(self._seeds), *(jnp.asarray(v, jnp.int32) for v in (before + np.array(steps), *lengths.T)),
            task=task, batch_size=train.batch_size, answers=answers, bos=train.bos,
            width=group.width(widest, train.bos, train.packed), packed=train.packed,
        )  # fmt: skip

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
        validated = f"validated {np.mean(curves['validated'][-1]):.3f}  " if "validated" in curves else ""
        finite = [loss for loss in numbers["loss"] if math.isfinite(loss)] or [math.nan]
        line.show(
            f"{place}  step {step}/{self._train.steps}  loss {statistics.mean(finite):.4f}, best "
            f"{min(finite):.4f}  accuracy {np.mean(numbers['accuracy']):.3f}, best "
            f"{np.max(numbers['accuracy']):.3f}  {validated}{self._train.block_steps / seconds:.3g} steps/s  "
            f"{format_seconds(left)} left in this group",
            last=step == self._train.steps, logged=logged,
        )  # fmt: skip


def _results(study: StudyConfig, group: Group, training: Training, accuracies: Accuracies) -> dict[str, Any]:
    """What is reported of a finished group."""
    curves = training.curves
    steps_of_block, seconds = curves["step"][0], curves["seconds"]
    one_run = jax.tree.leaves(training.state.params)
    most_positions = max(group.width(span, study.train.bos) for span in study.evaluation.spans)
    runs = [
        run._asdict()
        | {name: {label: values[i] for label, values in of_set.items()} for name, of_set in accuracies.items()}
        | {"loss": [block[i] for block in curves["loss"]], "accuracy": [block[i] for block in curves["accuracy"]]}
        | {"validated": [validated[i] for validated in curves.get("validated", [])]}
        | {"skipped_steps": round(sum(block[i] for block in curves["skipped"]) * steps_of_block)}
        for i, run in enumerate(group.runs)
    ]
    return {
        "task": group.task_name,
        "chance": group.chance,
        "model": group.model_name,
        "d_model": group.model.d_model,
        "initial_steps": group.initial_steps,
        "n_layers": group.model.n_layers,
        "parameters": sum(leaf.size for leaf in one_run) // len(group.runs),
        "state_bytes": state_bytes(group.model, most_positions),
        "seconds": sum(seconds),
        "steps_per_second": steps_of_block / statistics.median(seconds),
        "steps": curves["step"],
        "validated_steps": curves.get("validated_step", []),
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
