"""Pictures of a study: accuracy by length or number of pairs, and learning curves, with the spread over seeds."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

if TYPE_CHECKING:
    from m3jax.studies.report import Choice


def plot_task(path: Path, task: str, choices: Sequence["Choice"]) -> Path:
    """Draws a task's models in the settings chosen for them: medians over seeds, from the worst to the best as a band.

    Args:
      path: of the PNG.
      task: its name.
      choices: the models.

    Returns:
      The path.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_size, by_step = figure.subplots(1, 2)
    of_pairs = all("/" in label for label in choices[0].best)
    for choice in choices:
        labels = list(choice.best)
        sizes = [int(label.partition("/")[2]) if of_pairs else _middle(label) for label in labels]
        _band(by_size, choice.model, sizes, [choice.accuracies(label) for label in labels], marker="o")
        blocks = zip(*(run["accuracy"] for run in choice.runs), strict=True)
        _band(by_step, choice.model, choice.group["steps"], list(blocks))
    for axes, xlabel, title in (
        (by_size, "pairs" if of_pairs else "length", "test"),
        (by_step, "step", "training"),
    ):
        axes.axhline(choices[0].group["chance"], color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=xlabel, ylabel="accuracy", title=f"{task}, {title}", ylim=(None, 1.02))
        axes.grid(alpha=0.3)
    by_size.set_xscale("log", base=2)
    by_size.set_xticks(sizes)
    by_size.xaxis.set_major_formatter(ScalarFormatter())
    by_size.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _middle(label: str) -> float:
    """Of the lengths, on the axis."""
    low, _, high = label.partition("/")[0].partition("-")
    return math.sqrt(int(low) * int(high or low))


def _band(axes: Axes, name: str, x: Sequence[float], values: Sequence[Sequence[float]], **style) -> None:
    values = [[v for v in point if v is not None] for point in values]
    (line,) = axes.plot(x, [statistics.median(point) for point in values], label=name, linewidth=1.5, **style)
    ends = [min(point) for point in values], [max(point) for point in values]
    axes.fill_between(x, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
