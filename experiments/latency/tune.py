"""Measures plans of the Triton scan on this device and rewrites its table, kernels/mamba3/triton/plans.json.

python experiments/latency/tune.py [--ranks 1 4] [--shapes "B8 L2048"]

For each shape of scan.py, starting from the rules' plan, one field after another takes the value of the fastest forward
and backward; then the fields are gone through again, until none changes. A plan counts only if its outputs and
gradients are right (scan.py's check); one that does not compile or launch is passed over. Times are those of scan.py.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from experiments.latency.scan import CHECKED_LENGTHS, SHAPES, check, forward_and_backward, make_inputs, milliseconds
from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Sequence
from m3jax.kernels.mamba3.triton import plans
from m3jax.kernels.mamba3.triton.op import Plan

_CHOICES = {
    "key_warps": (4, 8),
    "value_warps": (4, 8),
    "stages": (1, 2, 3),
    "key_heads": (4, 8, 16),
    "segments": (1, 2, 4, 8, 16),
    "positions": (8, 16, 32, 64),
    "warps": (4, 8),
}


def measure(plan: Plan, shape: str, rank: int) -> float:
    """Milliseconds of forward and backward with this plan; infinite if it cannot run or its results are wrong."""
    scan = functools.partial(mamba3_scan, implementation="triton")
    with plans.forced(plan):
        try:
            check(scan, rank, CHECKED_LENGTHS[0])
            args = make_inputs(*SHAPES[shape], rank)
            cotangent = jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)
            return milliseconds(forward_and_backward(scan), args, cotangent)["ms"]
        except (AssertionError, ValueError, RuntimeError) as error:
            print(f"  {plan}: {str(error).splitlines()[0][:100]}", flush=True)
            return float("inf")


def tune(plan: Plan, shape: str, rank: int) -> tuple[Plan, float]:
    """The fastest plan by going through the fields until none changes."""
    time_of = functools.cache(functools.partial(measure, shape=shape, rank=rank))
    best, settled = time_of(plan), False
    while not settled:
        settled = True
        for name, values in _CHOICES.items():
            for value in values:
                candidate = plan._replace(**{name: value})
                if time_of(candidate) < best:
                    plan, best, settled = candidate, time_of(candidate), False
                    print(f"  {name} = {value}: {best:.3f} ms", flush=True)
    return plan, best


def main() -> None:
    """Tunes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    table = json.loads(plans.TABLE.read_text())
    own = table.setdefault(jax.local_devices()[0].device_kind, {})
    for rank in options.ranks:
        for shape in options.shapes:
            args = make_inputs(*SHAPES[shape], rank)
            seq = Sequence(**{name: args.get(name) for name in Sequence._fields})
            print(f"rank {rank} {shape}", flush=True)
            plan, ms = tune(plans.rules(seq), shape, rank)
            fields = {name: value for name, value in plan._asdict().items() if name != "row_output"}
            own[plans.bucket(seq)] = {"plan": fields, "ms": round(ms, 3)}
            plans.TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
