"""The notebook: its script runs and shows what its text says, and both forms hold the same code."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tests import tolerances

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "mamba3_tour.ipynb"


def test_both_forms_hold_the_same_code():
    cells = NOTEBOOK.with_suffix(".py").read_text().split("# %%")[1:]
    script = [cell.strip() for cell in cells if not cell.startswith(" [markdown]")]
    executed = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in executed] == script
    assert all(cell["execution_count"] == i + 1 for i, cell in enumerate(executed))


def test_script_shows_what_its_text_says(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    monkeypatch.chdir(NOTEBOOK.parent)
    plt.switch_backend("agg")
    shown = runpy.run_path(str(NOTEBOOK.with_suffix(".py")))
    plt.close("all")
    assert abs(shown["orders"]["Euler"] - 1) < 0.05 and abs(shown["orders"]["trapezoid"] - 2) < 0.05
    assert shown["right"] == shown["answers"].size > 3 * shown["frozen"].right
    accuracy, width = shown["accuracy"], shown["WIDTH"]
    assert np.all(accuracy["by hand"] == 1) and accuracy["rotation"][:width].mean() > 0.99
    assert accuracy["no rotation"][width // 2 :].mean() < 0.6
    for rank, losses in shown["recalled"].items():
        assert abs(losses[-20:].mean() - (1 - rank / shown["PAIRS"])) < 0.1
    assert shown["difference"].max() < tolerances.rounding("float32", shown["model"].config.d_inner)
