"""Measures plans of the Triton scan on this device and rewrites its table, kernels/mamba3/triton/plans.json.

PYTHONPATH=. python experiments/latency/tune.py [--ranks 1 4] [--shapes "B8 L2048"]

For each shape of scan.py, the rules' plan comes first. A round times every plan that differs from the fastest so far in
one field, then the one that takes the best value of each field; the last round is one that gains nothing. The table is
rewritten after every round. A time is that of forward and backward, as in scan.py.

Processes lower the plans of a round, for Triton holds Python's lock while it compiles; threads let XLA compile them;
then one after another is run and timed, and nothing else runs. What a program computes is compared with the first
plan's results at the shape that is timed; the first plan, and those that enter the table, pass scan.py's check besides.
A plan that does not compile, launch or pass is left out, with the reason.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from experiments.latency.arguments import parse_on_gpu
from experiments.latency.scan import (
    CHECKED_LENGTHS,
    SHAPES,
    TOLERANCE,
    check,
    forward_and_backward,
    make_inputs,
    repeated,
    time_repeats,
)
from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Sequence
from m3jax.kernels.mamba3.triton import plans
from m3jax.kernels.mamba3.triton.op import Plan
from m3jax.kernels.triton_launch import TARGET

_CHOICES = {
    "key_warps": (4, 8),
    "value_warps": (4, 8),
    "stages": (1, 2, 3),
    "key_heads": (4, 8, 16),
    "segments": (1, 2, 4, 8, 16),
    "positions": (8, 16, 32, 64),
    "warps": (4, 8),
}
_ROWS = (16, 128)  # of a chunk, positions · rank: what the kernels can take
_REPEATS, _CALLS = 5, 10
_LEAST_GAIN = 0.005  # relative; less is not worth another round
_LEFT_OUT = (AssertionError, ValueError, RuntimeError)
_SCAN = functools.partial(mamba3_scan, implementation="triton")


def timed_inputs(shape: str, rank: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Arguments of the scan, and a cotangent of y."""
    args = make_inputs(*SHAPES[shape], rank)
    return args, jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)


def lower(plan: Plan, shape: str, rank: int) -> jax.export.Exported:
    """The program that is timed, its kernels compiled by Triton; in a process of its own."""
    loop = jax.jit(repeated(forward_and_backward(_SCAN), _CALLS))
    kernels = jax.export.DisabledSafetyCheck.custom_call(TARGET)
    try:
        with plans.forced(plan):
            shapes = jax.eval_shape(lambda: timed_inputs(shape, rank))
            exported = jax.export.export(loop, platforms=["cuda"], disabled_checks=[kernels])(*shapes)
    except Exception as error:  # Triton's own cannot be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return dataclasses.replace(exported, _get_vjp=None)  # nor can a closure


def compile_lowered(lowered: jax.export.Exported, args: tuple) -> jax.stages.Compiled:
    """What XLA makes of it; it does so in several threads at once."""
    return jax.jit(lowered.call).lower(*args).compile()


def changes(plan: Plan, rank: int) -> dict[str, list[Plan]]:
    """By field, the plans that differ in it alone."""
    found = {
        name: [plan._replace(**{name: value}) for value in values if value != getattr(plan, name)]
        for name, values in _CHOICES.items()
    }
    found["positions"] = [one for one in found["positions"] if _ROWS[0] <= one.positions * rank <= _ROWS[1]]
    return found


