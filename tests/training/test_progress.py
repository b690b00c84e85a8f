"""What a run shows, in a log and on a terminal."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from m3jax.training import progress
from m3jax.training.progress import Progress, format_line, format_seconds, parameter_table
from m3jax.training.throughput import Throughput, peak_memory_bytes


def test_line_of_numbers():
    numbers = {"loss": 2.34567, "tokens_per_second": 15234.0, "mfu": 0.312}
    expected = "step 120/2000  loss 2.3457  15.2k tokens/s  MFU 31.2%  memory 3.50 GiB  1:02:03 left"
    assert format_line(120, 2000, numbers, int(3.5 * 2**30), 3723.4) == expected
    assert format_line(1, 2, {"loss": 1.0}, 2**30, None) == "step 1/2  loss 1.0000  memory 1.00 GiB"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (600, "10:00"), (86400, "24:00:00")])
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_parameter_table_lists_every_array_and_the_total():
    params = {"embedding": jnp.zeros((8, 4)), "layers": {"kernel": jax.ShapeDtypeStruct((2, 4, 4), jnp.bfloat16)}}
    lines = [line.split() for line in parameter_table(params).splitlines()]
    assert lines[0] == ["parameter", "shape", "type", "size"]
    assert lines[1:] == [
        ["embedding", "(8,", "4)", "float32", "32"],
        ["layers/kernel", "(2,", "4,", "4)", "bfloat16", "32"],
        ["total", "64"],
    ]


def show_three_steps(monkeypatch, terminal):
    file = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **options: Console(file=file, force_terminal=terminal, width=100, **options)
    )
    with Progress(last_step=3) as shown:
        for step in (1, 2, 3):
            shown.step(step, {"loss": float(step)}, 2**30, None, logged=step == 2)
        shown.message("saved [brackets] stay")
    return file.getvalue()


def test_log_has_the_logged_steps_only(monkeypatch):
    output = show_three_steps(monkeypatch, terminal=False)
    assert output == "step 2/3  loss 2.0000  memory 1.00 GiB\nsaved [brackets] stay\n"


def test_terminal_renews_one_line(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    output = show_three_steps(monkeypatch, terminal=True)
    for step in (1, 2, 3):
        assert f"step {step}/3  loss {step}.0000" in output
    assert "\x1b[2K" in output  # the line before is erased
    assert "saved [brackets] stay" in output


def test_throughput(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("m3jax.training.throughput.time.perf_counter", lambda: now[0])
    throughput = Throughput(tokens_per_step=1000, flops_per_token=6e6, peak_flops=1e12)
    assert throughput.report() == {} and throughput.seconds_per_step() is None
    now[0] += 4
    throughput.count_step()
    throughput.count_step()
    assert throughput.seconds_per_step() == 2
    assert throughput.report() == {"tokens_per_second": 500, "mfu": pytest.approx(500 * 6e6 / 1e12)}
    throughput.restart()
    assert throughput.report() == {}
    unknown_device = Throughput(1000, 6e6, None)
    now[0] += 1
    unknown_device.count_step()
    assert unknown_device.report() == {"tokens_per_second": 1000}


def test_memory_of_this_process():
    assert 50e6 < peak_memory_bytes() < 1e12
