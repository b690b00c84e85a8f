"""Compiles every Triton kernel for an NVIDIA GPU that need not be there, to PTX: lower_triton.py COMPUTE_CAPABILITY.

Run as a process of its own: the suite runs in Triton's interpreter, which is chosen where a kernel is defined. Prints
the bytes of shared memory each kernel takes, as JSON.
"""

import dataclasses
import functools
import json
import pickle
import sys
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax_triton import triton_lib

from experiments.latency import tune
from m3jax.kernels import (
    add_and_norm,
    cached_attention_step,
    few_rows_product,
    gated_delta_scan,
    gated_delta_step,
    gpu,
    mamba3_projected_step,
    mamba3_scan,
    mamba3_step,
    triton_by_xla,
)
from m3jax.kernels.few_rows import triton_rows
from m3jax.kernels.mamba3.inputs import Sequence
from m3jax.kernels.mamba3.triton import plans
from m3jax.kernels.mamba3.triton.step import heads_ahead
from m3jax.kernels.triton_launch import launch
from tests.kernels.cases import Case, make, make_projected, make_state, segments

IN_FLOAT32 = ("dt", "a", "lam", "omega")
PER_TOKEN = (*IN_FLOAT32, "x", "b", "c", "z")
# The widths of released models; and small ones, which compile sooner.
SISO = Case(b=1, l=300, h=2, p=64, n=128, g=1, s=32)
MIMO = dataclasses.replace(SISO, r=4)
STUDY = dataclasses.replace(SISO, n=64, s=16)  # m3jax/studies
SMALL_SISO = dataclasses.replace(SISO, p=16, n=32, s=8)
SMALL_MIMO = dataclasses.replace(SMALL_SISO, r=4, norm=True, omega_per_head=True)


def lower(function: Callable, *args) -> str:
    """Traces with the shapes of `args` and lowers for CUDA, which compiles the kernels; the lowered text."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def arguments(case: Case, dtype: str) -> dict[str, jax.Array]:
    """As a layer passes them: everything in `dtype` but step sizes, decays, weights of the trapezoid and rates."""
    return {name: jnp.asarray(v, "float32" if name in IN_FLOAT32 else dtype) for name, v in make(case).items()}


def lower_scan(case: Case, dtype: str, documents: bool, runs: int = 0) -> None:
    """Forward with every output, and the gradient of all of them; of so many runs under vmap."""
    options = {"implementation": "triton", "return_state": True, "segment_ids": segments(case) if documents else None}

    def both(args, state):
        (y, final), pullback = jax.vjp(lambda a, s: mamba3_scan(**a, initial_state=s, **options), args, state)
        return pullback((y, final))

    args = arguments(case, dtype), jax.tree.map(jnp.asarray, make_state(case, "float32"))
    if runs:
        args = jax.tree.map(lambda v: jnp.stack([v] * runs), args)
    text = lower(jax.vmap(both) if runs else both, *args)
    assert "stablehlo.while" not in text, "runs that follow one another"


def lower_layers() -> None:
    """Two layers of one shape: the program has every kernel once, and calls it twice."""
    args = arguments(SMALL_SISO, "bfloat16")

    def layer(x):
        return mamba3_scan(**(args | {"x": x}), implementation="triton")

    one, two = lower(layer, args["x"]), lower(lambda x: layer(layer(x)), args["x"])
    assert one.count("custom_call @triton_kernel_call_ffi") == two.count("custom_call @triton_kernel_call_ffi") > 0


def lower_timed_scan(shape: str, rank: int) -> None:
    """Forward and backward, MIMO in bfloat16, as tune.py's processes lower them and hand them over."""
    args = jax.eval_shape(lambda: tune.timed_inputs(shape, rank))
    plan = plans.rules(Sequence(**{name: args[0].get(name) for name in Sequence._fields}))
    lowered = pickle.loads(pickle.dumps(tune.lower(plan, shape, rank)))
    assert lower(lowered.call, *args).count("custom_call @triton_kernel_call_ffi") > 8  # segments: some run twice