class Bench:
    """One shape and rank: the milliseconds of every plan that was measured, infinite for those left out."""

    def __init__(self, processes: Executor, shape: str, rank: int, first: Plan):
        self._processes, self._shape, self._rank = processes, shape, rank
        self._args = timed_inputs(shape, rank)
        self._checked: set[Plan] = set()
        self.ms: dict[Plan, float] = {}
        lowered = self._lower(first)
        self._check(first)
        program = compile_lowered(lowered.result(), self._args)
        self._expected = program(*self._args)
        self.ms[first] = self._time(program)

    def measure(self, candidates: list[Plan]) -> None:
        """Compiles all those that are new, then runs and times one after another, equal programs once."""
        lowered = {plan: self._lower(plan) for plan in candidates if plan not in self.ms}
        programs: dict[bytes, Future] = {}
        times: dict[bytes, float] = {}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for future in lowered.values():
                if future.exception() is None and (text := future.result().mlir_module_serialized) not in programs:
                    programs[text] = threads.submit(compile_lowered, future.result(), self._args)
        for plan, future in lowered.items():
            try:
                text = future.result().mlir_module_serialized
                if text not in times:
                    times[text] = self._time(programs[text].result())
                self.ms[plan] = times[text]
                print(f"  {self.ms[plan]:.3f} ms {plan}", flush=True)
            except _LEFT_OUT as error:
                self._leave_out(plan, error)

    def fastest(self) -> Plan:
        """Of those measured and right, by scan.py's check."""
        while True:
            plan = min(self.ms, key=self.ms.get)
            try:
                self._check(plan)
                return plan
            except _LEFT_OUT as error:
                self._leave_out(plan, error)

    def _lower(self, plan: Plan) -> Future:
        return self._processes.submit(lower, plan, self._shape, self._rank)

    def _check(self, plan: Plan) -> None:
        if plan not in self._checked:
            with plans.forced(plan):
                check(_SCAN, self._rank, CHECKED_LENGTHS[0], heads=max(_CHOICES["key_heads"]))
            self._checked.add(plan)

    def _time(self, program: jax.stages.Compiled) -> float:
        differences = relative_rms(program(*self._args), self._expected)
        # Each is within the tolerance of the exact result.
        wrong = {name: float(value) for name, value in differences.items() if not value <= 2 * TOLERANCE}
        if wrong:
            raise AssertionError(f"differs from the first plan's results: {wrong}")
        return time_repeats(program, self._args, _REPEATS, _CALLS)["ms"]

    def _leave_out(self, plan: Plan, error: Exception) -> None:
        self.ms[plan] = math.inf
        print(f"  left out: {plan}: {error!r:.200}", flush=True)


@jax.jit
def relative_rms(actual: tuple, expected: tuple) -> dict[str, jax.Array]:
    """By name, of y and the gradients; in float32."""
    (y, gradients), (y_expected, gradients_expected) = actual, expected
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), ({"y": y_expected} | gradients_expected, {"y": y} | gradients))
    return jax.tree.map(lambda e, a: jnp.sqrt(jnp.mean((a - e) ** 2) / jnp.mean(e**2)), *wide)


def tune(bench: Bench, plan: Plan, rank: int) -> Iterator[Plan]:
    """Ever faster plans, the first of them given; one a round."""
    while True:
        yield plan
        around = changes(plan, rank)
        bench.measure([one for of_field in around.values() for one in of_field])
        best = {name: min([plan, *of_field], key=bench.ms.get) for name, of_field in around.items()}
        bench.measure([plan._replace(**{name: getattr(one, name) for name, one in best.items()})])
        before, plan = plan, bench.fastest()
        if bench.ms[plan] > (1 - _LEAST_GAIN) * bench.ms[before]:
            return


def _start_worker() -> None:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the GPU's memory is for the process that times


def main() -> None:
    """Tunes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parse_on_gpu(parser)
    table = json.loads(plans.TABLE.read_text())
    own = table.setdefault(jax.local_devices()[0].device_kind, {})
    began = time.perf_counter()
    workers = min(os.cpu_count(), 16)  # a dozen plans are new in a round
    # Not forked: neither JAX nor CUDA would survive that.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as processes:
        for _ in range(workers):  # they start while the first plan is checked
            processes.submit(jax.default_backend)
        for rank in options.ranks:
            for shape in options.shapes:
                args = jax.eval_shape(lambda shape=shape, rank=rank: timed_inputs(shape, rank)[0])
                seq = Sequence(**{name: args.get(name) for name in Sequence._fields})
                first = plans.rules(seq)
                bench = Bench(processes, shape, rank, first)
                for plan in tune(bench, first, rank):
                    seconds = time.perf_counter() - began
                    print(f"{seconds:4.0f} s: rank {rank} {shape} {bench.ms[plan]:.3f} ms {plan}", flush=True)
                    fields = {name: value for name, value in plan._asdict().items() if name != "row_output"}
                    own[plans.bucket(seq)] = {"plan": fields, "ms": round(bench.ms[plan], 3)}
                    plans.TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
