"""Times the products of a decode step beside what memory allows, and whole steps with them and with XLA's.

PYTHONPATH=. python experiments/latency/few_rows.py --json OUT [--rows 128] [--tiling COLUMNS DEPTH WARPS STAGES ...]

A product of configs/1b_siso.py is timed in a loop over the weights of so many layers that all come from memory, each of
which waits for the one before, as in a model. `copy` reads and writes half the weight's bytes each, `read` reads all of
them and keeps a number of each 16 KB: both are ceilings. `xla` is what XLA makes of product, norm, gate and residual,
`triton` the kernel, of several rows with XLA's norm before it and XLA's residual after it; with --tiling, as often as
wanted, other tilings too, with the number of parts as a fifth for several rows. Results are checked against float64
before they are timed. Programs compile in threads; one that does not is passed over. Then whole steps of the --models
with bfloat16 weights and states, XLA's products and the kernel's in turn, beside the floor as engine.py counts it.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from experiments.latency import engine
from experiments.latency.arguments import parse_on_gpu
from experiments.latency.scan import ceilings
from experiments.latency.step import TOLERANCE, layers_of, microseconds, relative_error, time_copy
from m3jax.circumstances import circumstances
from m3jax.kernels.few_rows import Sums, triton_product, triton_rows, xla
from m3jax.kernels.few_rows.form import Form
from m3jax.kernels.rms_norm import rms_norm
from m3jax.kernels.triton_launch import launch
from m3jax.models import linear

ROUNDS, CALLS = 20, 7
TURNS = 12
STEPS = 32  # of the whole model, in a call
EPSILON = 1e-5
READ = 8192  # numbers that a program reads


class Shape(NamedTuple):
    """A product of configs/1b_siso.py."""

    name: str
    inner: int
    outer: int
    norm: bool = False
    residual: bool = False
    gated: bool = False

    def form(self) -> Form:
        """What is computed beside the product."""
        return Form(EPSILON, self.gated)


SHAPES = (
    Shape("out_proj", 4096, 2048, residual=True),  # and the MLP's second
    Shape("in_proj", 2048, 8672, norm=True),
    Shape("fc1", 2048, 4096, norm=True, gated=True),
)
TIMES = {"out_proj": 2, "in_proj": 1, "fc1": 1}  # in a layer


@triton.jit
def _read(v_ptr, more_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.sum(tl.load(v_ptr + at).to(tl.float32), 0)
    tl.store(out_ptr + tl.program_id(0), total + tl.load(more_ptr))


def read(v: jax.Array, more: jax.Array) -> jax.Array:
    """Sums of READ numbers each, and more, [] float32."""
    programs = v.size // READ
    out = [jax.ShapeDtypeStruct((programs,), jnp.float32)]
    return launch(_read, [v, more], {}, out, (programs, 1, 1), 4, {"SIZE": READ})[0]


class Inputs(NamedTuple):
    """Of one product."""

    xs: jax.Array  # [ROUNDS, rows, in]: one for each round, so that no product can be taken out of the loop
    weights: list[jax.Array]
    scale: jax.Array | None
    residual: jax.Array | None


def make_weights(shape: Shape) -> list[jax.Array]:
    """Of as many layers as do not fit in the cache."""
    size = shape.inner, shape.outer * (1 + shape.gated)
    layers = layers_of(2 * 2 * size[0] * size[1])
    keys = jax.random.split(jax.random.key(1), layers)
    return [jax.random.normal(key, size, jnp.bfloat16) / np.sqrt(shape.inner).astype(jnp.bfloat16) for key in keys]


def make_inputs(shape: Shape, weights: list[jax.Array], rows: int) -> Inputs:
    """Random numbers in the dtypes of a model in bfloat16 with its residual stream in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_dtype = jnp.float32 if shape.norm else jnp.bfloat16
    return Inputs(
        jax.random.normal(keys[0], (ROUNDS, rows, shape.inner), x_dtype),
        weights,
        1 + jax.random.normal(keys[1], (shape.inner,), jnp.bfloat16) / 4 if shape.norm else None,
        jax.random.normal(keys[2], (rows, shape.outer), jnp.float32) if shape.residual else None,
    )


def exact_output(shape: Shape, inputs: Inputs, layer: int) -> np.ndarray:
    """What a layer's product is in the last round, in float64."""
    with jax.enable_x64(True):
        args = inputs.xs[-1], inputs.weights[layer], inputs.scale, inputs.residual
        wide = jax.tree.map(lambda v: v.astype(jnp.float64), args)
        return np.asarray(jax.jit(xla.product, static_argnames="form")(*wide, form=shape.form()))


