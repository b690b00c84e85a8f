"""Lowers the Mosaic GPU scan for a GPU that need not be there: forward and gradient, also under vmap and checkpoint.

Run as a process of its own: the suite runs Triton in its interpreter. Prints the names of the custom calls of each.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax_triton import triton_lib

from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.mosaic import scan
from m3jax.kernels.mamba3.state import Mamba3State

BATCH, HEADS = 1, 4


def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def arguments(length: int, rank: int = 1) -> tuple[Sequence, Weights, Mamba3State]:
    """Shapes of what a layer passes; more heads would only take longer."""
    x = shape(BATCH, length, HEADS, 64, dtype=jnp.bfloat16)
    b = shape(BATCH, length, rank, 1, 128, dtype=jnp.bfloat16)
    dt, bias = shape(BATCH, length, HEADS), shape(HEADS, rank, 128)
    mimo = (None if rank == 1 else shape(HEADS, rank, 64),) * 3
    seq = Sequence(x, dt, dt, b, b, dt, shape(BATCH, length, 32), x)
    state = Mamba3State(
        shape(BATCH, HEADS, 32), shape(BATCH, HEADS, 64, 128), shape(BATCH, HEADS, rank, 128),
        shape(BATCH, HEADS, 64, dtype=jnp.bfloat16),
    )  # fmt: skip
    return seq, Weights(bias, bias, *mimo, shape(HEADS), None), state


def with_norm(given: tuple[Sequence, Weights, Mamba3State]) -> tuple[Sequence, Weights, Mamba3State]:
    """The same with a norm before the gate."""
    seq, weights, state = given
    return seq, weights._replace(norm_weight=shape(HEADS, 64)), state


def run(seq: Sequence, weights: Weights, state: Mamba3State, documents: jax.Array | None = None):
    return scan.scan(None, seq, weights, state, documents, 1e-5)


def run_twice(seq: Sequence, weights: Weights, state: Mamba3State):
    """Two layers of the same shape; both states, for what nobody wants is left out, and then they differ."""
    y, first = run(seq, weights, state)
    return run(seq._replace(x=y), weights, state), first


def loss(*args) -> jax.Array:
    return sum(jnp.sum(v.astype(jnp.float32)) for v in jax.tree.leaves(run(*args)))


def calls(function, *args) -> list[str]:
    """Custom calls to kernels, in the lowered program's order."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(triton_kernel_call|mosaic_gpu\w*)", text)


def main() -> None:
    """Lowers each, for compute capability 9.0."""
    triton_lib.triton_kernel_call_lib.get_compute_capability = lambda device: 90
    one_chunk, rest = arguments(64), arguments(200)
    mimo = arguments(16, rank=2)
    several, several_mimo = (jax.tree.map(lambda v: shape(2, *v.shape, dtype=v.dtype), v) for v in (one_chunk, mimo))
    print(json.dumps({
        "one chunk": calls(run, *one_chunk),
        "segments": calls(run, *rest),
        "two layers": calls(run_twice, *one_chunk),
        "documents": calls(run, *one_chunk, shape(BATCH, 64, dtype=jnp.int32)),
        "vmap": calls(jax.vmap(run), *several),
        "gradient": calls(jax.grad(loss, argnums=(0, 1, 2)), *one_chunk),
        "gradient of segments": calls(jax.grad(loss), *rest, shape(BATCH, 200, dtype=jnp.int32)),
        "gradient under vmap": calls(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))), *several),
        "gradient under checkpoint": calls(jax.value_and_grad(jax.checkpoint(loss)), *one_chunk),
        "gradient with norm": calls(jax.grad(loss, argnums=(0, 1, 2)), *with_norm(one_chunk)),
        "mimo": calls(run, *arguments(70, rank=2), shape(BATCH, 70, dtype=jnp.int32)),
        "mimo gradient under vmap and checkpoint": calls(
            jax.vmap(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2))), *several_mimo
        ),
        "mimo gradient with norm": calls(jax.grad(loss), *with_norm(arguments(16, rank=4))),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
