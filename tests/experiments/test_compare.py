"""The comparison of architectures, with models that compile at once, trained in this process."""

import json
from types import SimpleNamespace

import pytest

from experiments.scaling import compare
from m3jax import train
from m3jax.errors import ConfigError, TrainingError
from tests.training.conftest import quick_compilation, use_small_model  # noqa: F401

SMALL = [
    "--config.model.d_model=32", "--config.model.n_layers=2", "--config.model.dtype=float32",
    "--config.data.batch_size=8", "--config.data.sequence_length=32", "--config.train.eval_batches=2",
    "--config.mesh.data=1",
]  # fmt: skip
TOKENS = 6 * 8 * 32


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on a small text; returns the report. `run.started` are the folders in which training began."""
    use_small_model(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes jack a dull boy\n" * 400)

    def start(command):
        folder = command[command.index("--workdir") + 1]
        run.started.append(folder.rsplit("/", 1)[-1])
        if run.started[-1] in run.broken:
            return SimpleNamespace(returncode=2)
        train.main(command[3:])
        return SimpleNamespace(returncode=0)

    def run(*flags, models=("mamba3_siso", "mamba3_mimo")):
        run.started = []
        compare.main([
            "--workdir", str(tmp_path / "runs"), "--models", *models, *SMALL, f"--tokens={TOKENS}",
            f"--config.data.source={text}", f"--config.data.cache_dir={tmp_path / 'cache'}", *flags,
        ])  # fmt: skip
        return json.loads((tmp_path / "runs" / "comparison.json").read_text())

    run.broken = ()
    monkeypatch.setattr(compare.subprocess, "run", start)
    return run


@pytest.mark.usefixtures("quick_compilation")
def test_trains_resumes_and_reports(run, tmp_path, capsys):
    run.broken = ("mamba3_mimo-seed0",)
    with pytest.raises(TrainingError, match="mamba3_mimo-seed0 failed"):
        run()
    folder = tmp_path / "runs"
    assert [r["name"] for r in json.loads((folder / "comparison.json").read_text())["runs"]] == ["mamba3_siso"]

    run.broken = ()
    report = run()
    assert run.started == ["mamba3_mimo-seed0"]
    siso, mimo = report["runs"]
    assert siso["tokens"] == mimo["tokens"] == TOKENS
    assert [tokens for tokens, _ in siso["curve"]] == [256 * step for step in range(1, 7)]
    assert siso["loss"] == siso["curve"][-1][1] and siso["best_loss"] == min(loss for _, loss in siso["curve"])
    assert siso["loss"] < siso["curve"][0][1]
    assert siso["parameters"] != mimo["parameters"]
    assert siso["tokens_per_second"] > 0 and siso["peak_memory_GB"] > 0 and siso["wall_s"] > 0
    assert (folder / "comparison.png").stat().st_size > 10_000
    written = (folder / "comparison.md").read_text()
    assert f"{siso['parameters']:,}" in written and f"{mimo['bits_per_byte']:.4f}" in written
    assert written in capsys.readouterr().out

    assert run()["runs"] == report["runs"] and run.started == []
    with pytest.raises(ConfigError, match=r"config.optimizer.learning_rate = 0\.1: .*mamba3_siso-seed0 has 0\.001"):
        run("--config.optimizer.learning_rate=0.1")


def test_a_stopped_run_ends_the_comparison(run, monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv: None)  # as on a signal: no error, and not at its end
    with pytest.raises(TrainingError, match=r"mamba3_siso-seed0 was stopped\. Run the same command again"):
        run()
    assert run.started == ["mamba3_siso-seed0"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--tokens=255"], "--tokens 255: expected at least the 256 of one step"),
    (["--size=181m"], "No config file .*181m_siso.py. Did you mean .*180m_siso.py"),
    (["--config.model.d_model=31"], "config.model.headdim"),
])  # fmt: skip
def test_bad_input_is_found_first(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(*flags)
    assert run.started == []


def test_seeds_share_a_row():
    runs = [
        {"name": "a", "parameters": 10, "loss": loss} | dict.fromkeys(compare._COLUMNS.keys() - {"parameters", "loss"})
        for loss in (1.0, 2.0)
    ]
    table = compare.table({"runs": runs, "device": "d", "date": "t", "jax": "0", "command": "c"})
    assert "| a | 10 | - | 1.5000 (1.0000 to 2.0000) | -" in table
