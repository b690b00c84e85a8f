"""Times the Mamba-3 scan at the shapes of a 1.5B layer: correctness first, then times beside the card's ceilings.

python experiments/latency/scan.py --json OUT [--implementation xla] [--chunk-size C] [--commit HASH]

Inputs are random bfloat16, as the projections leave them; bias, angle sum, rotation, D, gate and MIMO projections are
inside. A time is the median over repeated batches of calls, the spread their 10th and 90th percentile.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.circumstances import circumstances
from m3jax.kernels import mamba3_scan

SHAPES = {"B8 L2048": (8, 2048), "B1 L16384": (1, 16384), "B1 L2048": (1, 2048)}
HEADS, HEADDIM, D_STATE, ANGLES = 64, 64, 128, 32
# Errors that add up along the sequence show at the longer one.
CHECKED_LENGTHS = (300, 2048)
# RMS, relative: bfloat16 rounds B, C, scores, states and their cotangents by 2^-9 each, half a dozen in a row; twice
# that (narrow_rms in tests/tolerances.py).
TOLERANCE = 1e-2


def make_inputs(batch: int, length: int, rank: int, heads: int = HEADS, seed: int = 0) -> dict[str, jax.Array]:
    """Random arguments of `mamba3_scan`, with step sizes and decays as they are at initialisation."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    per_token = (batch, length, heads)
    args = {
        "x": normal(*per_token, HEADDIM),
        "z": normal(*per_token, HEADDIM),
        "b": normal(batch, length, rank, 1, D_STATE),
        "c": normal(batch, length, rank, 1, D_STATE),
        "dt": jnp.exp(jax.random.uniform(next(keys), per_token, minval=np.log(1e-3), maxval=np.log(0.1))),
        "a": -jnp.exp(jax.random.normal(next(keys), per_token)),
        "lam": jax.random.uniform(next(keys), per_token),
        "omega": jnp.pi * jnp.tanh(jax.random.normal(next(keys), (batch, length, ANGLES))),
        "b_bias": jnp.ones((heads, rank, D_STATE)),
        "c_bias": jnp.ones((heads, rank, D_STATE)),
        "d": jnp.ones(heads),
    }
    if rank > 1:
        args |= {name: jnp.full((heads, rank, HEADDIM), v) for name, v in
                 (("mimo_x", 1 / rank), ("mimo_z", 1.0), ("mimo_o", 1 / rank))}  # fmt: skip
    return args


def forward_and_backward(scan: Callable) -> Callable:
    """(args, cotangent) → (y, gradients of every argument)."""

    def run(args: dict[str, jax.Array], cotangent: jax.Array):
        y, pullback = jax.vjp(lambda a: scan(**a), args)
        return y, pullback(cotangent)[0]

    return run


def check(scan: Callable, rank: int, length: int) -> dict[str, float]:
    """RMS error of y and of every gradient over the RMS of the float64 reference; raises over the tolerance."""
    args = make_inputs(2, length, rank, heads=4)
    cotangent = jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)
    y, gradients = jax.jit(forward_and_backward(scan))(args, cotangent)
    with jax.enable_x64(True):
        exact = functools.partial(mamba3_scan, implementation="reference")
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, cotangent))
        y_exact, gradients_exact = jax.jit(forward_and_backward(exact))(*wide)
    errors = {}
    pairs = {"y": (y, y_exact)} | {name: (gradients[name], gradients_exact[name]) for name in args}
    for name, (value, expected) in pairs.items():
        value, expected = np.asarray(value, np.float64), np.asarray(expected)
        errors[name] = float(np.sqrt(np.mean((value - expected) ** 2) / np.mean(expected**2)))
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise AssertionError(f"rank {rank}, length {length}: RMS errors over the tolerance: {wrong}")
    return errors


def milliseconds(function: Callable, *args, batches: int = 15, calls: int = 5) -> dict[str, float]:
    """Median, 10th and 90th percentile of a call's time, after a warm-up."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"ms": float(median), "low": float(low), "high": float(high)}


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s (read and write) and bfloat16 matrix product rate in TFLOP/s of this device."""
    block = jnp.ones(2**30, jnp.bfloat16)
    copy = milliseconds(jax.jit(lambda v: v + 1), block)["ms"]
    matrix = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = milliseconds(jax.jit(lambda m: m @ m), matrix)["ms"]
    return {"copy_TB_per_s": 2 * block.nbytes / copy / 1e9, "matmul_TFLOP_per_s": 2 * 8192**3 / product / 1e9}


def main() -> None:
    """Checks, times, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    scan = functools.partial(mamba3_scan, implementation=options.implementation, chunk_size=options.chunk_size)
    report = circumstances(options.commit) | {"ceilings": ceilings(), "scan": {}}
    print(json.dumps(report["ceilings"]), flush=True)
    print(f"{'scan':24s}{'forward ms':>12s}{'fwd+bwd ms':>12s}{'temporaries MB':>16s}")
    for rank in (1, 4):
        for length in CHECKED_LENGTHS:
            report[f"errors rank {rank} L{length}"] = check(scan, rank, length)
        for shape in options.shapes:
            args = make_inputs(*SHAPES[shape], rank)
            cotangent = jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)
            forward = jax.jit(lambda a: scan(**a))
            both = jax.jit(forward_and_backward(scan)).lower(args, cotangent).compile()
            row = {"forward": milliseconds(forward, args), "both": milliseconds(both, args, cotangent)}
            row["temporaries_MB"] = both.memory_analysis().temp_size_in_bytes / 1e6
            report["scan"][f"rank {rank} {shape}"] = row
            print(f"rank {rank} {shape:17s}{row['forward']['ms']:12.3f}{row['both']['ms']:12.3f}"
                  f"{row['temporaries_MB']:16.0f}", flush=True)  # fmt: skip
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
