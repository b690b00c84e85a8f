"""The Mosaic GPU MIMO backward: its kernels, and what is left to JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from ..cotangents import Parts, phase_flow
from ..inputs import Inputs, Weights
from .backward import choose_block, choose_count
from .forward import Prepared
from .mimo_forward import Operands
from .mimo_gradients import Gradients, gradients
from .mimo_head_gradients import (
    ALONG,
    FLOW,
    KEYS,
    OF_O,
    OF_X,
    OF_Z,
    OVERLAP,
    QUERIES,
    SAME,
    THROUGH,
    TURN,
    TURNED_FLOW,
    WITHIN,
)
from .mimo_pieces import positions
from .mimo_state_gradients import state_gradients
from .pieces import DECAY, OTHER, OWN, N, S


def kernels(
    given: Operands, prepared: Prepared, chunk_ssm: jax.Array, dy: jax.Array, dssm: jax.Array | None,
    *, segments: int, interpret=None,
) -> tuple[Gradients, jax.Array]:  # fmt: skip
    """Parts of all gradients, and the whole one of H before the first token, [b, h, P, N] float32.

    Args:
      given: what the forward read.
      prepared: likewise.
      chunk_ssm: H before every chunk, as the forward saved it.
      dy: gradient of y, [b, l, h, P] bfloat16 or, without gate, in rows; l is a whole number of chunks.
      dssm: of H after the last token, [b, h, P, N] float32; None = zeros.
      segments: of the sequence, for `state_gradients`.
      interpret: parameters of the interpreter, if it is to run the kernels.
    """
    x, z, b, c, weights, d = given
    batch, length, heads, _ = x.shape
    chunk_grad, first_grad = state_gradients(dy, z, c, prepared, weights, dssm, segments=segments, interpret=interpret)
    ranks = c.shape[2]
    block = choose_block(batch, length * ranks, heads, b.shape[3])  # of rows, as many to a chunk as there
    count = choose_count(batch * length // positions(ranks) * (heads // block))
    found = gradients(
        x, z, dy, b, c, prepared, weights, d, chunk_ssm, chunk_grad, block=block, count=count, interpret=interpret
    )
    return found, first_grad


def parts(
    inputs: Inputs, prepared: Prepared, found: Gradients, first_grad: jax.Array,
    ssm: jax.Array | None, dssm: jax.Array | None,
) -> Parts:  # fmt: skip
    """What `cotangents.combine` makes gradients of. `ssm`: H after the last token, needed with its gradient `dssm`."""
    batch, length, heads, _ = inputs.seq.x.shape
    ranks, weights = inputs.seq.b.shape[2], inputs.weights
    span, pairs = positions(ranks), ranks // 2
    # [b, h, chunks, kinds, T]
    vectors = found.vectors.reshape(*found.vectors.shape[:-1], pairs, span).sum(axis=-2)

    def vector(row: int) -> jax.Array:  # [b, h, chunks, T]
        return vectors[:, :, :, row]

    def whole(v: jax.Array) -> jax.Array:
        return v.reshape(batch, heads, -1)[:, :, :length]

    def down(side: int) -> jax.Array:
        v = found.down[:, side]  # [blocks, b, chunks, 2, 32, N]
        v = v.reshape(*v.shape[:4], pairs, span, N).transpose(0, 1, 2, 5, 4, 3, 6)
        return v.reshape(v.shape[0], batch, -1, ranks, N)[:, :, :length]

    def of_weight(v: jax.Array) -> jax.Array:  # [programs, h, .., RANKS] → [h, r, width]
        return jnp.swapaxes(v.sum(axis=0).reshape(heads, -1, v.shape[-1])[..., :ranks], 1, 2)

    later = np.tri(span, dtype=np.float32)  # a step of the decay reaches every later position
    # Which no step of the decay scales: it is in ALONG, but not in WITHIN.
    own, same = prepared.coefficients[:, :, :, OWN], vector(SAME)
    of_keys = vector(THROUGH) + vector(WITHIN)
    along = vector(ALONG) - same * jnp.exp2(own) - of_keys
    decay = jnp.einsum("bhmt,ts->bhms", along, later, precision=jax.lax.Precision.HIGHEST)
    log_scale = prepared.coefficients[:, :, :, DECAY] - prepared.coefficients[:, :, :, OTHER]
    # Of H after a chunk: of what was before, and of what the chunk's keys have added.
    passing = jnp.exp2(prepared.coefficients[:, :, :, DECAY, -1])
    turned = found.flows[:, :, :, TURNED_FLOW]
    decay_flow = passing * found.flows[:, :, :, FLOW].sum(axis=-1) + vector(THROUGH).sum(axis=-1)
    phase_flows = passing[..., None] * (turned[..., S:] - turned[..., :S]) + found.turned
    # H after the last chunk is known as it stands.
    last_decay = jnp.zeros_like(decay_flow[:, :, :1])
    last_phase = jnp.zeros_like(phase_flows[:, :, :1])
    if dssm is not None:
        last_decay = jnp.sum(dssm * ssm, axis=(-2, -1))[:, :, None]
        last_phase = phase_flow(dssm, ssm, S, paired=False)[:, :, None]
    of_weights = {
        "b_bias": of_weight(found.biases[:, :, KEYS]),
        "c_bias": of_weight(found.biases[:, :, QUERIES]),
        "mimo_x": of_weight(found.mimo[:, :, OF_X]),
        "mimo_z": of_weight(found.mimo[:, :, OF_Z]),
        "mimo_o": of_weight(found.mimo[:, :, OF_O]),
        "d": vector(OVERLAP).sum(axis=(0, 2, 3)),
        "norm_weight": None,
    }
    of_weights = {name: None if getattr(weights, name) is None else v for name, v in of_weights.items()}
    return Parts(
        x=found.x[:, :length],
        z=None if found.z is None else found.z[:, :length],
        b=down(KEYS),
        c=down(QUERIES),
        weights=Weights(**of_weights),
        decay=whole(decay),
        scale=whole(of_keys * jnp.exp2(-log_scale)),
        gamma=whole(same),
        turn=whole(vector(TURN[QUERIES]) + vector(TURN[KEYS])),
        omega=found.omega.sum(axis=1)[:, :, :length],
        decay_flow=jnp.concatenate([decay_flow[:, :, :-1], last_decay], axis=2),
        phase_flow=jnp.concatenate([phase_flows[:, :, :-1], last_phase], axis=2),
        ssm=None if inputs.ssm is None else first_grad,
        start_flow=None if inputs.ssm is None else phase_flow(first_grad, inputs.ssm, S, paired=False),
    )  # fmt: skip
