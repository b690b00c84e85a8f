"""The search for the largest batch, and the parts of a step by the names that the compiler keeps."""

import argparse
import math

import jax
import pytest

from experiments.latency import train_step
from m3jax.cli import read_config


@pytest.mark.parametrize(
    "size",
    [
        lambda n: 20.0 + n,
        lambda n: 20.0 + 0.2 * n + max(n - 64, 0),  # bends upwards
        lambda n: 20.0 + n + 10 * (n % 16 == 0),  # not monotonic in the small
        lambda n: 20.0 + n**1.5,
        lambda n: math.inf if n > 96 else 50.0 + n // 100,  # flat, then nothing
    ],
    ids=["line", "bend", "bumps", "curve", "cliff"],
)
@pytest.mark.parametrize("limit", [40.0, 150.0, 163.7, 1000.0])
def test_largest_that_fits(size, limit):
    asked = []

    def counted(n):
        asked.append(n)
        return size(n)

    found = train_step.largest_that_fits(counted, limit, 8)
    assert len(asked) == len(set(asked)) <= 16 and max(asked) <= max(8 * found, 16)
    if found:
        assert found % 8 == 0 and size(found) <= limit < size(found + 8)
    else:
        assert size(8) > limit


def test_steps_down_when_the_run_is_refused(monkeypatch):
    class Step:
        def __init__(self, config):
            self.batch_size = config.data.batch_size
            self.n_bytes = 1000 * self.batch_size

    def time_steps(step, options):
        if step.batch_size > 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return {"batch_size": step.batch_size}

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 50_000}

    monkeypatch.setattr(train_step, "Step", Step)
    monkeypatch.setattr(train_step, "time_steps", time_steps)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    options = argparse.Namespace(config="configs/tiny_mimo.py", largest_batch=True, batch_size=None)
    report = train_step.measure(options, {"mesh.data": 1})
    assert report["batch_size"] == 32 and report["refused"] == [48, 40]


def test_parts_of_a_step():
    small = {"model.d_model": 32, "model.headdim": 16, "model.d_state": 16, "model.n_layers": 2, "model.remat": "full"}
    small |= {"data.sequence_length": 32, "data.batch_size": 2, "train.grad_accumulation": 1, "mesh.data": 1}
    step = train_step.Step(read_config("configs/tiny_mimo.py", small))
    assert 0 < step.n_bytes < 1e9
    parts = train_step.part_by_operation(step.compiled.as_text())
    assert set(parts.values()) == train_step._PARTS.keys() - {"unnamed"}
