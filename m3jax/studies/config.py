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
from m3jax.data.tasks import Task, get_task
from m3jax.errors import ConfigError
from m3jax.studies.models import MODELS

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")


class Span(NamedTuple):
    """Lengths of sequences, both included, and of a task that has them the number of pairs."""

    shortest: int
    longest: int
    pairs: int | None = None

    @property
    def label(self) -> str:
        """As in the config: "256", "40-256" or "64/4", 4 pairs."""
        length = str(self.longest) if self.shortest == self.longest else f"{self.shortest}-{self.longest}"
        return length if self.pairs is None else f"{length}/{self.pairs}"

    def task(self, name: str) -> Task:
        """The task of a grid's name: NAME, or NAME_PAIRS.

        Raises:
          ConfigError: there is none.
        """
        return get_task(name if self.pairs is None else f"{name}_{self.pairs}")


class Stage(NamedTuple):
    """A part of the curriculum."""

    spans: tuple[Span, ...]  # of its steps in turn, again and again
    steps: int


@dataclass(frozen=True)
class GridConfig:
    """What is compared. Every model of a width trains on a task with every learning rate and every seed."""

    tasks: str = "parity:1"  # name:number of layers
    models: str = "mamba3_siso"  # names of m3jax/studies/models.py; NAME@N: with N in place of model.d_state
    widths: str = "32"  # model.d_model
    learning_rates: str = "1e-3"  # the peaks
    seeds: int = 1  # 0, 1, ...; a seed decides initialisation and data, which learning rates and models share
    initial_steps: str = ""  # ranges MIN-MAX of step sizes at the start, each trained; "" = model.dt_min to dt_max
    length_shifts: str = ""  # task:number added to all lengths, for tasks that a source counts differently

    @property
    def task_layers(self) -> tuple[tuple[str, int], ...]:
        """(task, number of layers) of every task."""
        return tuple((name, layers) for name, layers in _pairs("grid.tasks", self.tasks, "TASK:LAYERS", str, int))

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models, as they are called in results."""
        return _items("grid.models", self.models, "names of models", str)

    @property
    def d_models(self) -> tuple[int, ...]:
        """Widths of the models."""
        return _items("grid.widths", self.widths, "widths", int)

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates."""
        return _items("grid.learning_rates", self.learning_rates, "learning rates", float)

    @property
    def step_ranges(self) -> tuple[tuple[float, float] | None, ...]:
        """(dt_min, dt_max) of every range of initial steps; None = as the model's config has them."""
        return (
            _items("grid.initial_steps", self.initial_steps, "ranges MIN-MAX", _range)
            if self.initial_steps
            else (None,)
        )

    def shift(self, task: str) -> int:
        """What is added to all lengths of a task."""
        pairs = _pairs("grid.length_shifts", self.length_shifts, "TASK:NUMBER", str, int) if self.length_shifts else ()
        return dict(pairs).get(task, 0)


