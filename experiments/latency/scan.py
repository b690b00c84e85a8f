"""Times the Mamba-3 scan at the shapes of a 1.5B layer: correctness first, then times beside the floor and a rival.

python experiments/latency/scan.py --json OUT [--implementations mosaic triton] [--ranks 1 4] [--commit HASH]

Inputs are random bfloat16, as the projections leave them; bias, angle sum, rotation, D, gate and MIMO projections are
inside. A time is the median over repeats of a compiled loop of calls, so that the host is out of it; the spread their
10th and 90th percentile. OUT also gets a plot, OUT with .png. Implementations that cannot run on this device are left
out, with the reason. Where jax-linear-attention is installed, its fused SISO forward is checked and timed beside ours.

The floor is what the card cannot beat: the larger of the fewest bytes at its copy rate and the chunked form's products
(m3jax/training/flops.py) at its matrix rate, both measured in the same run.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from m3jax.circumstances import circumstances
from m3jax.kernels import mamba3_scan
from m3jax.training.flops import CHUNK_ROWS

try:
    from jla.ops.mosaic_gpu.mamba3_fused import mamba3_siso_fused
except ImportError:  # not installed
    mamba3_siso_fused = None

SHAPES = {"B8 L2048": (8, 2048), "B1 L16384": (1, 16384), "B1 L2048": (1, 2048)}
HEADS, HEADDIM, D_STATE, ANGLES = 64, 64, 128, 32
# Errors that add up along the sequence show at the longer one.
CHECKED_LENGTHS = (300, 2048)
CHECKED_HEADS = 4
# RMS, relative: bfloat16 rounds B, C, scores, states and their cotangents by 2^-9 each, half a dozen in a row; twice
# that (narrow_rms in tests/tolerances.py).
TOLERANCE = 1e-2
_KINDS = ("forward", "both")
_REPEATS, _CALLS = 7, 20
_COPIES = 8  # started before the first has ended, so that starting counts little


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


def refusal(scan: Callable, rank: int) -> str | None:
    """Why an implementation does not take such inputs here; None if it does."""
    try:
        jax.eval_shape(lambda args: scan(**args), make_inputs(1, CHECKED_LENGTHS[0], rank, CHECKED_HEADS))
    except ValueError as error:
        if "cannot run here" not in str(error):
            raise
        return str(error)
    return None


def forward_and_backward(scan: Callable) -> Callable:
    """(args, cotangent) → (y, gradients of every argument)."""

    def run(args: dict[str, jax.Array], cotangent: jax.Array):
        y, pullback = jax.vjp(lambda a: scan(**a), args)
        return y, pullback(cotangent)[0]

    return run


def check(scan: Callable, rank: int, length: int, heads: int = CHECKED_HEADS) -> dict[str, float]:
    """RMS error of y and of every gradient over the RMS of the float64 reference; raises over the tolerance."""
    args, cotangent = _checked_inputs(rank, length, heads)
    y, gradients = jax.jit(forward_and_backward(scan))(args, cotangent)
    # Without a gradient to come, another kernel may run.
    alone = jax.jit(lambda a: scan(**a))(args)
    y_exact, gradients_exact = _exact(rank, length, heads)
    values = {"y": y, "y alone": alone} | gradients
    return _compare(values, {"y": y_exact, "y alone": y_exact} | gradients_exact, f"rank {rank}, length {length}")


def check_forward(forward: Callable, length: int) -> dict[str, float]:
    """The same for y alone, of a SISO forward that takes the arguments as a dict."""
    y = jax.jit(forward)(_checked_inputs(1, length, CHECKED_HEADS)[0])
    return _compare({"y": y}, {"y": _exact(1, length, CHECKED_HEADS)[0]}, f"length {length}")


def _checked_inputs(rank: int, length: int, heads: int) -> tuple[dict[str, jax.Array], jax.Array]:
    args = make_inputs(2, length, rank, heads)
    return args, jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)


@functools.cache
def _exact(rank: int, length: int, heads: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """y and gradients of the float64 reference on the inputs of `check`."""
    args, cotangent = _checked_inputs(rank, length, heads)
    with jax.enable_x64(True):
        exact = functools.partial(mamba3_scan, implementation="reference")
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, cotangent))
        return jax.tree.map(np.asarray, jax.jit(forward_and_backward(exact))(*wide))


def _compare(values: dict, expected: dict, label: str) -> dict[str, float]:
    errors = {}
    for name, value in values.items():
        error = np.asarray(value, np.float64) - expected[name]
        errors[name] = float(np.sqrt(np.mean(error**2) / np.mean(expected[name] ** 2)))
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise AssertionError(f"{label}: RMS errors over the tolerance: {wrong}")
    return errors


def jla_siso(args: dict[str, jax.Array]) -> jax.Array:
    """jax-linear-attention's fused SISO forward on our arguments: its pairs are neighbours, its λ and ω still raw."""

    def paired(v: jax.Array) -> jax.Array:
        pairs = jnp.stack([v[..., :ANGLES], v[..., ANGLES : 2 * ANGLES]], axis=-1)
        return jnp.concatenate([pairs.reshape(*v.shape[:-1], 2 * ANGLES), v[..., 2 * ANGLES :]], axis=-1)

    raw_omega = jnp.arctanh(args["omega"] / jnp.pi)[:, :, None]
    y, _ = mamba3_siso_fused(
        paired(args["c"][:, :, 0]), paired(args["b"][:, :, 0]), args["x"], args["dt"] * args["a"], args["dt"],
        jnp.log(args["lam"]) - jnp.log1p(-args["lam"]), paired(args["c_bias"][:, 0]), paired(args["b_bias"][:, 0]),
        jnp.broadcast_to(raw_omega, (*args["x"].shape[:3], ANGLES)), args["d"], args["z"],
    )  # fmt: skip
    return y


