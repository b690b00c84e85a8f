"""Launching Triton kernels from JAX: the one place that knows jax-triton."""

from collections.abc import Sequence

import jax
import jax_triton

_MAX_GRID_AXIS = 65535  # CUDA's, of the second and third axis


def batch_too_large(batch: int) -> str | None:
    """Why a grid with the batch on its second or third axis is not possible; None if it is."""
    if batch > _MAX_GRID_AXIS:
        return f"the batch is {batch}; the Triton kernels take up to {_MAX_GRID_AXIS}: split it"
    return None


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
            input_output_aliases=aliases, **constants,
        )  # fmt: skip

    return call(*args)
