"""The configuration of a study: which models on which tasks, how they train, where they are measured.

Lists are texts with commas between their items, so that any of them can be changed on the command line.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax.config import ModelConfig, OptimizerConfig, build_config, from_values, one_of, require
from m3jax.data.tasks import get_task
from m3jax.errors import ConfigError
from m3jax.studies.models import MODELS

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")


class Stage(NamedTuple):
    """A part of the curriculum."""

    longest: int  # length, in the task's own count
    steps: int


class Span(NamedTuple):
    """Lengths of an evaluation, both included."""

    shortest: int
    longest: int

    @property
    def label(self) -> str:
        """As in the config: "256" or "40-256"."""
        return str(self.longest) if self.shortest == self.longest else f"{self.shortest}-{self.longest}"


@dataclass(frozen=True)
class GridConfig:
    """What is compared. Every model of a width trains on a task with every learning rate and every seed."""

    tasks: str = "parity:1"  # name:number of layers
    models: str = "mamba3_siso"  # names of m3jax/studies/models.py
    widths: str = "32"  # model.d_model
    learning_rates: str = "1e-3"  # the peaks
    seeds: int = 1  # 0, 1, ...; a seed decides initialisation and data, which learning rates and models share
    length_shifts: str = ""  # task:number added to all lengths, for tasks that a source counts differently

    @property
    def task_layers(self) -> tuple[tuple[str, int], ...]:
        """(task, number of layers) of every task."""
        return tuple((name, layers) for name, layers in _pairs("grid.tasks", self.tasks, "TASK:LAYERS", str, int))

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models."""
        return _items("grid.models", self.models, "names of models", str)

    @property
    def d_models(self) -> tuple[int, ...]:
        """Widths of the models."""
        return _items("grid.widths", self.widths, "widths", int)

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates."""
        return _items("grid.learning_rates", self.learning_rates, "learning rates", float)

    def shift(self, task: str) -> int:
        """What is added to all lengths of a task."""
        pairs = _pairs("grid.length_shifts", self.length_shifts, "TASK:NUMBER", str, int) if self.length_shifts else ()
        return dict(pairs).get(task, 0)


@dataclass(frozen=True)
class TrainingConfig:
    """How every run trains."""

    stages: str = "40:1000"  # the curriculum: longest length:steps of every stage in turn
    shortest: int = 3  # length in all stages
    array_lengths: str = "40"  # arrays hold sequences of one of these lengths, the first that is enough; each compiles
    batch_size: int = 256
    block_steps: int = 100  # steps of one call; all stages together are a multiple
    bos: bool = False  # a token of its own before every sequence
    matmul_precision: str = "float32"  # on a GPU also tensorfloat32 or bfloat16; phases and states stay float32
    save_seconds: float = 30.0  # at least this long between saves of a group that is training

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages."""
        return tuple(Stage(*pair) for pair in _pairs("train.stages", self.stages, "LENGTH:STEPS", int, int))

    @property
    def steps(self) -> int:
        """Steps of all stages, the length of the learning rate's schedule."""
        return sum(stage.steps for stage in self.curriculum)

    @property
    def arrays(self) -> tuple[int, ...]:
        """Lengths of sequences that arrays are made for, ascending."""
        return tuple(sorted(_items("train.array_lengths", self.array_lengths, "lengths", int)))


@dataclass(frozen=True)
class EvaluationConfig:
    """Where trained runs are measured. One draw of sequences chooses the learning rate, another one is reported."""

    lengths: str = "256"  # a length, or two with a hyphen between: drawn evenly from them
    sequences: int = 8192  # per item of lengths

    @property
    def spans(self) -> tuple[Span, ...]:
        """The items of lengths."""
        spans = []
        for text in _items("evaluation.lengths", self.lengths, "lengths N or N-N", str):
            low, _, high = text.partition("-")
            require(low.isdecimal() and (high or low).isdecimal(), "evaluation.lengths", self.lengths,
                    "lengths N or N-N with commas between")  # fmt: skip
            spans.append(Span(int(low), int(high or low)))
        return tuple(spans)


def _shared_model() -> ModelConfig:
    # Kernels for GPUs cannot be mapped over runs, and at these sizes there is memory for all activations.
    return ModelConfig(d_intermediate=0, d_state=64, dtype="float32", remat="none", scan_implementation="xla")


