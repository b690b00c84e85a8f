"""The search for plans of the Triton scan, with stand-ins for what needs a GPU: programs, checks and times."""

import contextlib
import json
import math
from concurrent.futures import Executor, Future
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from experiments.latency import arguments, tune
from m3jax.kernels.mamba3.triton import plans
from m3jax.kernels.mamba3.triton.op import Plan

FIRST = Plan(positions=64, segments=1, warps=4, stages=2, value_warps=4, key_heads=8, key_warps=4)


class Formula:
    """In place of a Bench: a plan's milliseconds are computed, and none is asked for twice."""

    def __init__(self, of_plan):
        self._of_plan, self.ms = of_plan, {FIRST: of_plan(FIRST)}

    def measure(self, candidates):
        self.ms |= {plan: self._of_plan(plan) for plan in candidates}

    def fastest(self):
        return min(self.ms, key=self.ms.get)


def distance(plan: Plan, best: Plan) -> float:
    return 1 + sum(abs(math.log2(a) - math.log2(b)) for a, b in zip(plan[:7], best[:7], strict=True))


def test_fields_that_do_not_depend_on_each_other_take_one_round():
    best = Plan(positions=16, segments=8, warps=8, stages=1, value_warps=8, key_heads=16, key_warps=8)
    bench = Formula(lambda plan: distance(plan, best))
    assert list(tune.tune(bench, FIRST, 1)) == [FIRST, best]
    assert len(bench.ms) <= 2 * 14 + 1


def test_a_field_whose_best_value_depends_on_another():
    """Many segments pay off with short chunks only; both together are slower than either, then too many."""

    def ms(plan):
        if plan.positions == 16:
            return 3.0 - 0.1 * plan.segments
        return 4.0 if plan.segments == 1 else math.inf

    *_, found = tune.tune(Formula(ms), FIRST, 1)
    assert found == FIRST._replace(positions=16, segments=16)


def test_noise_is_no_gain():
    bench = Formula(lambda plan: 1.0 - 1e-3 * (plan != FIRST))
    assert list(tune.tune(bench, FIRST, 1)) == [FIRST]


@pytest.mark.parametrize("rank", [1, 4])
def test_changes_are_of_one_field_and_can_be_taken(rank):
    first = FIRST._replace(positions=64 // rank)
    for name, changed in tune.changes(first, rank).items():
        assert changed
        for plan in changed:
            assert {field for field in Plan._fields if getattr(plan, field) != getattr(first, field)} == {name}
            assert 16 <= plan.positions * rank <= 128


class AtOnce(Executor):
    """In place of processes."""

    def __init__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def timed(monkeypatch):
    """What is timed, by the number that a program gives; programs, checks and times are stand-ins."""
    forced, timed = [], []

    def lower(plan, shape, rank):
        if plan.warps == 8:
            raise RuntimeError("does not compile\nfor a long reason")
        # One with too many segments is wrong; the number of stages is no part of the program.
        value = jnp.nan if plan.segments == 4 else plan.key_heads + plan.key_warps / 100
        return SimpleNamespace(
            mlir_module_serialized=str(plan._replace(stages=0)).encode(),
            call=lambda args, cotangent: (args["x"], {"x": cotangent + 1e-3 * value}),
        )

    def check(scan, rank, length, heads):
        if forced[-1].value_warps == 8:
            raise AssertionError("off")

    @contextlib.contextmanager
    def force(plan):
        forced.append(plan)
        yield

    def time_repeats(program, args, repeats, calls):
        number = float(program(*args)[1]["x"][0] - 1) * 1e3
        timed.append(round(number, 2))
        return {"ms": 20 - number}

    monkeypatch.setattr(tune, "timed_inputs", lambda shape, rank: ({"x": jnp.ones(3)}, jnp.ones(3)))
    for name, stand_in in (("lower", lower), ("check", check), ("time_repeats", time_repeats)):
        monkeypatch.setattr(tune, name, stand_in)
    monkeypatch.setattr(tune.plans, "forced", force)
    return timed


def test_measure(timed, capsys):
    bench = tune.Bench(AtOnce(), "B1 L2048", 1, FIRST)
    same, faster = (FIRST._replace(stages=1), FIRST._replace(stages=3)), FIRST._replace(key_heads=16)
    broken, wrong = FIRST._replace(warps=8), FIRST._replace(segments=4)
    bench.measure([*same, broken, wrong, faster])
    assert timed == [8.04, 8.04, 16.04]  # equal programs once, wrong and broken ones never
    assert bench.ms[same[0]] == bench.ms[same[1]] and bench.ms[broken] == bench.ms[wrong] == math.inf
    assert bench.fastest() == faster
    wrong_when_checked = faster._replace(value_warps=8, key_warps=8)
    bench.measure([faster, wrong_when_checked])
    assert len(timed) == 4 and bench.ms[wrong_when_checked] < bench.ms[faster]
    assert bench.fastest() == faster
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in ("does not compile", "first plan's results: {'x': nan}", "('off')"))


def test_the_table_is_rewritten(timed, monkeypatch, tmp_path, capsys):
    table = tmp_path / "plans.json"
    table.write_text('{"other": {"bucket": {"plan": {}, "ms": 1.0}}}')
    monkeypatch.setattr(plans, "TABLE", table)
    monkeypatch.setattr(plans, "rules", lambda seq: FIRST)
    monkeypatch.setattr(plans, "bucket", lambda seq: f"a shape of {seq.x.shape}")
    monkeypatch.setattr(tune, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr("sys.argv", ["tune.py", "--ranks", "1", "--shapes", "B1 L2048"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "error: the default device is a cpu; the kernels need an NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(arguments, "no_triton_here", lambda: None)
    tune.main()
    written = json.loads(table.read_text())
    assert written.keys() == {"other", "cpu"} and written["other"] == {"bucket": {"plan": {}, "ms": 1.0}}
    entry = written["cpu"]["a shape of (3,)"]
    found = FIRST._replace(key_heads=16, key_warps=8)._asdict()
    assert entry == {
        "plan": {name: found[name] for name in Plan._fields[:7]},
        "ms": pytest.approx(20 - 16.08, abs=1e-3),
    }
