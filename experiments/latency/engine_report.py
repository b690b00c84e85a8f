"""The table, the plots and the merging of what engine.py measured; a report is the content of one of its JSON files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.lines import Line2D

from m3jax.errors import ConfigError

Row = dict[str, Any]
Report = dict[str, Any]

COLOURS = {"siso": "C0", "mimo": "C1", "mamba2": "C2", "gdn": "C3", "transformer": "C4", "hybrid": "C5"}
BATCH_COLOURS = ("C0", "C1", "C2", "C3")
HEAD = (
    ("model", 11), ("state", 8), ("batch", 5), ("n", 5), ("prefill s (× floor)", 19), ("step ms (× floor)", 17),
    ("both s", 10), ("paper: prefill s", 16), ("both s", 7),
)  # fmt: skip


def read(path: Path) -> Report:
    """A report as it was written.

    Raises:
      ConfigError: the file holds something else.
    """
    try:
        report = json.loads(path.read_text())
        report["date"], report["rows"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--merge {path}: expected a report that engine.py wrote.") from error
    return report


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table with the columns of HEAD."""
    return f"| {' | '.join(cell.ljust(width) for cell, (_, width) in zip(cells, HEAD, strict=True))} |"


def head() -> str:
    """The first two lines of the table."""
    return f"{line([name for name, _ in HEAD])}\n{line(['-' * width for _, width in HEAD])}"


def cells(row: Row) -> list[str]:
    """A row's cells; what failed says why in that of the prefill."""
    label = [row["model"], row["state_dtype"], str(row["batch"]), str(row["length"])]
    paper = [f"{row['paper'][key]:.2f}" if "paper" in row else "" for key in ("prefill_s", "prefill_and_decode_s")]
    if "failed" in row:
        return [*label, row["failed"], "", "", *paper]
    timed = [f"{row[key]['median']:#.4g} ({times_floor(row, key):.2f})" for key in ("prefill_s", "step_ms")]
    return [*label, *timed, f"{row['prefill_and_decode_s']:#.4g}" + " *" * ("extrapolated_from" in row), *paper]


def times_floor(row: Row, key: str) -> float:
    """The median over the floor."""
    return row[key]["median"] / row["floor"][key]


def table(report: Report) -> str:
    """All rows in Markdown."""
    return "\n".join([head(), *(line(cells(row)) for row in report["rows"])])


def merge(reports: Sequence[Report]) -> Report:
    """One report of several of the same device; a newer row takes the place of an older one of its cell.

    Runs and rows keep the commit that they were measured at.

    Raises:
      ConfigError: reports that differ in device, versions or sizes.
    """
    reports = sorted(reports, key=lambda report: report["date"])
    of_a_run = ("date", "commit", "ceilings", "runs", "errors", "rows")
    heads = [{key: value for key, value in report.items() if key not in of_a_run} for report in reports]
    for key in dict.fromkeys(key for one in heads for key in one):
        values = {str(one.get(key)) for one in heads}
        if len(values) > 1:
            raise ConfigError(f"--merge: {key} is {' and '.join(sorted(values))}; expected one of all files.")
    rows, errors, runs = {}, {}, []
    for report in reports:
        for row in report["rows"]:
            cell = (row["model"], row["state_dtype"], row["batch"], row["length"])
            rows[cell] = {"commit": report.get("commit")} | row
        errors |= report["errors"]
        runs += report.get("runs") or [{key: report[key] for key in ("date", "commit", "ceilings")}]
    models = list(COLOURS)
    ordered = sorted(rows.items(), key=lambda item: (models.index(item[0][0]), *item[0][1:]))
    merged = {"date": reports[-1]["date"]} | heads[-1] | {"runs": runs, "errors": errors}
    return merged | {"rows": [row for _, row in ordered]}


def plot(report: Report, folder: Path, stem: str) -> None:
    """Draws the two figures, folder/stem.png and folder/stem_roofline.png; none if no cell was measured."""
    rows = [row for row in report["rows"] if "failed" not in row]
    if rows:
        _plot_seconds(rows, report["device"], folder / f"{stem}.png")
        _plot_roofline(rows, report["device"], folder / f"{stem}_roofline.png")


def _of(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _plot_seconds(rows: Sequence[Row], device: str, path: Path) -> None:
    """Milliseconds of prefill and decoding per new token, over n; an axis for each batch that has several n."""
    batches = sorted({row["batch"] for row in rows})
    batches = [b for b in batches if len({row["length"] for row in _of(rows, batch=b)}) > 1] or batches
    figure, axes = plt.subplots(
        1, len(batches), figsize=(1.8 + 4.2 * len(batches), 4.2), squeeze=False, layout="constrained"
    )
    kinds = [("bfloat16", "o-"), ("float32", "s--")]
    kinds = [(dtype, style) for dtype, style in kinds if _of(rows, state_dtype=dtype)]
    models = [name for name in COLOURS if _of(rows, model=name)]
    for axis, batch in zip(axes[0], batches, strict=True):
        for name in models:
            for dtype, style in kinds:
                own = sorted(_of(rows, model=name, state_dtype=dtype, batch=batch), key=lambda row: row["length"])
                times = [1e3 * row["prefill_and_decode_s"] / row["length"] for row in own]
                axis.plot([r["length"] for r in own], times, style, color=COLOURS[name], ms=4)
                paper = [
                    (r["length"], 1e3 * r["paper"]["prefill_and_decode_s"] / r["length"]) for r in own if "paper" in r
                ]
                if paper:
                    axis.plot(*zip(*paper, strict=True), "x", color=COLOURS[name])
        axis.set(xscale="log", xlabel="n", title=f"batch {batch}")
        _ticks(axis.xaxis, sorted({row["length"] for row in _of(rows, batch=batch)}))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms per new token: prompt of n, n more")
    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in models]
    handles += [
        Line2D([], [], color="k", ls=style[1:], marker=style[0], ms=4, label=f"{dtype} state") for dtype, style in kinds
    ]
    if any("paper" in row for row in rows):
        handles.append(Line2D([], [], color="k", ls="", marker="x", label="paper, H100"))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(device, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers at these values and nowhere else."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def _plot_roofline(rows: Sequence[Row], device: str, path: Path) -> None:
    """Measured time over the floor: a line for each model and state, a colour for each batch, a dot for each n."""
    groups = [
        group for name in COLOURS for group in sorted({(r["model"], r["state_dtype"]) for r in _of(rows, model=name)})
    ]
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.32 * len(groups)), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("prefill_s", "step_ms"), ("prefill", "decode step"), strict=True):
        for i, (name, dtype) in enumerate(groups):
            for j, batch in enumerate(batches):
                ratios = [times_floor(row, key) for row in _of(rows, model=name, state_dtype=dtype, batch=batch)]
                height = [i + 0.5 * (j + 0.5) / len(batches) - 0.25] * len(ratios)
                axis.plot(ratios, height, "o", color=BATCH_COLOURS[j % len(BATCH_COLOURS)], ms=4)
        axis.axvline(1, color="k", lw=1)
        axis.set(xscale="log", xlabel=f"{title}: measured over floor")
        _ticks(axis.xaxis, [t for t in (1, 1.25, 1.5, 2, 3, 5, 10) if t < axis.get_xlim()[1]])
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(groups)), [f"{name}, {dtype} state" for name, dtype in groups], fontsize=8)
    axes[0].invert_yaxis()
    dots = [
        Line2D([], [], ls="", marker="o", color=BATCH_COLOURS[j % len(BATCH_COLOURS)], label=f"batch {batch}")
        for j, batch in enumerate(batches)
    ]
    figure.legend(handles=dots, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(device, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