def kernel(shape: Shape, tiling: triton_product.Tiling | triton_rows.Tiling | None) -> Callable:
    """The product as a function of x, weight, scale and residual, by a kernel laid out so."""

    def product(x: jax.Array, weight: jax.Array, scale: jax.Array | None, residual: jax.Array | None) -> jax.Array:
        if x.shape[0] == 1:
            return triton_product.product(x, weight, scale, residual, shape.form(), tiling)
        x = x if scale is None else rms_norm(x, scale, EPSILON, weight.dtype)
        return Sums(residual, triton_rows.product(x, weight, shape.gated, tiling)).added(weight.dtype)

    return product


def loop_over_layers(product: Callable) -> Callable:
    """(a result for each layer, inputs) → the same of ROUNDS rounds' last; product(x, weight, scale, residual)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(ys: list[jax.Array], inputs: Inputs) -> list[jax.Array]:
        def body(i: jax.Array, ys: list[jax.Array]) -> list[jax.Array]:
            x, last = inputs.xs[i], ys[-1]
            ys = []
            for weight in inputs.weights:
                x, last = jax.lax.optimization_barrier((x, last))  # else XLA makes one product of several
                last = product(x, weight, inputs.scale, inputs.residual)
                ys.append(last)
            return ys

        return jax.lax.fori_loop(0, ROUNDS, body, ys)

    return loop


class Bench:
    """One product: what is timed there, and how it went."""

    def __init__(self, shape: Shape, weights: list[jax.Array], rows: int):
        self.shape, self.inputs = shape, make_inputs(shape, weights, rows)
        self._exact = {layer: exact_output(shape, self.inputs, layer) for layer in {0, len(weights) - 1}}
        self.row: dict[str, dict] = {}

    def measure(self, products: dict[str, Callable]) -> None:
        """Compiles all of them at once, then checks and times one after another."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            programs = {name: threads.submit(self._compile, product) for name, product in products.items()}
        for name, program in programs.items():
            try:
                self.row[name] = self._time(program.result())
            except (AssertionError, RuntimeError, ValueError) as error:
                self.row[name] = {"failed": str(error).splitlines()[0][:200]}
                print(f"  {name}: {self.row[name]['failed']}", flush=True)

    def _compile(self, product: Callable) -> tuple[Callable, Callable]:
        loop = loop_over_layers(product)
        args = self.inputs.xs[0], self.inputs.weights[0], self.inputs.scale, self.inputs.residual
        one = jax.eval_shape(product, *args)

        def start() -> list[jax.Array]:
            return [jnp.zeros(one.shape, one.dtype) for _ in self.inputs.weights]

        return loop.lower(jax.eval_shape(start), self.inputs).compile(), start

    def _time(self, compiled: tuple[Callable, Callable]) -> dict[str, float]:
        program, start = compiled
        ys = program(start(), self.inputs)
        error = max(relative_error(ys[layer], exact) for layer, exact in self._exact.items())
        if not error <= 2 * TOLERANCE["bfloat16"]:  # roundings of x, of the product and of the gate
            raise AssertionError(f"y is off by {error}")
        steps = ROUNDS * len(ys)
        return microseconds(lambda ys: program(ys, self.inputs), ys, steps, CALLS) | {"error": error}


