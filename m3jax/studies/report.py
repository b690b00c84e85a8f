"""What a study found: results.json with every run, results.md with a table per task, pictures.

Of each model on a task one setting (width, initial steps, learning rate) is chosen, the one whose runs have the best
median accuracy on the validation sequences, averaged over the lengths; reported is the median of its seeds on the test
sequences. Beside it stands the best of all runs of the model, whatever their setting, which papers often report.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from m3jax.circumstances import circumstances
from m3jax.data.atomic import whole_file
from m3jax.data.tasks import scaled_accuracy
from m3jax.errors import ConfigError
from m3jax.studies.config import StudyConfig
from m3jax.studies.files import GroupFiles
from m3jax.studies.grid import Group, make_groups
from m3jax.studies.plots import plot_task
from m3jax.training.manifest import write_json

_LIKE_NONE = 1e-3  # chance levels under it change no digit that matters
Results = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A model on a task.

    Attributes:
      model: its name.
      group: results of the group with the chosen width and initial steps.
      learning_rate: the chosen one.
      runs: of this setting, one per seed.
      n_runs: of all settings.
      best: {label of lengths: accuracy of the best of all runs}.
    """

    model: str
    group: Results
    learning_rate: float
    runs: Sequence[Results]
    n_runs: int
    best: dict[str, float]

    def accuracies(self, label: str) -> list[float]:
        """Of every seed of the chosen setting on the test sequences."""
        return [run["test"][label] for run in self.runs]


def choose(groups: Sequence[Results]) -> Choice:
    """Chooses the setting of one model on one task from its groups, which differ in width and initial steps."""
    settings: dict[tuple[int, float], list[Results]] = {}
    for i, group in enumerate(groups):
        for run in group["runs"]:
            settings.setdefault((i, run["learning_rate"]), []).append(run)

    def score(runs: Sequence[Results]) -> float:
        return statistics.median(statistics.mean(run["validation"].values()) for run in runs)

    (i, rate), runs = max(settings.items(), key=lambda item: score(item[1]))
    every_run = [run for group in groups for run in group["runs"]]
    best = {label: max(run["test"][label] for run in every_run) for label in every_run[0]["test"]}
    return Choice(groups[i]["model"], groups[i], rate, runs, len(every_run), best)


def by_task(groups: Sequence[Results]) -> dict[str, list[Choice]]:
    """{task: a choice for every model}, in the order of the groups."""
    sorted_groups: dict[str, dict[str, list[Results]]] = {}
    for group in groups:
        sorted_groups.setdefault(group["task"], {}).setdefault(group["model"], []).append(group)
    return {task: [choose(of_model) for of_model in models.values()] for task, models in sorted_groups.items()}


def tables(groups: Sequence[Results]) -> str:
    """Markdown: for every task the scaled accuracies, unless chance is next to nothing, then the raw ones."""
    text = [
        "Accuracy in percent: the median over the seeds of the setting chosen on validation sequences, and in brackets "
        "the best of all runs. Scaled: 0 is guessing, 100 no error. State: what decoding keeps of a sequence of the "
        "longest test, kB per layer on average. N/P: sequences of N tokens with P pairs."
    ]
    for task, choices in by_task(groups).items():
        chance = choices[0].group["chance"]
        layers = choices[0].group["n_layers"]
        text.append(f"## {task}, {layers} layer{'s' if layers > 1 else ''}, chance {100 * chance:.3g} %")
        if chance >= _LIKE_NONE:
            text.append(_table("scaled", choices, lambda accuracy, chance=chance: scaled_accuracy(accuracy, chance)))
        text.append(_table("raw", choices, lambda accuracy: accuracy))
    return "\n\n".join(text) + "\n"


def _table(name: str, choices: Sequence[Choice], scale) -> str:
    labels = list(choices[0].best)
    ranges = any(choice.group.get("initial_steps") for choice in choices)
    head = [name, "parameters", "state", "width", *(["initial steps"] if ranges else [])]
    head += ["learning rate", "steps", "seeds", "runs"]
    head += [f"at {label}" for label in labels]
    rows = [head, ["---"] * len(head)]
    for choice in choices:
        row = [choice.model, f"{choice.group['parameters']:,}"]
        row += [f"{choice.group['state_bytes'] / choice.group['n_layers'] / 1000:,.1f}", str(choice.group["d_model"])]
        if ranges:
            row.append(" to ".join(str(v) for v in choice.group["initial_steps"] or ["none"]))
        row += [
            f"{choice.learning_rate:.2g}",
            f"{choice.group['steps'][-1]:,}",
            str(len(choice.runs)),
            str(choice.n_runs),
        ]
        for label in labels:
            median = statistics.median(choice.accuracies(label))
            row.append(f"{100 * scale(median):.2f} ({100 * scale(choice.best[label]):.2f})")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_report(workdir: Path, study: StudyConfig, command: str, commit: str | None) -> list[Path]:
    """Writes results.json, results.md and a picture per task of all finished groups of a study.

    Args:
      workdir: of the study.
      study: its config.
      command: what was run, for the record.
      commit: of the code, if known.

    Returns:
      The paths of what was written.
    """
    with FileLock(workdir / ".report.lock"):  # several processes may end at the same time; the last has all groups
        groups = [GroupFiles(workdir, study, group).load_results() for group in _possible_groups(study)]
        groups = [results for results in groups if results is not None]
        record = circumstances(commit) | {"command": command, "config": dataclasses.asdict(study), "groups": groups}
        paths = [workdir / "results.json", workdir / "results.md"]
        write_json(paths[0], record)
        seconds = sum(group["seconds"] for group in groups)
        circumstance = f"{record['device']}, jax {record['jax']}, {seconds / 60:.1f} minutes of training."
        with whole_file(paths[1]) as file:
            file.write(f"# {workdir.absolute().name}\n\n    {command}\n\n{circumstance}\n\n{tables(groups)}")
        paths += [plot_task(workdir / f"{task}.png", task, choices) for task, choices in by_task(groups).items()]
        return paths


def _possible_groups(study: StudyConfig) -> Iterator[Group]:
    """All but those of models that the study's sizes do not fit, of which there can be no results."""
    for model in study.grid.model_names:
        with contextlib.suppress(ConfigError):
            yield from make_groups(study, models=[model])
