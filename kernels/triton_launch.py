"""Launching Triton kernels from JAX: the one place that knows jax-triton.

jax-triton 0.3 writes calls of XLA's first interface for kernels of others. There every launch hashes and compares the
whole compressed kernel, tens of kilobytes, and no CUDA graph can contain it. jaxlib has the same call in XLA's present
interface, in which the kernel is prepared once; what it needs to know is the same, so the call is rewritten.
"""

from collections.abc import Sequence

import jax
import jax_triton
from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir

_TARGET = "triton_kernel_call_ffi"  # registered by jaxlib
_TYPED_FFI = 4  # the number of XLA's present interface
_MAX_GRID_AXIS = 65535  # CUDA's, of the second and third axis


def batch_too_large(batch: int) -> str | None:
    """Why a grid with the batch on its second or third axis is not possible; None if it is."""
    if batch > _MAX_GRID_AXIS:
        return f"the batch is {batch}; the Triton kernels take up to {_MAX_GRID_AXIS}: split it"
    return None


# Calls with another target, of whoever else uses jax-triton here, stay as they are.
def _lower(ctx: mlir.LoweringRuleContext, *args: ir.Value, **params) -> list[ir.Value]:
    results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *args, **params)
    if params["custom_call_target_name"] == _TARGET:
        attributes = results[0].owner.attributes
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["api_version"] = mlir.i32_attr(_TYPED_FFI)
    return results


mlir.register_lowering(triton_lib.triton_kernel_call_p, _lower, platform="cuda")


def launch(
    kernel, args: Sequence[jax.Array], scalars: dict[str, int | float], out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int], warps: int, constants: dict[str, object],
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:  # fmt: skip
    """Calls a kernel whose parameters are arrays, run-time scalars, outputs and constants, in this order.

    `aliases`: array number → number of the output that takes its memory. XLA first copies arrays still needed later.
    Under vmap the launches follow one another.
    """

    @jax.custom_batching.sequential_vmap
    def call(*args: jax.Array) -> list[jax.Array]:
        return jax_triton.triton_call(
            *args, *scalars.values(), kernel=kernel, out_shape=list(out), grid=grid, num_warps=warps, num_stages=1,
            input_output_aliases=aliases, custom_call_target_name=_TARGET, **constants,
        )  # fmt: skip

    return call(*args)
