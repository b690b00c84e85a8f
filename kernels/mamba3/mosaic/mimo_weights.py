"""Weights of MIMO heads by rank, as the Mosaic GPU kernels read them."""

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .pieces import P

MIMO_X, MIMO_Z, MIMO_O = range(3)
PAIRS = 4  # in 16 bytes of bfloat16
HALVES = 2  # of a row of biases: what rotates, and the rest
_LINE = 128  # bytes of the first-level cache


class Packed(NamedTuple):
    """What `pack` returns."""

    biases: jax.Array  # [h, r, HALVES, 64] float32: of B, then of C, two bfloat16 numbers to each 32 bits
    mimo: jax.Array  # mimo_x, half of mimo_z, mimo_o: [h, 3, r, P] float32


def pack(b_bias, c_bias, mimo_x, mimo_z, mimo_o) -> Packed:
    """Of weights [h, r, n or p].

    Of the biases a thread finds columns 8 j + 2 q + {0, 1} with the same q side by side, up to 16 bytes. Their rounding
    to bfloat16 is no larger than that of a rotated row.
    """
    halves = [[v[..., part].astype(jnp.bfloat16) for v in (b_bias, c_bias)] for part in (slice(P), slice(P, None))]
    biases = jnp.stack([jnp.concatenate([_in_pieces(v) for v in half], axis=-1) for half in halves], axis=2)
    biases = lax.bitcast_convert_type(biases.reshape(*biases.shape[:-1], P, 2), jnp.float32)
    return Packed(biases, jnp.stack([mimo_x, mimo_z / 2, mimo_o], axis=1).astype(jnp.float32))


def _in_pieces(v: jax.Array) -> jax.Array:
    return jnp.swapaxes(v.reshape(*v.shape[:-1], 8 // PAIRS, PAIRS, 4, 2), -3, -2).reshape(v.shape)


def unpack_biases(v: jax.Array) -> jax.Array:
    """A packed row [64] as `pack` was given it, of B and C: [2, 64] bfloat16."""
    v = lax.bitcast_convert_type(v, jnp.bfloat16).reshape(2, 8 // PAIRS, 4, PAIRS, 2)
    return jnp.swapaxes(v, 2, 3).reshape(2, P)


def touch(ref, simulated: bool) -> None:
    """Lets weights in global memory be in the first-level cache soon, by a load of every line that no one waits for.

    Every thread of the warpgroup takes a line, as far as there are any.
    """
    if simulated:
        return
    lines = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize // _LINE

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(ctx, memory):
        i32, i8 = (ir.IntegerType.get_signless(k) for k in (32, 8))
        thread = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(127, i32))
        at = arith.muli(thread, mgpu.utils.c(_LINE, i32))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(memory), [at], i8)
        is_one = f"setp.lt.s32 p, $1, {lines};"
        code = f"{{ .reg .pred p; .reg .b32 v; {is_one} @p ld.global.ca.b32 v, [$0]; }}"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [pointer, thread], code, "l,r", has_side_effects=True)

    inline(ref)
