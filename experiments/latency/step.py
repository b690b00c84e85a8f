"""Times one decode step of the recurrence at the shapes of a 1.5B layer beside copies of as many bytes.

python experiments/latency/step.py --json OUT [--implementations triton xla] [--batches 1 32 128]

Correctness comes first, against the reference in float64. A time is that of many steps in one compiled loop that
carries the state, divided by their number: the median over repeated calls, the spread their 10th and 90th percentile.
The copies read and write an array in place, in a loop of the same kind: one is XLA's, which may replay its kernels as a
CUDA graph, the other Triton's, which is launched as the step is. Where a step's bytes fit in the second-level cache,
they stay there from one step to the next, and so does the copy's array. `layers` in a row's name: each step of the loop
takes the state of the next of many layers, and each copy the next of as many arrays, so that both come from memory, as
in a model.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from experiments.latency.arguments import parse_on_gpu
from m3jax.circumstances import circumstances
from m3jax.kernels import Mamba3State
from m3jax.kernels.mamba3 import reference
from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.triton import step as triton_step
from m3jax.kernels.triton_launch import launch

HEADS, HEADDIM, D_STATE, ANGLES = 64, 64, 128, 32
ROUNDS = 100
LAYERS_BYTES = 2**28  # states of all layers together, several times the cache of a data-centre card
EPSILON = 1e-5
# RMS, relative. float32: sums of up to 1024 products. bfloat16: one rounding of y, 2^-9 / √3, and of the state.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
PHASE_STEPS = 20_000


def reference_step(token: Sequence, weights: Weights, state: Mamba3State) -> tuple[jax.Array, Mamba3State]:
    """The step that XLA compiles, with the state kept in its dtype."""
    y, new = reference.step(token, weights, state, EPSILON)
    return y, new.stored_in(state.ssm.dtype, state.b.dtype)


def kernel_step(token: Sequence, weights: Weights, state: Mamba3State, tiling=None) -> tuple[jax.Array, Mamba3State]:
    """The Triton step."""
    return triton_step.step(token, weights, state, EPSILON, tiling)


IMPLEMENTATIONS = {"xla": reference_step, "triton": kernel_step}


def make_inputs(
    batch: int, rank: int, state_dtype, *, heads: int = HEADS, headdim: int = HEADDIM, d_state: int = D_STATE,
    angles: int = ANGLES, groups: int = 1, x_dtype=jnp.bfloat16, norm: bool = False, omega_per_head: bool = False,
    seed: int = 0,
) -> tuple[Sequence, Weights, Mamba3State]:  # fmt: skip
    """Random arguments of a step, with step sizes and decays as they are at initialisation."""
    keys = iter(jax.random.split(jax.random.key(seed), 24))

    def normal(*shape, dtype=x_dtype):
        return jax.random.normal(next(keys), shape, dtype)

    token = Sequence(
        x=normal(batch, heads, headdim),
        dt=jnp.exp(jax.random.uniform(next(keys), (batch, heads), minval=np.log(1e-3), maxval=np.log(0.1))),
        a=-jnp.exp(normal(batch, heads, dtype=jnp.float32)),
        b=normal(batch, rank, groups, d_state),
        c=normal(batch, rank, groups, d_state),
        lam=jax.random.uniform(next(keys), (batch, heads)),
        omega=jnp.pi * jnp.tanh(normal(*((batch, heads) if omega_per_head else (batch,)), angles, dtype=jnp.float32)),
        z=normal(batch, heads, headdim),
    )
    mimo = [1 + normal(heads, rank, headdim, dtype=jnp.float32) / 4 for _ in range(3)] if rank > 1 else [None] * 3
    weights = Weights(
        b_bias=1 + normal(heads, rank, d_state, dtype=jnp.float32) / 4,
        c_bias=1 + normal(heads, rank, d_state, dtype=jnp.float32) / 4,
        mimo_x=mimo[0], mimo_z=mimo[1], mimo_o=mimo[2],
        d=1 + normal(heads, dtype=jnp.float32) / 4,
        norm_weight=1 + normal(heads, headdim, dtype=jnp.float32) / 4 if norm else None,
    )  # fmt: skip
    state = Mamba3State(
        angle=jax.random.uniform(next(keys), (batch, heads, angles), maxval=2 * np.pi),
        ssm=normal(batch, heads, headdim, d_state, dtype=jnp.float32).astype(state_dtype),
        b=normal(batch, heads, rank, d_state, dtype=jnp.float32).astype(state_dtype),
        x=normal(batch, heads, headdim),
    )
    return token, weights, state


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """RMS of the difference over the RMS of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))) if expected.size else 0.0