@dataclass(frozen=True)
class TrainingConfig:
    """How every run trains."""

    # The curriculum: longest length:steps of every stage in turn; spaces between the lengths of steps that alternate.
    stages: str = "40:1000"  # or SHORTEST-LONGEST in place of a longest length
    shortest: int = 3  # length where a stage has none; 0 = all sequences of a step are as long as its longest
    drawn_as: str = ""  # task:other task, whose sequences it is trained with; it is tested on its own
    array_lengths: str = "40"  # arrays hold sequences of one of these lengths, the first that is enough; each compiles
    batch_size: int = 256
    packed: bool = False  # two sequences in a row, lengths drawn in pairs of one sum (questions.py): less padding
    block_steps: int = 100  # steps of one call; all stages together are a multiple
    label_smoothing: float = 0.0  # share of a target's probability that all tokens of the vocabulary have alike
    ema_decay: float = 0.0  # runs are measured with this moving average of their parameters; 0 = the last ones
    validate_every: int = 0  # steps; every run keeps what was best on the validation draw. 0 = what training ends with
    # A group ends once all seeds of a learning rate reach it: at validation, or without that over a block. 0 = never
    stop_accuracy: float = 0.0
    bos: bool = False  # a token of its own before every sequence
    runs_at_once: int = 0  # a step computes so many runs together, then the next, to save memory; 0 = all
    matmul_precision: str = "float32"  # on a GPU also tensorfloat32 or bfloat16; phases and states stay float32
    save_seconds: float = 30.0  # at least this long between saves of a group that is training

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages."""
        stages = _pairs("train.stages", self.stages, "LENGTH:STEPS or 'LENGTH LENGTH ...:STEPS'", str.split, int)
        spans = (tuple(self._span(text) for text in lengths) for lengths, _ in stages)
        return tuple(Stage(of_stage, steps) for of_stage, (_, steps) in zip(spans, stages, strict=True))

    @property
    def steps(self) -> int:
        """Steps of all stages, the length of the learning rate's schedule."""
        return sum(stage.steps for stage in self.curriculum)

    def _span(self, text: str) -> Span:
        span = _span("train.stages", text)
        return span if "-" in text else span._replace(shortest=self.shortest or span.longest)

    @property
    def training_tasks(self) -> dict[str, str]:
        """{task: whose sequences it is trained with}; all others are trained with their own."""
        return dict(_pairs("train.drawn_as", self.drawn_as, "TASK:TASK", str, str) if self.drawn_as else ())

    @property
    def arrays(self) -> tuple[int, ...]:
        """Lengths of sequences that arrays are made for, ascending."""
        return tuple(sorted(_items("train.array_lengths", self.array_lengths, "lengths", int)))


@dataclass(frozen=True)
class EvaluationConfig:
    """Where trained runs are measured. One draw of sequences chooses the learning rate, another one is reported."""

    # A length, or two with a hyphen between: drawn evenly from them. For tasks of a number of pairs N/PAIRS.
    lengths: str = "256"
    sequences: int = 8192  # per item of lengths

    @property
    def spans(self) -> tuple[Span, ...]:
        """The items of lengths."""
        texts = _items("evaluation.lengths", self.lengths, "lengths N or N-N", str)
        return tuple(_span("evaluation.lengths", text) for text in texts)


def _shared_model() -> ModelConfig:
    # At these sizes there is memory for all activations.
    return ModelConfig(d_intermediate=0, d_state=64, dtype="float32", remat="none")


@dataclass(frozen=True)
class StudyConfig:
    """Everything a study depends on."""

    grid: GridConfig = field(default_factory=GridConfig)
    # What all models have in common; the grid sets mixers, d_model, n_layers, vocab_size and the heads of other mixers.
    model: ModelConfig = field(default_factory=_shared_model)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # the grid has the learning rates
    train: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def training_spans(self) -> tuple[Span, ...]:
        """Where training sequences come from, each once."""
        return tuple(dict.fromkeys(span for stage in self.train.curriculum for span in stage.spans))


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
    runs, at_once = len(study.grid.rates) * study.grid.seeds, study.train.runs_at_once
    require(at_once >= 0 and runs % (at_once or 1) == 0, "train.runs_at_once", at_once,
            f"0 or a divisor of the {runs} runs of a group")  # fmt: skip
    require(study.evaluation.sequences >= 1, "evaluation.sequences", study.evaluation.sequences, "at least 1")
    _check_lengths(study)
    _check_drawn_as(study)
    return study


def _check_grid(grid: GridConfig) -> None:
    for name, layers in grid.task_layers:
        require(layers >= 1, "grid.tasks", grid.tasks, "at least one layer for every task")
        grid.shift(name)
    for label in grid.model_names:
        name, at, d_state = label.partition("@")
        one_of("grid.models", name, MODELS)
        require(not at or d_state.isdecimal(), "grid.models", label, "a model's name, or NAME@WIDTH of the state")
    require(min(grid.d_models) >= 1, "grid.widths", grid.widths, "positive widths")
    require(min(grid.rates) > 0, "grid.learning_rates", grid.learning_rates, "positive numbers")
    require(grid.seeds >= 1, "grid.seeds", grid.seeds, "at least 1")
    for bounds in grid.step_ranges:
        require(bounds is None or 0 < bounds[0] <= bounds[1], "grid.initial_steps", grid.initial_steps,
                "ranges of positive numbers, the smaller one first")  # fmt: skip