def lower_step(case: Case, dtype: str) -> None:
    """One token, alone and under vmap, and in bfloat16 from its projection; the state in `dtype` too."""
    tokens = {name: v[:, 0] if name in PER_TOKEN else v for name, v in arguments(case, dtype).items()}
    state = jax.tree.map(jnp.asarray, make_state(case, "float32"))
    state = state._replace(ssm=state.ssm.astype(dtype), x=state.x.astype(dtype))

    def step(tokens, state):
        return mamba3_step(**tokens, state=state, implementation="triton")

    lower(step, tokens, state)
    several = jax.tree.map(lambda v: jnp.stack([v] * 3), state)
    lower(jax.vmap(step, in_axes=(None, 0)), tokens, several)
    if dtype == "bfloat16":
        args = {name: jnp.asarray(v, dtype) for name, v in make_projected(case).items()}
        lower(lambda args, state: mamba3_projected_step(**args, state=state, implementation="triton"), args, state)


def lower_step_of_many_states() -> None:
    """Programs call states into the cache where the device can: another would refuse the instruction."""
    case = dataclasses.replace(SISO, b=32, h=64, l=1)

    def inputs():
        tokens = {name: v[:, 0] if name in PER_TOKEN else v for name, v in arguments(case, "float32").items()}
        return tokens, make_state(case, "float32")

    tokens, state = jax.eval_shape(inputs)
    assert (heads_ahead(state.ssm) > 0) == (gpu.compute_capability() >= 90)
    lower(lambda tokens, state: mamba3_step(**tokens, state=state, implementation="triton"), tokens, state)


def lower_gated_delta(dtype: str) -> None:
    """Forward and backward at the widths of the configs."""
    lead, n, p = (1, 130, 2), 128, 256
    q, k, v = (jnp.zeros((*lead, width), dtype) for width in (n, n, p))
    log_decay, beta = jnp.zeros((2, *lead))

    def both(*args):
        o, pullback = jax.vjp(lambda *args: gated_delta_scan(*args, implementation="triton"), *args)
        return pullback(o)

    lower(both, q, k, v, log_decay, beta)


def lower_gated_delta_step(dtype: str) -> None:
    """One token at the widths of the configs, the state in `dtype` too and in place; alone and under vmap."""
    lead, n, p = (3, 2), 128, 256
    q, k, v = (jnp.zeros((*lead, width), dtype) for width in (n, n, p))
    args = q, k, v, *jnp.zeros((2, *lead)), jnp.zeros((*lead, p, n), dtype)

    def step(*args):
        return gated_delta_step(*args, unit_eps=1e-6, implementation="triton")

    for text in (lower(step, *args), lower(jax.vmap(step), *(jnp.stack([v] * 3) for v in args))):
        assert text.count("custom_call @triton_kernel_call_ffi") == 1 and "output_operand_alias" in text


def lower_cached_attention(dtype: str) -> None:
    """One token at the narrowest, the configs' and the greatest width, in place; alone and under vmap."""

    def step(*args):
        return cached_attention_step(*args, implementation="triton")

    for batch, kv, group, width, room in ((130, 8, 4, 64, 300), (1, 2, 1, 256, 600), (1, 1, 32, 16, 600)):
        new, cache = jnp.zeros((batch, kv, width), dtype), jnp.zeros((batch, kv, room, width), dtype)
        none = jnp.zeros(batch, jnp.int32)
        args = jnp.zeros((batch, kv * group, width), dtype), new, new, cache, cache, none, none
        for text in (lower(step, *args), lower(jax.vmap(step), *(jnp.stack([v] * 3) for v in args))):
            assert text.count("custom_call @triton_kernel_call_ffi") == 1 + (room > 512)  # parts to be put together
            assert text.count("output_operand_alias<output_tuple_indices") == 2


def lower_few_rows(dtype: str) -> None:
    """The products of a layer at widths of the configs, and a narrow one with a gate."""
    wide, long = jnp.zeros((1, 2048)), jnp.zeros((1, 4096), dtype)
    into, out_of, scale = (jnp.zeros(shape, dtype) for shape in ((2048, 8672), (4096, 2048), (2048,)))
    for x, weight, options in (
        (wide, into, {"scale": scale}),
        (wide, into[:, :8192], {"scale": scale, "gated": True}),
        (wide, into[:, :2048], {"scale": scale, "gated": True}),
        (long, out_of, {"residual": wide}),
    ):
        text = lower(functools.partial(few_rows_product, implementation="triton", **options), x, weight)
        assert text.count("custom_call @triton_kernel_call_ffi") == 1