def milliseconds(function: Callable, *args, repeats: int = _REPEATS, calls: int = _CALLS) -> dict[str, float]:
    """Median, 10th and 90th percentile of a call's time inside a compiled loop."""
    run = jax.jit(repeated(function, calls))
    jax.block_until_ready(run(*args))
    return time_repeats(run, args, repeats, calls)


def repeated(function: Callable, calls: int) -> Callable:
    """So many calls in a loop, to be compiled; gives the results of the last.

    One call a turn, though a turn with one tiny kernel takes 18 us on an H200: of several in a row the compiler drops
    some, whatever the barriers between them.
    """

    def loop(*args):
        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(function, *args))

        def body(_, previous):  # The barrier makes each call wait for the one before, and keeps all of them.
            waited, _ = jax.lax.optimization_barrier((args, previous))
            return function(*waited)

        return jax.lax.fori_loop(0, calls, body, zeros)

    return loop


def time_repeats(run: Callable, args: tuple, repeats: int, calls: int) -> dict[str, float]:
    """As `milliseconds`, of a compiled loop of so many calls that has run before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append((time.perf_counter() - start) / calls * 1e3)
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"ms": float(median), "low": float(low), "high": float(high)}


def ceilings(copied: int = 2**31, width: int = 8192) -> dict[str, float]:
    """What this device can do.

    Args:
      copied: bytes of the array that is copied.
      width: of the square matrices that are multiplied.

    Returns:
      Copy bandwidth in TB/s (read and write), by the device's own copies or by v + 1, whichever is faster, and
      bfloat16 matrix product rate in TFLOP/s.
    """
    block = jnp.ones(copied // 2, jnp.bfloat16)
    copy_once = jax.jit(jnp.copy)

    def copy_often(block: jax.Array) -> jax.Array:
        for _ in range(_COPIES):
            result = copy_once(block)
        return result

    jax.block_until_ready(copy_often(block))
    own = time_repeats(copy_often, (block,), repeats=_REPEATS, calls=_COPIES)["ms"]
    added = milliseconds(lambda v: v + 1, block, calls=5)["ms"]
    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = milliseconds(lambda m: m @ m, matrix, calls=5)["ms"]
    return {"copy_TB_per_s": 2 * copied / min(own, added) / 1e9, "matmul_TFLOP_per_s": 2 * width**3 / product / 1e9}


def floors(args: dict[str, jax.Array], limits: dict[str, float]) -> dict[str, float]:
    """Milliseconds under which no implementation can be: forward, and forward with backward."""
    batch, length, heads, p = args["x"].shape
    rank, _, n = args["b"].shape[2:]
    n_bytes = sum(v.nbytes for v in args.values())
    flops = batch * length * heads * rank * (2 * CHUNK_ROWS * (n + p) + 4 * n * p)
    y = args["x"].nbytes

    def floor(n_bytes: float, flops: float) -> float:
        return max(n_bytes / limits["copy_TB_per_s"], flops / limits["matmul_TFLOP_per_s"]) / 1e9

    # The backward reads inputs and cotangent and writes as many gradients; its products are twice the forward's.
    return {"forward": floor(n_bytes + y, flops), "both": floor(n_bytes + y + 2 * n_bytes + y, 3 * flops)}


def main() -> None:
    """Checks, times, prints a table, writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--implementations", nargs="+", default=["mosaic", "triton", "xla"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    limits = ceilings()
    report = circumstances(options.commit) | {"ceilings": limits, "rows": []}
    print(json.dumps(limits), flush=True)
    print(f"{'':34s}{'forward ms':>12s}{'x floor':>9s}{'fwd+bwd ms':>12s}{'x floor':>9s}{'temporaries MB':>16s}")

    def add(row: dict) -> None:
        for kind in _KINDS:
            if kind in row and row[kind]["ms"] < row["floor"][kind]:
                raise AssertionError(f"{row}: {kind} is faster than the device can be; what was timed is not the scan.")
        report["rows"].append(row)
        options.json.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept, whatever comes next
        cells = "".join(f"{row[k]['ms']:12.3f}{row[k]['ms'] / row['floor'][k]:9.1f}" for k in _KINDS if k in row)
        label = f"{row['implementation']} rank {row['rank']} {row['shape']}"
        print(f"{label:34s}{cells}{row.get('temporaries_MB', 0):16.0f}", flush=True)

    for rank in options.ranks:
        for name in options.implementations:
            scan = functools.partial(mamba3_scan, implementation=name, chunk_size=options.chunk_size)
            reason = refusal(scan, rank)
            if reason is not None:
                report[f"left out: {name} rank {rank}"] = reason
                print(f"rank {rank}: {reason}", flush=True)
                continue
            with ThreadPoolExecutor() as pool:  # kernels compile for up to a minute, on one core each
                compiled = pool.map(functools.partial(compile_programs, scan, rank=rank), options.shapes)
                for length in CHECKED_LENGTHS:
                    report[f"errors {name} rank {rank} L{length}"] = check(scan, rank, length)
            for shape, programs in zip(options.shapes, compiled, strict=True):
                add({"implementation": name, "rank": rank, "shape": shape} | measure(programs, limits))
        if rank == 1 and mamba3_siso_fused is not None:
            report["errors jax-linear-attention"] = check_forward(jla_siso, CHECKED_LENGTHS[0])
            for shape in options.shapes:
                args = make_inputs(*SHAPES[shape], 1)
                row = {"implementation": "jax-linear-attention", "rank": 1, "shape": shape}
                times = {"floor": floors(args, limits), "forward": milliseconds(jla_siso, args)}
                add(row | times)
    plot(report, options.json.with_suffix(".png"))