def _check_train(train: TrainingConfig) -> None:
    for stage in train.curriculum:
        numbers = [stage.steps, *(span.longest for span in stage.spans)]
        require(len(numbers) > 1 and min(numbers) >= 1, "train.stages", train.stages,
                "at least one length for every stage, and positive numbers")  # fmt: skip
    for name in ("batch_size", "block_steps"):
        require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "at least 1")
    require(not train.packed or train.batch_size % 2 == 0, "train.batch_size", train.batch_size,
            "an even number, as train.packed puts two sequences in a row")  # fmt: skip
    require(train.steps % train.block_steps == 0, "train.block_steps", train.block_steps,
            f"a divisor of the {train.steps} steps of train.stages")  # fmt: skip
    for stage in train.curriculum:
        cycle = len(stage.spans)
        require(cycle == 1 or stage.steps % cycle == train.block_steps % cycle == 0,
                "train.block_steps", train.block_steps,
                f"a multiple of the {cycle} lengths that alternate, and the stage's steps too")  # fmt: skip
    longest = max(span.longest for stage in train.curriculum for span in stage.spans)
    require(train.arrays[-1] >= longest, "train.array_lengths", train.array_lengths,
            f"one of at least {longest}, the longest of train.stages")  # fmt: skip
    require(train.validate_every >= 0 and train.validate_every % train.block_steps == 0, "train.validate_every",
            train.validate_every, f"0 or a multiple of the {train.block_steps} steps of a block")  # fmt: skip
    require(0 <= train.stop_accuracy <= 1, "train.stop_accuracy", train.stop_accuracy, "0 or a share of the answers")
    require(0 <= train.label_smoothing < 1, "train.label_smoothing", train.label_smoothing, "0 or a share under 1")
    require(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "a number in [0, 1)")
    one_of("train.matmul_precision", train.matmul_precision, PRECISIONS)
    require(train.save_seconds >= 0, "train.save_seconds", train.save_seconds, "at least 0")


def _check_lengths(study: StudyConfig) -> None:
    """Lengths are in order, and every task has them."""
    spans = {"train.stages": study.training_spans, "evaluation.lengths": study.evaluation.spans}
    for name, _ in study.grid.task_layers:
        for key, of_key in spans.items():
            for span in of_key:
                task, shift = span.task(name), study.grid.shift(name)
                least = task.shortest - shift
                require(least <= span.shortest <= span.longest, key, span.label,
                        f"lengths in ascending order, for {task.name} of at least {least}")  # fmt: skip
                require(not task.even or not any((length + shift) % 2 for length in (span.shortest, span.longest)),
                        key, span.label, f"{'odd' if shift % 2 else 'even'} lengths for {task.name}")  # fmt: skip


def _check_drawn_as(study: StudyConfig) -> None:
    """What a task is drawn as fits into its arrays and model."""

    def sizes(task: Task, longest: int) -> tuple[int, ...]:
        return task.vocab_size, task.shortest, task.positions(longest), task.answers(longest)

    for name, other in study.train.training_tasks.items():
        one_of("train.drawn_as", name, tuple(dict(study.grid.task_layers)))
        for span in study.training_spans:
            longest = span.longest + study.grid.shift(name)
            require(sizes(span.task(name), longest) == sizes(span.task(other), longest), "train.drawn_as",
                    study.train.drawn_as, f"a task with the tokens and lengths of {name}")  # fmt: skip


def _range(text: str) -> tuple[float, float]:
    low, high = text.split("-")
    return float(low), float(high)


def _span(key: str, text: str) -> Span:
    numbers, slash, pairs = text.partition("/")
    low, _, high = numbers.partition("-")
    require(low.isdecimal() and (high or low).isdecimal() and (not slash or pairs.isdecimal()), key, text,
            "lengths N or N-N, with N/PAIRS for tasks of a number of pairs")  # fmt: skip
    return Span(int(low), int(high or low), int(pairs) if slash else None)


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
