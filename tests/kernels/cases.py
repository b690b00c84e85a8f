"""Random inputs of the Mamba-3 scan, and gradients by name."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.kernels import Mamba3State, mamba3_scan


@dataclass(frozen=True)
class Case:
    """Sizes in the letters of the scan, and which optional arguments are present."""

    b: int = 2
    l: int = 21  # noqa: E741 (the scan's letter)
    h: int = 4
    p: int = 8
    n: int = 12
    g: int = 2
    r: int = 1
    s: int = 3
    omega_per_head: bool = False
    norm: bool = False
    bare: bool = False  # only the required arguments
    mimo: bool = True  # weights per rank, at rank 1 too
    log_dt: tuple[float, float] = (-3.0, 0.0)
    log_decay: tuple[float, float] = (-4.0, 1.0)


def make(case: Case, dtype=np.float64, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments by name; the same numbers (rounded to float32) whatever the dtype."""
    rng = np.random.default_rng(seed)
    c = case

    def normal(*shape):
        return rng.normal(size=shape)

    args = {
        "x": normal(c.b, c.l, c.h, c.p),
        "dt": np.exp(rng.uniform(*c.log_dt, size=(c.b, c.l, c.h))),
        "a": -np.exp(rng.uniform(*c.log_decay, size=(c.b, c.l, c.h))),
        "b": normal(c.b, c.l, c.r, c.g, c.n),
        "c": normal(c.b, c.l, c.r, c.g, c.n),
        "lam": rng.uniform(size=(c.b, c.l, c.h)),
        "omega": np.pi * np.tanh(normal(*((c.b, c.l, c.h, c.s) if c.omega_per_head else (c.b, c.l, c.s)))),
    }
    if not c.bare:
        args |= {"b_bias": 1 + normal(c.h, c.r, c.n), "c_bias": 1 + normal(c.h, c.r, c.n), "d": normal(c.h)}
        if c.mimo:
            args |= {name: 1 + normal(c.h, c.r, c.p) / 4 for name in ("mimo_x", "mimo_z", "mimo_o")}
        args["z"] = normal(c.b, c.l, c.h, c.p)
        if c.norm:
            args["norm_weight"] = 1 + normal(c.h, c.p) / 4
    return {name: v.astype(np.float32).astype(dtype) for name, v in args.items()}


def make_projected(case: Case, dtype=np.float64, has_lambda: bool = True, seed: int = 2) -> dict[str, np.ndarray]:
    """Arrays of `mamba3_projected_step` for one token, but the state; λ is in the projection, or has to be fixed."""
    rng = np.random.default_rng(seed)
    c = case
    coefficients = ("x", "dt", "a", "b", "c", "lam", "omega", "z")
    args = {name: v for name, v in make(case, np.float64, seed).items() if name not in coefficients}
    width = 2 * c.h * c.p + 2 * c.r * c.g * c.n + (3 if has_lambda else 2) * c.h + c.s
    args |= {"projected": rng.normal(size=(c.b, width)), "dt_bias": rng.uniform(*c.log_dt, size=c.h)}
    args |= {name: 1 + rng.normal(size=c.n) / 4 for name in ("b_norm", "c_norm")}
    return {name: v.astype(np.float32).astype(dtype) for name, v in args.items()}


def largest_turn(projected: dict[str, np.ndarray]) -> float:
    """Radians that a phase may step by: softplus(v) is at most |v| + log 2."""
    return np.pi * float(np.abs(projected["projected"]).max() + np.abs(projected["dt_bias"]).max() + 1)


def make_state(case: Case, dtype=np.float64, seed: int = 1) -> Mamba3State:
    """A random state before the first token."""
    rng = np.random.default_rng(seed)
    c = case
    shapes = ((c.b, c.h, c.s), (c.b, c.h, c.p, c.n), (c.b, c.h, c.r, c.n), (c.b, c.h, c.p))
    arrays = [rng.uniform(0, 2 * np.pi, size=shapes[0]), *(rng.normal(size=shape) for shape in shapes[1:])]
    return Mamba3State(*(v.astype(np.float32).astype(dtype) for v in arrays))


def segments(case: Case) -> np.ndarray:
    """Documents of different lengths, one of a single token, not aligned between rows."""
    cuts = [[1, 2, 9, 16], [5, 13, 17, 20]]
    return np.stack([np.searchsorted(cuts[row % 2], np.arange(case.l), side="right") for row in range(case.b)])


def differentiated(
    scan: Callable = mamba3_scan, **options
) -> Callable[[dict, Mamba3State | None], dict[str, jax.Array]]:
    """(arguments, state) → y, final state and the gradient of a random projection of all of them, by name."""

    def projection(args, state):
        y, final = scan(**args, initial_state=state, return_state=True, **options)
        results = {"y": y, **{f"final.{name}": v for name, v in final._asdict().items()}}
        rng = np.random.default_rng(7)
        # The same cotangents in every dtype.
        weights = {name: rng.normal(size=v.shape).astype(jnp.bfloat16).astype(v.dtype) for name, v in results.items()}
        return sum(jnp.sum(v * weights[name]) for name, v in results.items()), results

    @jax.jit
    def run(args, state):
        argnums = (0,) if state is None else (0, 1)
        gradients, results = jax.grad(projection, argnums=argnums, has_aux=True)(args, state)
        results |= {f"d {name}": v for name, v in gradients[0].items()}
        if state is not None:
            results |= {f"d state.{name}": v for name, v in gradients[1]._asdict().items()}
        return results

    return run


def outputs_and_gradients(args: dict, state: Mamba3State | None, **options) -> dict[str, np.ndarray]:
    """What `differentiated` finds."""
    return jax.tree.map(np.asarray, differentiated(**options)(args, state))