def errors_of(step: Callable, token: Sequence, weights: Weights, state: Mamba3State) -> dict[str, float]:
    """RMS errors of y and of the new state by name, phases in radians; raises over the tolerance."""
    y, new = jax.jit(step)(token, weights, state)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (token, weights, state))
        exact_y, exact = reference.step(*wide, norm_eps=EPSILON)
    errors = {"y": relative_error(y, exact_y), "ssm": relative_error(new.ssm, exact.ssm)}
    errors |= {"b": relative_error(new.b, exact.b), "x": relative_error(new.x, exact.x)}
    turn = np.asarray(new.angle, np.float64) - np.asarray(exact.angle, np.float64)
    errors["angle"] = float(np.abs((turn + np.pi) % (2 * np.pi) - np.pi).max(initial=0))
    # The kernel may read y from the state as it is stored.
    narrowest = "bfloat16" if jnp.bfloat16 in (y.dtype, state.ssm.dtype) else "float32"
    limits = {"y": TOLERANCE[narrowest], "ssm": TOLERANCE[str(state.ssm.dtype)], "b": TOLERANCE[str(state.b.dtype)]}
    limits |= {"x": 0.0, "angle": 2.0**-20}
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
    if wrong:
        raise AssertionError(f"errors over the tolerance: {wrong}")
    return errors


def check(step: Callable) -> dict[str, dict[str, float]]:
    """Every rank with every dtype, other sizes and options; errors by case."""
    cases = {
        f"rank {rank} x {x_dtype} state {state_dtype}": {"rank": rank, "x_dtype": x_dtype, "state_dtype": state_dtype}
        for rank in (1, 2, 4, 8)
        for x_dtype in ("bfloat16", "float32")
        for state_dtype in ("float32", "bfloat16")
    }
    for rank, state_dtype in ((1, "float32"), (4, "float32"), (4, "bfloat16")):
        base = {"rank": rank, "state_dtype": state_dtype}
        name = f"rank {rank} state {state_dtype}"
        cases |= {
            f"{name} norm, groups": base | {"norm": True, "groups": 2, "omega_per_head": True},
            f"{name} no rotation": base | {"angles": 0},
            f"{name} full rotation": base | {"angles": D_STATE // 2},
            f"{name} p 16 n 16": base | {"headdim": 16, "d_state": 16, "angles": 4},
            f"{name} p 128 n 256": base | {"headdim": 128, "d_state": 256, "angles": 64, "norm": True},
            f"{name} p 24 n 100": base | {"headdim": 24, "d_state": 100, "angles": 25, "norm": True},
        }

    def errors(seed: int, case: dict) -> dict[str, float]:
        return errors_of(step, *make_inputs(3, **{"heads": 8, "seed": seed} | case))

    with ThreadPoolExecutor() as pool:  # nearly all of the time is the compiler's
        return dict(zip(cases, pool.map(errors, range(len(cases)), cases.values()), strict=True))


def phase_error(step: Callable, steps: int = PHASE_STEPS) -> float:
    """Largest error in radians of a carried phase after many steps; raises over what a random walk explains."""
    token, weights, state = make_inputs(1, 1, jnp.float32, heads=4, headdim=16, d_state=32, angles=16)
    key = jax.random.key(2)
    dt = jax.random.uniform(key, (steps, *token.dt.shape), minval=1e-3, maxval=0.1)
    omega = jnp.pi * jnp.tanh(jax.random.normal(key, (steps, *token.omega.shape)))

    def body(state, inputs):
        return step(token._replace(dt=inputs[0], omega=inputs[1]), weights, state)[1], None

    final, _ = jax.jit(lambda state: jax.lax.scan(body, state, (dt, omega)))(state)
    dt, omega, first = (np.asarray(v, np.float64) for v in (dt, omega, state.angle))
    turn = np.asarray(final.angle, np.float64) - first - (dt[..., None] * omega[:, :, None]).sum(axis=0)
    error = float(np.abs((turn + np.pi) % (2 * np.pi) - np.pi).max())
    if not error <= 4 * 2.0**-22 * np.sqrt(steps):
        raise AssertionError(f"phase off by {error} rad after {steps} steps")
    return error


def step_bytes(token: Sequence, weights: Weights, state: Mamba3State) -> int:
    """What a step must move: the token and the weights read, the state read and written, y written."""
    inputs = sum(v.nbytes for v in jax.tree.leaves((token, weights)))
    return inputs + 2 * sum(v.nbytes for v in state) + token.x.nbytes


def microseconds(function: Callable, carry, steps: int, calls: int = 15) -> dict[str, float]:
    """Median, 10th and 90th percentile of a step's time; `function` takes the carry's memory and returns the next."""
    carry = jax.block_until_ready(function(carry))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        carry = jax.block_until_ready(function(carry))
        times.append((time.perf_counter() - start) / steps * 1e6)
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"us": float(median), "low": float(low), "high": float(high)}


