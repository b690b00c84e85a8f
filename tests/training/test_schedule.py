"""Learning rates at the steps that define each schedule."""

import dataclasses

import pytest

from m3jax.config import OptimizerConfig
from m3jax.training.schedule import make_schedule

PEAK, FINAL, WARMUP, STEPS = 1e-2, 1e-4, 10, 110
CONFIG = OptimizerConfig(
    learning_rate=PEAK, final_learning_rate=FINAL, warmup_fraction=WARMUP / STEPS, decay_fraction=0.2
)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("cosine", {1: PEAK / 10, 5: PEAK / 2, 10: PEAK, 60: (PEAK + FINAL) / 2, 110: FINAL}),
        ("wsd", {1: PEAK / 10, 10: PEAK, 50: PEAK, 88: PEAK, 99: (PEAK + FINAL) / 2, 110: FINAL}),
        ("constant", {1: PEAK / 10, 10: PEAK, 110: PEAK}),
    ],
)
def test_values_at_named_steps(name, points):
    schedule = make_schedule(dataclasses.replace(CONFIG, schedule=name), STEPS)
    for step, expected in points.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6), f"step {step}"


def test_no_warmup_starts_at_the_peak():
    schedule = make_schedule(dataclasses.replace(CONFIG, warmup_fraction=0.0, schedule="constant"), STEPS)
    assert float(schedule(1)) == pytest.approx(PEAK)


def test_warmup_over_the_whole_run_ends_at_the_peak():
    schedule = make_schedule(dataclasses.replace(CONFIG, warmup_fraction=1.0), STEPS)
    assert float(schedule(STEPS)) == pytest.approx(PEAK)
