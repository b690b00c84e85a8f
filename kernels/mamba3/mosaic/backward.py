"""The Mosaic GPU backward: its two kernels, and what is left to JAX."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..cotangents import Parts, phase_flow
from ..inputs import Inputs, Weights
from .forward import Operands, Prepared
from .gradients import FLOW, KEY, OVERLAP, QUERY, SCORE, TURN, TURNED_FLOW, Gradients, gradients
from .pieces import DECAY, OTHER, S, T
from .state_gradients import state_gradients

_MULTIPROCESSORS = 132  # of a large Hopper GPU; each runs one program of `gradients` at a time


def choose_block(batch: int, length: int, heads: int, groups: int) -> int:
    """How many heads of a group one program of `gradients` walks: as many as leave no multiprocessor idle.

    Every block of heads has sums of its own for the gradients of B, C and ω, to be written and added up afterwards.
    """
    per_group, chunks = heads // groups, batch * math.ceil(length / T)

    def cost(block: int) -> int:  # of the busiest multiprocessor; a program's two ends cost as much as a head
        return math.ceil(chunks * heads / block / _MULTIPROCESSORS) * (block + 1)

    return min((block for block in range(per_group, 0, -1) if per_group % block == 0), key=cost)


def choose_count(programs: int) -> int:
    """How many chunks one program takes in turn, so that every multiprocessor has one program."""
    return math.ceil(programs / _MULTIPROCESSORS)


def kernels(
    given: Operands, prepared: Prepared, chunk_ssm: jax.Array, dy: jax.Array, dssm: jax.Array | None,
    *, segments: int, interpret=None,
) -> tuple[Gradients, jax.Array]:  # fmt: skip
    """Parts of all gradients, and the whole one of H before the first token, [b, h, P, N] float32.

    Args:
      given: what the forward read.
      prepared: likewise.
      chunk_ssm: H before every chunk, as the forward saved it.
      dy: gradient of y, [b, l, h, P] bfloat16; l is a whole number of chunks.
      dssm: of H after the last token, [b, h, P, N] float32; None = zeros.
      segments: of the sequence, for `state_gradients`.
      interpret: parameters of the interpreter, if it is to run the kernels.
    """
    batch, length, heads, _ = dy.shape
    x, z, b, c, b_bias, c_bias, d = given
    how = {"segments": segments, "interpret": interpret}
    chunk_grad, first_grad = state_gradients(dy, z, c, prepared, c_bias, dssm, **how)
    found = gradients(
        x, z, dy, b, c, prepared, b_bias, c_bias, d, chunk_ssm, chunk_grad,
        block=choose_block(batch, length, heads, b.shape[2]), interpret=interpret,
    )  # fmt: skip
    return found, first_grad


def parts(
    inputs: Inputs, prepared: Prepared, found: Gradients, first_grad: jax.Array,
    ssm: jax.Array | None, dssm: jax.Array | None,
) -> Parts:  # fmt: skip
    """What `cotangents.combine` makes gradients of. `ssm`: H after the last token, needed with its gradient `dssm`."""
    batch, length, heads, _ = inputs.seq.x.shape
    weights = inputs.weights

    def vector(row: int) -> jax.Array:  # [b, h, chunks, T]
        return found.vectors[:, :, :, row]

    def whole(v: jax.Array) -> jax.Array:
        return v.reshape(batch, heads, -1)[:, :, :length]

    later = np.tri(T, dtype=np.float32)  # a step of the decay reaches every later position
    decay = jnp.einsum("bhmt,ts->bhms", vector(QUERY) - vector(KEY), later, precision=jax.lax.Precision.HIGHEST)
    log_scale = prepared.coefficients[:, :, :, DECAY] - prepared.coefficients[:, :, :, OTHER]
    turned = vector(TURNED_FLOW)
    decay_flow, phase_flows = vector(FLOW).sum(axis=-1), turned[..., S:] - turned[..., :S]
    # The kernel saw no H after the last chunk.
    last_decay = jnp.zeros_like(decay_flow[:, :, :1])
    last_phase = jnp.zeros_like(phase_flows[:, :, :1])
    if dssm is not None:
        last_decay = jnp.sum(dssm * ssm, axis=(-2, -1))[:, :, None]
        last_phase = phase_flow(dssm, ssm, S, paired=False)[:, :, None]
    of_weights = dict.fromkeys(Weights._fields)
    # The kernel has sums over the heads of a block up to each; differences are a head's own, to the sum's rounding.
    biases = found.biases.sum(axis=(0, 1)).reshape(found.b.shape[0], -1, *found.biases.shape[3:])
    biases = jnp.diff(biases, axis=1, prepend=0.0).reshape(heads, 2, -1)
    for which, name in enumerate(("b_bias", "c_bias")):
        if getattr(weights, name) is not None:
            of_weights[name] = biases[:, which, None]
    if weights.d is not None:
        of_weights["d"] = vector(OVERLAP).sum(axis=(0, 2, 3))
    return Parts(
        x=found.x[:, :length],
        z=None if found.z is None else found.z[:, :length],
        b=found.b[:, :, :length, None],
        c=found.c[:, :, :length, None],
        weights=Weights(**of_weights),
        decay=whole(decay),
        scale=whole(vector(KEY) * jnp.exp2(-log_scale)),
        gamma=whole(vector(SCORE) * vector(OVERLAP)),
        turn=whole(vector(TURN)),
        omega=found.omega[:, :, :length],
        decay_flow=jnp.concatenate([decay_flow[:, :, :-1], last_decay], axis=2),
        phase_flow=jnp.concatenate([phase_flows[:, :, :-1], last_phase], axis=2),
        ssm=None if inputs.ssm is None else first_grad,
        start_flow=None if inputs.ssm is None else phase_flow(first_grad, inputs.ssm, S, paired=False),
    )  # fmt: skip