class Programs(NamedTuple):
    """Compiled loops of an implementation at one shape, and what they are run with."""

    args: dict[str, jax.Array]
    cotangent: jax.Array
    forward: jax.stages.Compiled
    both: jax.stages.Compiled


def compile_programs(scan: Callable, shape: str, rank: int) -> Programs:
    """Compiles what `measure` times."""
    args = make_inputs(*SHAPES[shape], rank)
    cotangent = jax.random.normal(jax.random.key(1), args["x"].shape, jnp.bfloat16)
    forward = jax.jit(repeated(lambda a: scan(**a), _CALLS)).lower(args)
    both = jax.jit(repeated(forward_and_backward(scan), _CALLS)).lower(args, cotangent)
    return Programs(args, cotangent, forward.compile(), both.compile())


def measure(programs: Programs, limits: dict[str, float]) -> dict:
    """Times, floors and temporary memory (a loop has that of one call) of an implementation at one shape."""
    args, cotangent, forward, both = programs
    jax.block_until_ready((forward(args), both(args, cotangent)))
    return {
        "floor": floors(args, limits),
        "forward": time_repeats(forward, (args,), _REPEATS, _CALLS),
        "both": time_repeats(both, (args, cotangent), _REPEATS, _CALLS),
        "temporaries_MB": both.memory_analysis().temp_size_in_bytes / 1e6,
    }


def plot(report: dict, path: Path) -> None:
    """Bars of every time, on a logarithmic axis, with the floor as a line across each."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, kind, title in zip(axes, _KINDS, ("forward", "forward + backward"), strict=True):
        rows = [row for row in report["rows"] if kind in row]
        labels = [f"{row['implementation']}\nrank {row['rank']} {row['shape']}" for row in rows]
        times = [row[kind]["ms"] for row in rows]
        spread = [[t - row[kind]["low"] for t, row in zip(times, rows, strict=True)],
                  [row[kind]["high"] - t for t, row in zip(times, rows, strict=True)]]  # fmt: skip
        axis.bar(labels, times, yerr=spread)
        axis.scatter(labels, [row["floor"][kind] for row in rows], marker="_", color="black", label="floor")
        axis.set(yscale="log", ylabel="ms", title=f"{title}, {report['device']}")
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
