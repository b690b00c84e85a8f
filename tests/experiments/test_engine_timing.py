"""The timing of whole models, with tiny ones: rows as they are measured, cells without memory, merging."""

import argparse
import json

import jax
import numpy as np
import pytest

from experiments.latency import engine, engine_report
from m3jax.errors import ConfigError


def test_quick_run(tmp_path, capsys):
    """A cell that finds no memory (real: 2**51 bytes of keys), then one that does; nothing of the first is kept."""
    out = tmp_path / "out.json"
    before = {id(array) for array in jax.live_arrays()}
    flags = ["--models", "hybrid", "--state-dtypes", "bfloat16", "--batches", "2", "--lengths", str(2**45), "32"]
    engine.main(["--quick", "--json", str(out), *flags])
    assert {id(array) for array in jax.live_arrays()} <= before
    report = json.loads(out.read_text())
    failed, row = report["rows"]
    assert failed["failed"] == "out of memory"
    assert 0 < report["errors"]["hybrid state bfloat16"] < 0.1
    assert row["prefill_rows"] == 1 and row["extrapolated_from"]["steps"] <= 8
    both = row["prefill_s"]["median"] + 32 * row["step_ms"]["median"] / 1e3
    assert row["prefill_and_decode_s"] == pytest.approx(both)
    assert engine_report.table(report) in capsys.readouterr().out
    for image in ("out.png", "out_roofline.png"):
        assert (tmp_path / image).stat().st_size > 1000


def test_steps_are_timed_half_way_through_the_decoding():
    """A step of attention reads what is filled: all rows, though few of their prompts may have been timed."""
    model = engine.make_model("hybrid", "bfloat16", quick=True)
    options = argparse.Namespace(prefill_tokens=32, steps=8, seconds=0.01)
    cell = engine.Cell(model, engine.make_params(model), 2, 32, options)
    timed = cell.measure()["extrapolated_from"]["steps"]
    (cache,) = [state for state in cell.rows.state if isinstance(state, engine.AttentionState)]
    np.testing.assert_array_equal(cache.length, [(3 * 32 - timed) // 2 + timed] * 2)


def test_cells_without_room_are_not_tried(monkeypatch):
    """By shapes: of 64 GB, 2.5 weights, 137.4 the cache and 1.1 that of a prefill's two rows; then after a leak."""
    model = engine.make_model("transformer", "bfloat16", quick=False)
    params = jax.eval_shape(lambda: engine.make_params(model))
    options = argparse.Namespace(prefill_tokens=32768)
    weights = engine.tree_bytes(params)
    monkeypatch.setattr(engine, "memory", lambda: {"bytes_limit": 64 * 10**9, "bytes_in_use": weights})
    row = engine.measure_cell(model, params, 128, 16384, options, {})
    assert row == {"failed": "needs 141.0 GB, the device has 64.0"}
    engine.check_room(params, lambda: model.initial_state(128, 4096))
    monkeypatch.setattr(engine, "memory", lambda: {"bytes_limit": 64 * 10**9, "bytes_in_use": weights + 60 * 10**9})
    with pytest.raises(engine.NoRoomError, match=r"needs 19.7 GB, the device has 64.0, of which 60.0 are taken"):
        engine.check_room(params, lambda: model.initial_state(128, 4096))


def report_of(date, commit="abc", device="D", **cells):
    """A report of cells `model_n` of so many seconds."""
    rows = []
    for cell, seconds in cells.items():
        model, length = cell.split("_")
        timed = {"prefill_s": {"median": seconds}, "step_ms": {"median": 2.0}, "floor": {"prefill_s": 1, "step_ms": 1}}
        label = {"model": model, "state_dtype": "bfloat16", "batch": 128, "length": int(length)}
        rows.append(label | timed | {"prefill_and_decode_s": seconds} | engine.paper_figures(model, 128, int(length)))
    head = {"date": date, "commit": commit, "device": device, "quick": False}
    return head | {"ceilings": {"copy_TB_per_s": len(rows)}, "errors": {}, "rows": rows}


def test_merge(tmp_path, capsys):
    """Newer rows win whatever the order of the files; another device is refused; a merged file merges again."""
    old, new = report_of("2026-01", siso_512=3.0, mimo_512=4.0), report_of("2026-02", mimo_512=5.0, mimo_1024=6.0)
    paths = [tmp_path / "new.json", tmp_path / "old.json"]
    for path, report in zip(paths, (new, old), strict=True):
        path.write_text(json.dumps(report))
    out, images = tmp_path / "engine.json", tmp_path / "images"
    images.mkdir()
    engine.main(["--json", str(out), "--images", str(images), "--merge", *map(str, paths)])
    merged = json.loads(out.read_text())
    assert [(r["model"], r["length"], r["prefill_and_decode_s"]) for r in merged["rows"]] == [
        ("siso", 512, 3.0), ("mimo", 512, 5.0), ("mimo", 1024, 6.0)
    ]  # fmt: skip
    assert [run["date"] for run in merged["runs"]] == ["2026-01", "2026-02"]
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert printed[-1] == ["mimo", "bfloat16", "128", "1024", "6.000 (6.00)", "2.000 (2.00)", "6.000", "1.21", "9.48"]
    assert {path.name for path in images.iterdir()} == {"engine.png", "engine_roofline.png"}
    again = engine_report.merge([merged, report_of("2026-03", commit="def", siso_512=1.0)])
    assert len(again["runs"]) == 3 and len(again["rows"]) == 3 and again["rows"][0]["prefill_and_decode_s"] == 1.0
    assert [row["commit"] for row in again["rows"]] == ["def", "abc", "abc"]
    assert [run["commit"] for run in again["runs"]] == ["abc", "abc", "def"]
    with pytest.raises(ConfigError, match="device is D and E"):
        engine_report.merge([old, report_of("2026-04", device="E")])
    for other in ("no JSON", "[]", "{}"):
        paths[0].write_text(other)
        with pytest.raises(ConfigError, match=r"--merge .*new\.json: expected a report that engine\.py wrote"):
            engine.main(["--json", str(out), "--merge", *map(str, paths)])


def test_documented_table_is_the_measured_one():
    root = engine.CONFIGS.parent
    report = json.loads((root / "docs" / "measurements" / "engine.json").read_text())
    assert engine_report.table(report) in (root / "docs" / "generation.md").read_text()


def test_wrong_steps_are_found(monkeypatch):
    model = engine.make_model("siso", "float32", quick=True)
    params = engine.make_params(model)
    monkeypatch.setattr(
        type(model), "step", lambda self, token, state: (self.logits(self.norm(self._embed(token))), state)
    )
    with pytest.raises(AssertionError, match="logits of steps are off"):
        engine.check(model, params)


def test_models_are_the_papers():
    """Sizes by shape alone: Llama 3.2 1B has 1,235,814,400 parameters."""
    model = engine.make_model("transformer", "float32", quick=False)
    shapes = jax.eval_shape(lambda: engine.make_params(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_235_814_400
    assert engine.paper_figures("mimo", 128, 4096)["paper"] == {"prefill_s": 4.76, "prefill_and_decode_s": 37.85}
    assert engine.paper_figures("hybrid", 128, 4096) == engine.paper_figures("mimo", 32, 4096) == {}
