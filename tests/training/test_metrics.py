"""The metrics writer: no step twice, the optional writers, the picture."""

import importlib.util
import json
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from m3jax.errors import ConfigError
from m3jax.training.loss_curve import plot_loss_curve
from m3jax.training.metrics import MetricsWriter, check_writers, read_metrics


def write_run(workdir, config, steps, start=0):
    writer = MetricsWriter(workdir, config, start)
    for step in steps:
        writer.write(step, {"loss": 10.0 / step})
    writer.close()


def test_lines_are_json_with_their_step(small_config, tmp_path):
    write_run(tmp_path, small_config(), [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 10.0}, {"step": 2, "loss": 5.0}]


def test_resume_drops_what_will_be_written_again(small_config, tmp_path):
    write_run(tmp_path, small_config(), [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_run(tmp_path, small_config(), [3, 4], start=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_rewind_in_the_middle_of_a_run(small_config, tmp_path):
    writer = MetricsWriter(tmp_path, small_config(), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.rewind(1)
    writer.write(2, {"loss": 0.5})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 0.5)]


def tensorboard_scalars(workdir):
    """Reads the event files' records: length, its checksum, the event, its checksum."""
    scalars = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return scalars


def test_tensorboard_gets_the_same_numbers(small_config, tmp_path):
    write_run(tmp_path, small_config({"train.tensorboard": True}), [1, 2])
    assert tensorboard_scalars(tmp_path) == [("loss", 1, 10.0), ("loss", 2, 5.0)]


def test_wandb_gets_the_same_numbers_under_one_id(small_config, tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda record, step: calls.append((step, record)), finish=lambda: calls.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append((options["project"], options["id"], options["resume"])) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = small_config({"train.wandb_project": "scans"})
    write_run(tmp_path, config, [1])
    write_run(tmp_path, config, [2], start=1)
    identifier = (tmp_path / "wandb_run_id").read_text()
    start = ("scans", identifier, "allow")
    assert calls == [start, (1, {"loss": 10.0}), "finish", start, (2, {"loss": 5.0}), "finish"]


def test_wandb_that_is_not_installed_is_named_with_its_extra(small_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_project = 'scans': wandb is not installed.*'\.\[wandb\]'"):
        check_writers(small_config({"train.wandb_project": "scans"}))
    check_writers(small_config())


def test_loss_curve_is_a_picture(small_config, tmp_path):
    writer = MetricsWriter(tmp_path, small_config(), 0)
    writer.close()
    assert plot_loss_curve(tmp_path) is None
    writer = MetricsWriter(tmp_path, small_config(), 0)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"skipped": 1})
    writer.write(2, {"validation_loss": 2.0})
    writer.close()
    assert plot_loss_curve(tmp_path).read_bytes().startswith(b"\x89PNG")