def time_ceilings(weights: list[jax.Array]) -> dict[str, dict[str, float]]:
    """The copy's and the read's times, for the bytes of one weight."""

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(sums: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
        def body(i: jax.Array, _: list[jax.Array]) -> list[jax.Array]:
            return [read(v.reshape(-1), i.astype(jnp.float32)) for v in weights]

        return jax.lax.fori_loop(0, ROUNDS, body, sums)

    sums = [jnp.zeros(v.size // READ) for v in weights]
    reading = microseconds(lambda sums: loop(sums, weights), sums, ROUNDS * len(weights), CALLS)
    return {"copy": time_copy(lambda v: v + 1, weights[0].nbytes, len(weights)), "read": reading}


def measure_products(own: list[list[int]], n_rows: int, save: Callable[[dict], None]) -> None:
    """All shapes; `save` is called with what there is after each."""
    kind = triton_product.Tiling if n_rows == 1 else triton_rows.Tiling
    tilings = {"triton": None} | {" ".join(map(str, tiling)): kind(*tiling) for tiling in own}
    rows: dict[str, dict] = {}
    for shape in SHAPES:
        weights = make_weights(shape)
        bench = Bench(shape, weights, n_rows)
        bench.measure({"xla": functools.partial(xla.product, form=shape.form())} | {
            name: kernel(shape, tiling) for name, tiling in tilings.items()
        })  # fmt: skip
        rows[shape.name] = time_ceilings(weights) | bench.row
        times = {name: v["us"] for name, v in rows[shape.name].items() if "us" in v}
        cells = (f"{name} {us:.2f} ({us / times['read']:.2f})" for name, us in times.items())
        print(f"{shape.name:9s}" + "  ".join(cells), flush=True)
        save(rows)  # what is measured is kept, whatever comes next
    for name in ("read", "xla", "triton"):
        us = sum(n * rows[shape][name].get("us", np.nan) for shape, n in TIMES.items())
        print(f"a layer's products, {name}: {us:.2f} us", flush=True)


def lower_step(model: Any, params: Any, rows: int, implementation: str | None) -> Any:
    """The program of 1 + STEPS steps: (params, token, state) → (logits of the last, token, state)."""

    def run(params: Any, token: jax.Array, state: Any) -> tuple:
        def step(_, carry: tuple) -> tuple:
            _, token, state = carry
            logits, state = model.apply({"params": params}, token, state, method="step")
            return logits, (7 * token + 1) % model.config.vocab_size, state

        return jax.lax.fori_loop(0, STEPS, step, step(0, (None, token, state)))

    state = jax.eval_shape(lambda: model.initial_state(rows, 1))
    with mock.patch.object(linear, "product_implementation", lambda _: implementation):
        return jax.jit(run, donate_argnums=2).lower(params, jax.ShapeDtypeStruct((rows,), jnp.int32), state)


def measure_model(name: str, rows: int, rate: float) -> dict[str, Any]:
    """Milliseconds of a step, the two kinds of products in turn; `rate`: of a copy, in TB/s."""
    model = engine.make_model(name, "bfloat16", quick=False)
    params = engine.make_params(model)
    floor = (engine.tree_bytes(params) + 2 * engine.tree_bytes(model.initial_state(rows, 1))) / rate / 1e9
    lowered = {"xla": lower_step(model, params, rows, "xla"), "triton": lower_step(model, params, rows, None)}
    with ThreadPoolExecutor(len(lowered)) as threads:
        programs = dict(zip(lowered, threads.map(lambda v: v.compile(), lowered.values()), strict=True))
    carries = {kind: run(params, jnp.arange(rows), model.initial_state(rows, 1)) for kind, run in programs.items()}
    error = relative_error(carries["triton"][0], carries["xla"][0])
    if not error <= engine.tolerance(model.config):
        raise AssertionError(f"{name}: logits are off by {error:.1e}")
    times: dict[str, list[float]] = {kind: [] for kind in programs}
    for _ in range(TURNS):
        for kind, run in programs.items():
            for warm in (True, False, False):
                start = time.perf_counter()
                carries[kind] = jax.block_until_ready(run(params, *carries[kind][1:]))
                if not warm:
                    times[kind].append(1e3 * (time.perf_counter() - start) / (STEPS + 1))
    row: dict[str, Any] = {"floor_ms": floor, "error": error}
    for kind, each in times.items():
        row[kind] = engine.spread(each)
        ms = row[kind]["median"]
        print(f"a step of {name}, {kind}: {ms:.3f} ms, {ms / floor:.3f} times the floor", flush=True)
    return row


def main() -> None:
    """Checks, times, prints lines and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--commit", help="what is measured, for the record")
    parser.add_argument("--rows", type=int, default=1, help="the batch")
    parser.add_argument("--tiling", nargs="+", type=int, action="append", default=[])
    parser.add_argument("--models", nargs="*", default=["siso", "mimo"], choices=list(engine.MODELS))
    options = parse_on_gpu(parser)
    report = circumstances(options.commit) | {"rows": options.rows, "whole": {}}

    def save(rows: dict[str, dict]) -> None:
        report["products"] = rows
        options.json.write_text(json.dumps(report, indent=1) + "\n")

    measure_products(options.tiling, options.rows, save)
    report["copy_TB_per_s"] = ceilings(width=256)["copy_TB_per_s"]
    for name in options.models:
        report["whole"][name] = measure_model(name, options.rows, report["copy_TB_per_s"])
        save(report["products"])


if __name__ == "__main__":
    main()
