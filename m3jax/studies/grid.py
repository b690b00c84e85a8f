"""The groups of a study: the runs that train together because their arrays have the same shapes."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from m3jax.config import ModelConfig, one_of, round_up
from m3jax.data.tasks import Task
from m3jax.errors import ConfigError
from m3jax.studies.config import Span, StudyConfig
from m3jax.studies.models import model_config

_POSITIONS = 8


class Run(NamedTuple):
    """What a group's runs differ in."""

    learning_rate: float  # the peak
    seed: int  # of initialisation and data


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one model on one task.

    Attributes:
      task_name: what is learned, as the grid calls it.
      chance: its chance level.
      model_name: as the grid calls it.
      model: its config. Vocabularies are rounded up as the embedding is, so that tasks can share compiled programs.
      runs: every learning rate with every seed.
      shift: what is added to all lengths of the study.
      initial_steps: (dt_min, dt_max) of the model, if the grid has several.
    """

    task_name: str
    chance: float
    model_name: str
    model: ModelConfig
    runs: tuple[Run, ...]
    shift: int
    initial_steps: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Names files: task, model and width, and the initial steps if the grid has them."""
        name = f"{self.task_name}-{self.model_name}-{self.model.d_model}"
        return name if self.initial_steps is None else f"{name}-{'-'.join(f'{v:g}' for v in self.initial_steps)}"

    def task(self, span: Span) -> Task:
        """The task that a span's sequences are of."""
        return span.task(self.task_name)

    def width(self, span: Span, bos: bool, packed: bool = False) -> int:
        """Positions of arrays for a span's sequences; packed, for a shortest and a longest one side by side.

        Rounded up to a multiple of 8, so that tasks which count a position more or less have the same arrays.
        """
        lengths = (span.longest, span.shortest) if packed else (span.longest,)
        positions = sum(self.task(span).positions(length + self.shift) + bos for length in lengths)
        return round_up(positions, _POSITIONS)

    def answers(self, span: Span) -> int:
        """The most supervised positions of a span's sequences."""
        return self.task(span).answers(span.longest + self.shift)


def make_groups(
    study: StudyConfig, tasks: Collection[str] | None = None, models: Collection[str] | None = None
) -> list[Group]:
    """Lists the groups of a study, or those of some of its tasks and models; the small ones of a task come first.

    Raises:
      ConfigError: a task or model that the study does not have, or sizes that do not fit.
    """
    grid = study.grid
    for chosen, key, known in (
        (tasks, "grid.tasks", dict(grid.task_layers)),
        (models, "grid.models", grid.model_names),
    ):
        for name in chosen or ():
            one_of(key, name, tuple(known))
    runs = tuple(Run(rate, seed) for rate in grid.rates for seed in range(grid.seeds))
    groups = []
    for (task_name, layers), d_model, model_name, steps in itertools.product(
        grid.task_layers, grid.d_models, grid.model_names, grid.step_ranges
    ):
        if (tasks and task_name not in tasks) or (models and model_name not in models):
            continue
        task = study.training_spans[0].task(task_name)
        vocab_size = round_up(task.vocab_size + study.train.bos, study.model.pad_vocab_multiple)
        shared = study.model
        if steps is not None:
            shared = dataclasses.replace(shared, dt_min=steps[0], dt_max=steps[1])
        model = model_config(model_name, shared, d_model, layers, vocab_size)
        if set(model.mixer_pattern) == {"attention"}:  # which has no steps
            if steps != grid.step_ranges[0]:
                continue
            steps = None
        groups.append(Group(task_name, task.chance, model_name, model, runs, grid.shift(task_name), steps))
    twice = [name for name, count in Counter(group.name for group in groups).items() if count > 1]
    if twice:
        raise ConfigError(
            f"config.grid has {twice[0]} twice: expected every task, model, width and range of initial steps once."
        )
    return groups