def time_step(step: Callable, inputs: tuple, y: jax.Array, state, layers: int) -> dict[str, float]:
    """A step's time in a loop over `layers` states in turn, of ROUNDS rounds; step(*inputs, state) → (as y, state)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry, *inputs):
        def body(_, carry):
            # y is carried, so that XLA computes it; nothing reads the old one, so that it costs no copy.
            return [step(*inputs, state) for _, state in carry]

        return jax.lax.fori_loop(0, ROUNDS, body, carry)

    carry = [(y + 0, jax.tree.map(lambda v: v + 0, state)) for _ in range(layers)]
    return microseconds(lambda carry: loop(carry, *inputs), carry, ROUNDS * layers)


@triton.jit
def _add_one(v_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(v_ptr + at) + 1)


def triton_copy(v: jax.Array) -> jax.Array:
    """v + 1 in place, 16 floats a thread."""
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    return launch(_add_one, [v], {}, out, (v.size // 2048, 1, 1), 4, {"SIZE": 2048}, {0: 0})[0]


def time_copy(copy: Callable, nbytes: int, layers: int) -> dict[str, float]:
    """The time to read and write in place nbytes in all, in a loop over `layers` arrays in turn."""

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry):
        return jax.lax.fori_loop(0, ROUNDS, lambda _, carry: [copy(v) for v in carry], carry)

    size = nbytes // 8 // 2048 * 2048  # float32, read and written
    carry = [jax.random.normal(jax.random.key(i), (size,)) for i in range(layers)]
    return microseconds(loop, carry, ROUNDS * layers)


def layers_of(nbytes: int) -> int:
    """How many states a round must go through for none to be in the cache when its turn comes again."""
    return min(64, -(-LAYERS_BYTES // (nbytes // 2)))


def time_row(names: list[str], inputs: tuple[Sequence, Weights, Mamba3State], layers: int) -> dict[str, object]:
    """Both copies' and every implementation's times, and their ratios to XLA's copy."""
    nbytes = step_bytes(*inputs)
    copies = {"copy": lambda v: v + 1, "triton copy": triton_copy}
    row = {name: time_copy(copy, nbytes, layers) for name, copy in copies.items()}
    for name in names:
        if name != "xla" or layers <= 8:  # more would compile for minutes
            token, weights, state = inputs
            row[name] = time_step(IMPLEMENTATIONS[name], (token, weights), token.x, state, layers)
    for times in row.values():
        times["ratio"] = times["us"] / row["copy"]["us"]
    return row | {"bytes": nbytes}


def main() -> None:
    """Checks, times, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--implementations", nargs="*", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32, 128])
    options = parse_on_gpu(parser)
    report = circumstances(options.commit) | {"errors": {}, "phase": {}, "step": {}}
    for name in options.implementations:
        step = IMPLEMENTATIONS[name]
        errors = report["errors"][name] = check(step)
        phase = report["phase"][name] = phase_error(step)
        worst = max(v["y"] for v in errors.values())
        print(f"{name}: correct; y at most {worst:.1e}, phase {phase:.1e} rad after {PHASE_STEPS} steps", flush=True)
    columns = ["copy", "triton copy", *options.implementations]
    print(f"{'us (over copy)':30s}{'MB':>7s}" + "".join(f"{name:>20s}" for name in columns) + f"{'copy TB/s':>11s}")
    for rank in (1, 4):
        for batch in options.batches:
            for state_dtype in ("float32", "bfloat16"):
                inputs = make_inputs(batch, rank, state_dtype)
                for layers in sorted({1, layers_of(step_bytes(*inputs))}):
                    label = f"rank {rank} B{batch} {state_dtype}" + (f" {layers} layers" if layers > 1 else "")
                    row = report["step"][label] = time_row(options.implementations, inputs, layers)
                    cells = [
                        f"{row[v]['us']:12.2f} ({row[v]['ratio']:5.2f})" if v in row else " " * 20 for v in columns
                    ]
                    rate = row["bytes"] / row["copy"]["us"] / 1e6
                    print(f"{label:30s}{row['bytes'] / 1e6:7.1f}{''.join(cells)}{rate:11.2f}", flush=True)
                    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
