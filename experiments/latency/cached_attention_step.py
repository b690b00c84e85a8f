"""Times one token's attention to a cache at the shape of a 1B layer beside copies of as many bytes; tries tilings.

PYTHONPATH=. python experiments/latency/cached_attention_step.py --json OUT [--tiling PARTS BLOCK WARPS STAGES]

As step.py times a step of Mamba-3, over the caches of so many layers that all come from memory. The bytes are those
that are filled, whatever room there is. Each result is checked against float64 before it is timed. First come blocks,
warps and stages with the parts that `default_tiling` takes, then other numbers of parts with the fastest of these; with
`--tiling`, as often as wanted, these alone. Programs compile in threads; one that does not is passed over.
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.latency.arguments import parse_on_gpu
from experiments.latency.step import TOLERANCE, layers_of, microseconds, relative_error, time_copy, triton_copy
from m3jax.circumstances import circumstances
from m3jax.kernels.cached_attention import triton_step, xla
from m3jax.kernels.cached_attention.triton_step import Tiling

HEADS, KV_HEADS, WIDTH = 32, 8, 64  # configs/1b_transformer.py
ROUNDS, CALLS = 20, 5
XLA_LAYERS = 8  # more would compile for minutes


class Shape(NamedTuple):
    """Tokens in the cache: from `least` to `most`, evenly over the batch."""

    batch: int
    room: int
    least: int
    most: int

    def __str__(self) -> str:
        filled = self.least if self.least == self.most else f"{self.least} to {self.most}"
        return f"B{self.batch} room {self.room} filled {filled}"


SHAPES = (
    Shape(128, 4096, 2048, 2048),
    Shape(128, 4096, 2048, 4095),
    Shape(32, 4096, 2048, 4095),
    Shape(1, 4096, 3072, 3072),
    Shape(1, 32768, 16384, 16384),
)


def make_inputs(shape: Shape) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """A random token in bfloat16, lengths and starts; and keys and values."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    new = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    token = {
        name: jax.random.normal(next(keys), (shape.batch, heads, WIDTH), jnp.bfloat16) for name, heads in new.items()
    }
    token["length"] = jnp.linspace(shape.least, shape.most, shape.batch).astype(jnp.int32)
    token["start"] = jnp.zeros(shape.batch, jnp.int32)
    cache = (shape.batch, KV_HEADS, shape.room, WIDTH)
    return token, tuple(jax.random.normal(next(keys), cache, jnp.bfloat16) for _ in range(2))


def exact_output(token: dict[str, jax.Array], cache: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """y in float64, some rows at a time."""
    step = jax.jit(lambda token, cache: xla.step(keys=cache[0], values=cache[1], **token)[0])
    rows = []
    with jax.enable_x64(True):
        for first in range(0, token["q"].shape[0], 16):
            some = jax.tree.map(lambda v, first=first: v[first : first + 16], (token, cache))
            wide = jax.tree.map(lambda v: v if v.dtype == jnp.int32 else v.astype(jnp.float64), some)
            rows.append(np.asarray(step(*wide)))
    return np.concatenate(rows)


def loop_over_layers(step: Callable, layers: int) -> Callable:
    """(the y and cache of each layer, token) → the same after ROUNDS rounds; `step` as `xla.step`."""

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry, token):
        def body(_, carry):
            # y is carried, so that XLA computes it; nothing reads the old one, so that it costs no copy.
            results = (step(keys=keys, values=values, **token) for _, keys, values in carry)
            return [tuple(result) for result in results]

        return jax.lax.fori_loop(0, ROUNDS, body, carry)

    return loop


