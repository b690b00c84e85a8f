"""Real processes: stopped, killed and continued, they end with the same bits as one that ran through."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpointer
from m3jax.training.manifest import finished_steps
from m3jax.training.metrics import read_metrics
from m3jax.training.sharding import make_mesh, state_shardings, with_shardings
from m3jax.training.step import init_state
from tests.tolerances import assert_close, rounding
from tests.training.conftest import SmallModel, config_file
from tests.training.test_step import assert_same

ROOT = Path(__file__).parents[2]
CHANGES = {"train.steps": 40, "checkpoint.every": 2, "checkpoint.keep": 2, "train.ema_decay": 0.9}


@pytest.fixture(scope="module")
def start(small_config, tmp_path_factory):
    """Returns a function that starts a training process in a workdir."""
    base = tmp_path_factory.getbasetemp()
    file = config_file(base / "small.py", small_config(CHANGES))
    environment = dict(os.environ)
    environment.pop("XLA_FLAGS", None)  # one device, as a user has
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(base / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def start(workdir, *flags, module="m3jax.train"):
        command = [sys.executable, "-m", module, "--config", file, "--workdir", workdir, *flags]
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def finish(process):
    """Waits for a process that must succeed without a word on stderr; returns its output."""
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return output


def wait_for_line(process, pattern):
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no line {pattern!r}: {process.stderr.read()}")


def assert_same_run(workdir, expected, config, model):
    """Compares parameters, optimizer, average, position in the data and logged losses."""
    shapes = jax.eval_shape(lambda: init_state(config, model))
    abstract = with_shardings(shapes, state_shardings(shapes, make_mesh(config)))
    a, b = (Checkpointer(path, config.checkpoint) for path in (workdir, expected))
    last = config.train.steps
    assert a.latest_step() == b.latest_step() == last
    assert_same(a.restore(last, abstract), b.restore(last, abstract))
    assert a.read_run(last).data_states == b.read_run(last).data_states
    logs = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(path / "metrics.jsonl") if "loss" in r]
        for path in (workdir, expected)
    ]
    assert logs[0] == logs[1]
    assert [step for step, *_ in logs[0]] == list(range(1, last + 1))


def test_sigterm_and_continue_equals_straight_through(start, small_config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    few_saves = "--config.checkpoint.every=40"
    finish(start(whole, few_saves))
    process = start(parts)
    wait_for_line(process, r"^step 5/")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopped at step" in finish(process)
    assert 5 <= finished_steps(parts / "checkpoints")[-1] < 40
    assert "resumes from step" in finish(start(parts, few_saves))
    config = small_config(CHANGES)
    assert_same_run(parts, whole, config, LanguageModel(config.model))


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_during_saves_loses_nothing_that_was_finished(start, small_config, tmp_path, kills):
    steps = 12 * kills
    flags = [f"--config.train.steps={steps}", "--config.checkpoint.every=1"]
    few_saves = "--config.checkpoint.every=1000"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *flags, few_saves, module="tests.training.small_train"))
    delays = random.Random(kills)
    for _ in range(kills):
        before = finished_steps(killed / "checkpoints")
        process = start(killed, *flags, module="tests.training.small_train")
        if before:
            assert int(wait_for_line(process, "resumes from step").split()[-1]) == before[-1]
        wait_for_line(process, rf"^step \d+/{steps} ")
        time.sleep(delays.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert finished_steps(killed / "checkpoints")[-1:] >= before[-1:]
    last = start(killed, *flags, few_saves, module="tests.training.small_train")
    finish(last)
    config = small_config(CHANGES | {"train.steps": steps})
    assert_same_run(killed, whole, config, SmallModel(config.model))


def test_two_processes_equal_one(start, small_config, tmp_path):
    flags = ["--config.train.steps=4", "--config.mesh.fsdp=2", "--config.mesh.data=-1"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    pair = [
        start(tmp_path / "two", *flags, "--distributed", coordinator, 2, index, module="tests.training.small_train")
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "2 hosts" in outputs[0] and "mesh      data 1 x fsdp 2" in outputs[0]
    assert "step 4/4" in outputs[0] and "step" not in outputs[1]
    finish(start(tmp_path / "one", *flags[:1], module="tests.training.small_train"))
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [record["step"] for record in two] == [record["step"] for record in one]
    # The rows of a batch are the same, in another order.
    for name in ("loss", "grad_norm", "validation_loss", "validation_tokens"):
        a, b = ([record[name] for record in records if name in record] for records in (two, one))
        assert_close(a, b, 4 * rounding(np.float32, 8 * 32), name)
