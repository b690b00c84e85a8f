"""Launching Triton kernels from JAX: the one place that knows jax-triton.

jax-triton 0.3 writes calls of XLA's first interface for kernels of others. There every launch hashes and compares the
whole compressed kernel, tens of kilobytes, and no CUDA graph can contain it. jaxlib has the same call in XLA's present
interface, in which the kernel is prepared once; what it needs to know is the same, so the call is rewritten.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax_triton
from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir

from . import triton_by_xla

TARGET = "triton_kernel_call_ffi"  # registered by jaxlib
_TYPED_FFI = 4  # the number of XLA's present interface
_MAX_GRID_AXIS = 65535  # CUDA's, of the second and third axis
MAX_ELEMENTS = 2**31  # of arrays whose offsets are int32


def batch_too_large(batch: int) -> str | None:
    """Why a grid with the batch on its second or third axis is not possible; None if it is."""
    if batch > _MAX_GRID_AXIS:
        return f"the batch is {batch}; the Triton kernels take up to {_MAX_GRID_AXIS}: split it"
    return None


# Calls with another target, of whoever else uses jax-triton here, stay as they are.
def _lower(ctx: mlir.LoweringRuleContext, *args: ir.Value, **params) -> list[ir.Value]:
    if params["custom_call_target_name"] == triton_by_xla.TARGET:
        return triton_by_xla.lower(ctx, *args, **params)
    results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *args, **params)
    if params["custom_call_target_name"] == TARGET:
        attributes = results[0].owner.attributes
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["api_version"] = mlir.i32_attr(_TYPED_FFI)
    return results


mlir.register_lowering(triton_lib.triton_kernel_call_p, _lower, platform="cuda")


def launch(
    kernel, args: Sequence[jax.Array], scalars: dict[str, int | float], out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int], warps: int, constants: dict[str, object],
    aliases: dict[int, int] | None = None, batch_axis: int | None = None,
) -> list[jax.Array]:  # fmt: skip
    """Calls a kernel whose parameters are arrays, run-time scalars, outputs and constants, in this order.

    `aliases`: array number → number of the output that takes its memory. XLA first copies arrays still needed later.
    `batch_axis`: the axis of the grid that goes over rows. Under vmap over r runs one launch serves all of them: that
    axis of the grid and the first axis of every array are r times as long, run after run, and nothing else changes: a
    kernel finds the run of a row by the number of rows of one run. None: the launches of the runs follow one another.
    A constant EARLY that is true: by XLA (triton_by_xla.py).
    """

    def call(*args: jax.Array) -> list[jax.Array]:
        return call_kernel(kernel, args, scalars, out, grid, warps, constants, aliases)

    mapped_call = jax.custom_batching.custom_vmap(call)

    @mapped_call.def_vmap
    def several(runs: int, mapped: list[bool], *args: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        if batch_axis is None or _too_large(runs, batch_axis, grid, [*args, *out]):
            axes = [0 if is_mapped else None for is_mapped in mapped]
            return jax.vmap(jax.custom_batching.sequential_vmap(call), axes)(*args), [True] * len(out)
        every = [v if of else jnp.broadcast_to(v, (runs, *v.shape)) for v, of in zip(args, mapped, strict=True)]
        longer = tuple(n * runs if axis == batch_axis else n for axis, n in enumerate(grid))
        results = launch(
            kernel, [v.reshape(runs * v.shape[1], *v.shape[2:]) for v in every], scalars,
            [jax.ShapeDtypeStruct((runs * v.shape[0], *v.shape[1:]), v.dtype) for v in out],
            longer, warps, constants, aliases, batch_axis,
        )  # fmt: skip
        return [v.reshape(runs, *of.shape) for v, of in zip(results, out, strict=True)], [True] * len(out)

    return mapped_call(*args)


def _too_large(runs: int, batch_axis: int, grid: tuple[int, int, int], arrays: Sequence) -> bool:
    """Whether one launch for all runs would have too many programs, or offsets beyond int32."""
    programs = runs * grid[batch_axis]
    return (batch_axis > 0 and programs > _MAX_GRID_AXIS) or max(runs * v.size for v in arrays) >= MAX_ELEMENTS


def call_kernel(kernel, args, scalars, out, grid, warps, constants, aliases) -> list[jax.Array]:
    """The call itself, arguments as in `launch`."""
    return jax_triton.triton_call(
        *args, *scalars.values(), kernel=kernel, out_shape=list(out), grid=grid, num_warps=warps, num_stages=1,
        input_output_aliases=aliases,
        custom_call_target_name=triton_by_xla.TARGET if constants.get("EARLY") else TARGET, **constants,
    )  # fmt: skip