class Bench:
    """One shape: what is timed there, and how it went."""

    def __init__(self, shape: Shape):
        self._token, self._cache = make_inputs(shape)
        self._exact = exact_output(self._token, self._cache)
        filled = int(self._token["length"].sum()) * KV_HEADS * WIDTH * 2 * self._cache[0].dtype.itemsize
        self.nbytes = filled + sum(v.nbytes for v in self._token.values()) + self._token["q"].nbytes
        self.layers = layers_of(2 * self.nbytes)
        self.row: dict[str, dict] = {
            "copy": time_copy(lambda v: v + 1, self.nbytes, self.layers),
            "triton copy": time_copy(triton_copy, self.nbytes, self.layers),
        }

    def measure(self, steps: dict[str, Callable]) -> None:
        """Compiles all of them at once, then checks and times one after another."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            programs = {name: threads.submit(self._compile, name, step) for name, step in steps.items()}
        for name, program in programs.items():
            try:
                self.row[name] = self._time(program.result(), self._layers(name))
            except (AssertionError, RuntimeError, ValueError) as error:
                self.row[name] = {"failed": str(error).splitlines()[0][:200]}
                print(f"  {name}: {self.row[name]['failed']}", flush=True)

    def fastest(self, names: Iterable[str]) -> list[str]:
        """Those of the names that were timed, the fastest first."""
        return sorted((name for name in names if "us" in self.row[name]), key=lambda name: self.row[name]["us"])

    def _layers(self, name: str) -> int:
        return min(self.layers, XLA_LAYERS) if name == "xla" else self.layers

    def _carry(self, layers: int) -> list[tuple[jax.Array, ...]]:
        return [tuple(v + 0 for v in (self._token["q"], *self._cache)) for _ in range(layers)]

    def _compile(self, name: str, step: Callable) -> Callable:
        layers = self._layers(name)
        carry = [(self._token["q"], *self._cache)] * layers
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (carry, self._token))
        return loop_over_layers(step, layers).lower(*shapes).compile()

    def _time(self, program: Callable, layers: int) -> dict[str, float]:
        carry = program(self._carry(layers), self._token)
        error = max(relative_error(y, self._exact) for y, *_ in carry)
        if not error <= 2 * TOLERANCE["bfloat16"]:  # two roundings: of the weights, and of y
            raise AssertionError(f"y is off by {error}")
        return microseconds(lambda carry: program(carry, self._token), carry, ROUNDS * layers, CALLS) | {"error": error}


def tilings_to_try(parts: int) -> list[Tiling]:
    """Blocks, warps and stages; a warp has 16 slots of a block at least, and no more than fit in its registers."""
    grid = itertools.product((32, 64, 128), (1, 2, 4, 8), (2, 3, 4))
    return [Tiling(parts, *one) for one in grid if 16 <= one[0] // one[1] <= 64 and one[0] * one[2] <= 384]


def search(bench: Bench, shape: Shape) -> None:
    """Times XLA, the kernel as it is laid out by default, and other tilings."""
    default = triton_step.default_tiling(shape.batch * KV_HEADS, shape.room, WIDTH, 2)
    tilings = {name_of(tiling): tiling for tiling in tilings_to_try(default.parts)}
    bench.measure({"xla": xla.step, "triton": triton_step.step} | {name: step_of(v) for name, v in tilings.items()})
    most = min(shape.room // 64, 64)
    parts = sorted({min(max(default.parts * times // 4, 1), most) for times in (1, 2, 8, 16)} - {default.parts})
    others = [tilings[name]._replace(parts=number) for name in bench.fastest(tilings)[:2] for number in parts]
    bench.measure({name_of(tiling): step_of(tiling) for tiling in others})


def step_of(tiling: Tiling) -> Callable:
    """The kernel with a tiling of one's own."""
    return functools.partial(triton_step.step, tiling=tiling)


def name_of(tiling: Tiling) -> str:
    """As it is given by --tiling."""
    return " ".join(map(str, tiling))


def main() -> None:
    """Checks, times, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--tiling", nargs=4, type=int, action="append", default=[])
    options = parse_on_gpu(parser)
    report = circumstances(options.commit) | {"step": {}}
    began = time.perf_counter()
    for shape in SHAPES:
        bench = Bench(shape)
        if options.tiling:
            own = [Tiling(*tiling) for tiling in options.tiling]
            bench.measure({"xla": xla.step, "triton": triton_step.step} | {name_of(v): step_of(v) for v in own})
        else:
            search(bench, shape)
        report["step"][str(shape)] = bench.row | {"bytes": bench.nbytes, "layers": bench.layers}
        options.json.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept, whatever comes next
        print_row(shape, bench, time.perf_counter() - began)


def print_row(shape: Shape, bench: Bench, seconds: float) -> None:
    """The copies, XLA, the default and the fastest tilings."""
    print(f"{shape}, {bench.layers} layers, {bench.nbytes / 1e6:.1f} MB, us (over copy); {seconds:.0f} s", flush=True)
    first = bench.fastest(name for name in ("copy", "triton copy", "xla", "triton") if name in bench.row)
    others = bench.fastest(name for name in bench.row if name not in first)
    for name in [*first, *others[:8]]:
        us = bench.row[name]["us"]
        mark = " <- best: parts, block, warps, stages" if others and name == others[0] else ""
        print(f"  {name:14s}{us:10.2f} ({us / bench.row['copy']['us']:.2f}){mark}", flush=True)


if __name__ == "__main__":
    main()
