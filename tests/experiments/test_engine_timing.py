"""The timing of whole models, with tiny ones: rows as they are measured, cells without memory, parts multiplied."""

import json

import jax
import pytest

from experiments.latency import engine


def test_quick_run(tmp_path, monkeypatch):
    out, measure = tmp_path / "out.json", engine.Cell.measure

    def refuse_large(cell):
        if cell.batch == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return measure(cell)

    monkeypatch.setattr(engine.Cell, "measure", refuse_large)
    flags = ["--models", "hybrid", "--state-dtypes", "bfloat16", "--batches", "4", "2", "--lengths", "32"]
    engine.main(["--quick", "--json", str(out), *flags])
    report = json.loads(out.read_text())
    failed, row = report["rows"]
    assert failed["failed"] == "out of memory"
    assert 0 < report["errors"]["hybrid state bfloat16"] < 0.1
    assert row["prefill_rows"] == 1 and row["extrapolated_from"]["steps"] <= 8
    both = row["prefill_s"]["median"] + 32 * row["step_ms"]["median"] / 1e3
    assert row["prefill_and_decode_s"] == pytest.approx(both)
    assert out.with_suffix(".png").stat().st_size > 1000


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