@dataclass(frozen=True)
class StudyConfig:
    """Everything a study depends on."""

    grid: GridConfig = field(default_factory=GridConfig)
    # What all models have in common; the grid sets mixers, d_model, n_layers, vocab_size and the heads of other mixers.
    model: ModelConfig = field(default_factory=_shared_model)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # the grid has the learning rates
    train: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def default_study() -> ConfigDict:
    """Returns every key with its default, locked, for a config file to change."""
    return ConfigDict(dataclasses.asdict(StudyConfig()), type_safe=False).lock()


def build_study(values: ConfigDict | dict[str, Any]) -> StudyConfig:
    """Checks a whole study and freezes it.

    Args:
      values: nested keys and values; keys that are left out take their defaults.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, an unknown task or model, lengths that do not fit; the
        message names the key, the value and what was expected.
    """
    values = copy.deepcopy(values.to_dict() if isinstance(values, ConfigDict) else values)
    shared = dataclasses.asdict(_shared_model())
    values["model"] = shared | values.get("model", {})
    study = from_values(StudyConfig, values)
    require(study.optimizer.learning_rate == OptimizerConfig.learning_rate, "optimizer.learning_rate",
            study.optimizer.learning_rate, "the default: grid.learning_rates has the learning rates")  # fmt: skip
    build_config({"model": values["model"], "optimizer": dataclasses.asdict(study.optimizer)})
    _check_grid(study.grid)
    _check_train(study.train)
    require(study.evaluation.sequences >= 1, "evaluation.sequences", study.evaluation.sequences, "at least 1")
    _check_lengths(study)
    return study


def _check_grid(grid: GridConfig) -> None:
    for name, layers in grid.task_layers:
        get_task(name)
        require(layers >= 1, "grid.tasks", grid.tasks, "at least one layer for every task")
        grid.shift(name)
    for name in grid.model_names:
        one_of("grid.models", name, MODELS)
    require(min(grid.d_models) >= 1, "grid.widths", grid.widths, "positive widths")
    require(min(grid.rates) > 0, "grid.learning_rates", grid.learning_rates, "positive numbers")
    require(grid.seeds >= 1, "grid.seeds", grid.seeds, "at least 1")


def _check_train(train: TrainingConfig) -> None:
    require(min(min(stage) for stage in train.curriculum) >= 1, "train.stages", train.stages, "positive numbers")
    for name in ("batch_size", "block_steps"):
        require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "at least 1")
    require(train.steps % train.block_steps == 0, "train.block_steps", train.block_steps,
            f"a divisor of the {train.steps} steps of train.stages")  # fmt: skip
    longest = max(stage.longest for stage in train.curriculum)
    require(train.arrays[-1] >= longest, "train.array_lengths", train.array_lengths,
            f"one of at least {longest}, the longest of train.stages")  # fmt: skip
    one_of("train.matmul_precision", train.matmul_precision, PRECISIONS)
    require(train.save_seconds >= 0, "train.save_seconds", train.save_seconds, "at least 0")


def _check_lengths(study: StudyConfig) -> None:
    """Lengths are in order, and every task has them."""
    spans = {"train.stages": [Span(study.train.shortest, stage.longest) for stage in study.train.curriculum]}
    spans["evaluation.lengths"] = list(study.evaluation.spans)
    for name, _ in study.grid.task_layers:
        least = get_task(name).shortest - study.grid.shift(name)
        for key, of_key in spans.items():
            for span in of_key:
                require(least <= span.shortest <= span.longest, key, span.label,
                        f"lengths in ascending order, for {name} of at least {least}")  # fmt: skip


def _items(key: str, text: str, what: str, kind: Callable[[str], Any]) -> tuple:
    try:
        items = tuple(kind(item.strip()) for item in text.split(","))
    except ValueError:
        items = ()
    if not items or "" in items:
        raise ConfigError(f"config.{key} = {text!r}: expected {what} with commas between.")
    return items


def _pairs(key: str, text: str, what: str, *kinds: Callable[[str], Any]) -> tuple:
    def pair(item: str) -> tuple:
        return tuple(kind(part) for kind, part in zip(kinds, item.split(":"), strict=True))

    return _items(key, text, f"{what} items", pair)
