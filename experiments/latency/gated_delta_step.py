"""Times one decode step of the gated delta rule at the shape of a 1.5B layer beside copies of as many bytes.

PYTHONPATH=. python experiments/latency/gated_delta_step.py --json OUT [--batches 1 32] [--tiling ROWS COLUMNS WARPS]

As step.py times a step of Mamba-3, over states of so many layers that all come from memory; q and k are brought to
length 1 in the step, as the layer asks. `--tiling`, as often as wanted: how else the kernel is to be laid out.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.latency.arguments import parse_on_gpu
from experiments.latency.step import TOLERANCE, layers_of, relative_error, time_copy, time_step, triton_copy
from m3jax.circumstances import circumstances
from m3jax.kernels import gated_delta_step
from m3jax.kernels.gated_delta import triton_step
from m3jax.kernels.gated_delta.inputs import Sequence

HEADS, KEYS, VALUES = 16, 128, 256  # configs/1b_gdn.py
UNIT_EPS = 1e-6


def step_of(implementation: str) -> Callable[[Sequence, jax.Array], tuple[jax.Array, jax.Array]]:
    """The public step by one implementation."""
    return lambda token, state: gated_delta_step(*token, state, unit_eps=UNIT_EPS, implementation=implementation)


def make_inputs(batch: int, state_dtype: str) -> tuple[Sequence, jax.Array]:
    """A random token in bfloat16, with decays as slow as at initialisation or slower, and a state."""
    q, k, v, g, beta, state = jax.random.split(jax.random.key(0), 6)
    token = Sequence(
        q=jax.random.normal(q, (batch, HEADS, KEYS), jnp.bfloat16),
        k=jax.random.normal(k, (batch, HEADS, KEYS), jnp.bfloat16),
        v=jax.random.normal(v, (batch, HEADS, VALUES), jnp.bfloat16),
        log_decay=-jnp.exp(jax.random.uniform(g, (batch, HEADS), minval=-7, maxval=0)),
        beta=jax.random.uniform(beta, (batch, HEADS)),
    )
    return token, jax.random.normal(state, (batch, HEADS, VALUES, KEYS)).astype(state_dtype)


def check(step: Callable, state_dtype: str) -> dict[str, float]:
    """RMS errors of o and S against the reference in float64; raises over the tolerance."""
    token, state = make_inputs(3, state_dtype)
    actual = jax.jit(step)(token, state)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (token, state))
        expected = step_of("reference")(*wide)
    errors = {name: relative_error(*pair) for name, pair in zip("oS", zip(actual, expected, strict=True), strict=True)}
    limits = {name: TOLERANCE[str(v.dtype)] for name, v in zip("oS", actual, strict=True)}
    if any(not error <= limits[name] for name, error in errors.items()):
        raise AssertionError(f"errors over the tolerance: {errors}")
    return errors


def main() -> None:
    """Checks, times, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32, 128])
    parser.add_argument("--state-dtypes", nargs="*", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--tiling", nargs=3, type=int, action="append", default=[])
    options = parse_on_gpu(parser)
    steps = {"triton": step_of("triton"), "xla": step_of("xla")}
    for tiling in options.tiling:
        own = triton_step.Tiling(*tiling)
        steps[" ".join(map(str, own))] = functools.partial(triton_step.step, unit_eps=UNIT_EPS, tiling=own)
    report = circumstances(options.commit) | {"errors": {}, "step": {}}
    for dtype in options.state_dtypes:
        report["errors"][dtype] = {name: check(step, dtype) for name, step in steps.items()}
    for batch in options.batches:
        for dtype in options.state_dtypes:
            token, state = make_inputs(batch, dtype)
            nbytes = sum(v.nbytes for v in token) + token.v.nbytes + 2 * state.nbytes
            layers = layers_of(nbytes)
            row = {"copy": time_copy(lambda v: v + 1, nbytes, layers)}
            row["triton copy"] = time_copy(triton_copy, nbytes, layers)
            for name, step in steps.items():
                if name != "xla" or layers <= 8:  # more would compile for minutes
                    row[name] = time_step(step, (token,), token.v, state, layers)
            label = f"B{batch} {dtype} {layers} layers"
            report["step"][label] = row | {"bytes": nbytes}
            print(f"{label}, {nbytes / 1e6:.1f} MB, us (over copy):", flush=True)
            for name, times in row.items():
                print(f"  {name:12s}{times['us']:10.2f} ({times['us'] / row['copy']['us']:.2f})", flush=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