def lower_several_rows() -> None:
    """The same products of as many rows as there may be and of few, and what is left pending."""
    into, out_of, scale = (jnp.zeros(shape, jnp.bfloat16) for shape in ((2048, 8672), (4096, 2048), (2048,)))
    for rows in (128, 5):
        wide, long = jnp.zeros((rows, 2048)), jnp.zeros((rows, 4096), jnp.bfloat16)
        for x, weight, options in ((wide, into, {"scale": scale}), (wide, into[:, :8192], {"gated": True})):
            text = lower(functools.partial(few_rows_product, implementation="triton", **options), x, weight)
            assert text.count("custom_call @triton_kernel_call_ffi") == 1

        def add(x, residual):
            sums = few_rows_product(x, out_of, residual=residual, pending=True, implementation="triton")
            return add_and_norm(sums, scale, 1e-5, jnp.bfloat16)

        assert lower(add, long, wide).count("custom_call @triton_kernel_call_ffi") == 2


@mock.patch.object(triton_by_xla, "available", lambda: True)
def lower_by_xla(case: Case) -> None:
    """One row's step from its projection, in place, and its product by XLA; the step of two rows as ever."""

    def lowered_step(rows):
        wider = dataclasses.replace(case, b=rows)
        args = {name: jnp.asarray(v, "bfloat16") for name, v in make_projected(wider).items()}
        state = jax.tree.map(jnp.asarray, make_state(wider, "bfloat16"))
        return lower(lambda a, state: mamba3_projected_step(**a, state=state, implementation="triton"), args, state)

    def product(x):
        return few_rows_product(x, weight, scale=x[0], residual=x, implementation="triton")

    weight, step = jnp.zeros((2048, 2048), jnp.bfloat16), lowered_step(1)
    assert "output_operand_alias" in step
    for text in (step, lower(product, jnp.zeros((1, 2048)))):
        assert "triton_kernel_call_ffi" not in text
        (kernel,) = text.split("custom_call @__gpu$xla.gpu.triton")[1:]
        # It waits for the one before, and only then lets the next one start, and reads.
        events = ["griddepcontrol.wait", "griddepcontrol.launch_dependents", "tt.load"]
        assert sorted(events, key=kernel.index) == events
    assert "__gpu$xla.gpu.triton" not in lowered_step(2)


@triton.jit
def _add_one(v_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(v_ptr + at) + 1)


def lower_aliases() -> None:
    """A launch in place, under vmap, in the interface that CUDA graphs can contain."""

    def add_one(v):
        return launch(_add_one, [v], {}, [jax.ShapeDtypeStruct(v.shape, v.dtype)], (1, 1, 1), 1, {"SIZE": 64}, {0: 0})

    text = lower(jax.vmap(add_one), jnp.zeros((3, 64)))
    assert "custom_call @triton_kernel_call_ffi" in text and "api_version = 4" in text


def main() -> None:
    """Lowers everything."""
    capability = int(sys.argv[1])
    taken: dict[str, int] = {}
    compile_kernel = triton_lib.compile_ttir_inplace

    def recorded(*args):
        result = compile_kernel(*args)
        taken[result.name] = max(taken.get(result.name, 0), result.shared_mem_bytes)
        return result

    triton_lib.compile_ttir_inplace = recorded
    triton_lib.triton_kernel_call_lib.get_compute_capability = lambda device: capability
    for module in (gpu, plans, triton_rows):
        module.compute_capability = lambda: capability
    gpu.jax.default_backend = lambda: "gpu"
    lower_scan(SISO, "bfloat16", documents=False)
    if capability < 100:
        lower_scan(SMALL_SISO if capability == 90 else SMALL_MIMO, "float32", documents=True)
    if capability == 90:
        lower_timed_scan("B1 L2048", rank=4)
        with jax.default_matmul_precision("tensorfloat32"):
            lower_scan(STUDY, "float32", documents=True, runs=2)
        lower_layers()
    lower_step(SISO, "float32")
    lower_step(MIMO, "bfloat16")
    lower_gated_delta_step("bfloat16")
    lower_step_of_many_states()
    if capability == 90:
        lower_step(SISO, "bfloat16")
        lower_step(MIMO, "float32")
        lower_gated_delta_step("float32")
        lower_several_rows()
        lower_by_xla(SISO)
        lower_by_xla(MIMO)
    lower_gated_delta("float32" if capability == 80 else "bfloat16")  # the most memory where there is the least
    lower_cached_attention("float32" if capability == 80 else "bfloat16")
    lower_few_rows("float32" if capability == 80 else "bfloat16")
    lower_aliases()
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
