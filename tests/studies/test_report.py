"""Tables of made-up results: what is chosen, by which sequences, and what stands beside it."""

import pytest

from m3jax.studies.report import by_task, tables


def group(task, model, width, accuracies, chance=0.5):
    """accuracies {(learning rate, seed): (validation, test)}."""
    runs = [
        {"learning_rate": rate, "seed": seed, "validation": {"256": validation}, "test": {"256": test},
         "loss": [1.0], "accuracy": [test]}
        for (rate, seed), (validation, test) in accuracies.items()
    ]  # fmt: skip
    return {"task": task, "model": model, "d_model": width, "n_layers": 1, "chance": chance, "parameters": 1234,
            "state_bytes": 5600, "seconds": 1.0, "steps_per_second": 1.0, "steps": [1], "runs": runs}  # fmt: skip


@pytest.fixture
def groups():
    narrow = {(1e-3, 0): (0.9, 0.6), (1e-3, 1): (0.8, 0.7), (1e-3, 2): (0.1, 0.5), (1e-2, 0): (0.5, 1.0)}
    wide = {(1e-3, 0): (0.7, 0.75), (1e-3, 1): (0.7, 0.9), (1e-3, 2): (0.7, 0.8)}
    return [
        group("parity", "mamba3_siso", 32, narrow),
        group("parity", "mamba2", 32, {(1e-3, 0): (0.5, 0.45)}),
        group("parity", "mamba3_siso", 64, wide),
        group("modular_arithmetic", "mamba2", 32, {(1e-3, 0): (0.2, 0.6)}, chance=0.2),
    ]


def test_setting_is_chosen_by_median_validation_accuracy(groups):
    choice = by_task(groups)["parity"][0]
    assert (choice.model, choice.group["d_model"], choice.learning_rate) == ("mamba3_siso", 32, 1e-3)
    assert choice.accuracies("256") == [0.6, 0.7, 0.5]
    assert (choice.best, choice.n_runs) == ({"256": 1.0}, 7)
    groups[0]["runs"][1]["validation"]["256"] = 0.6  # the median is now under that of the wide one
    choice = by_task(groups)["parity"][0]
    assert choice.group["d_model"] == 64 and choice.accuracies("256") == [0.75, 0.9, 0.8]


def test_tables(groups):
    text = tables(groups)
    assert "## parity, 1 layer, chance 50 %" in text and "## modular_arithmetic, 1 layer, chance 20 %" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    scaled, raw = (row for row in rows if row[0] == "mamba3_siso")
    assert scaled == ["mamba3_siso", "1,234", "5.6", "32", "0.001", "1", "3", "7", "20.00 (100.00)"]
    assert raw[-1] == "60.00 (100.00)"
    parity, _, arithmetic, _ = (row[-1] for row in rows if row[0] == "mamba2")
    assert (parity, arithmetic) == ("-10.00 (-10.00)", "50.00 (50.00)")


def test_initial_steps_are_chosen_like_a_width(groups):
    groups[0]["initial_steps"], groups[2]["initial_steps"] = [0.1, 1.0], [0.001, 0.1]
    groups[1]["initial_steps"] = None  # of a model that has no steps
    rows = [line.split("|")[5].strip() for line in tables(groups[:3]).splitlines() if line.startswith("|")]
    assert rows == ["initial steps", "---", "0.1 to 1.0", "none"] * 2
