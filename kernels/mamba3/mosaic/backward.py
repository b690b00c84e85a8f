"""The Mosaic GPU backward: its two kernels, and those that make gradients of the inputs of what they leave."""

import math

import jax
import jax.numpy as jnp

from ...triton_launch import launch
from ..cotangents import gathered, of_later_phases, phase_flow
from ..inputs import Inputs, Sequence, Weights
from .finish import coefficient_gradients, sum_blocks, weight_gradients
from .forward import Operands, Prepared
from .gradients import FLOW, KEY, OVERLAP, QUERY, SCORE, TURN, VECTORS, Gradients, gradients
from .pieces import N, S, T
from .state_gradients import state_gradients

# Of the kernels in finish.py: heads of a program, rows and columns of a tile of the biases' parts, rows of a sum over
# blocks, warps.
_HEADS, _TILE, _ROWS, _WARPS = 8, (64, 64), 8, 4
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
    *, segments: int, first: bool, interpret=None,
) -> tuple[Gradients, jax.Array | None]:  # fmt: skip
    """Parts of all gradients, and the whole one of H before the first token, [b, h, P, N] float32, if wanted.

    Args:
      given: what the forward read.
      prepared: likewise.
      chunk_ssm: H before every chunk, as the forward saved it.
      dy: gradient of y, [b, l, h, P] bfloat16; l is a whole number of chunks.
      dssm: of H after the last token, [b, h, P, N] float32; None = zeros.
      segments: of the sequence, for `state_gradients`.
      first: whether a state comes in, so that the latter is wanted.
      interpret: parameters of the interpreter, if it is to run the kernels.
    """
    batch, length, heads, _ = dy.shape
    x, z, b, c, b_bias, c_bias, d = given
    how = {"segments": segments, "first": first, "interpret": interpret}
    chunk_grad, first_grad = state_gradients(dy, z, c, prepared, c_bias, dssm, **how)
    found = gradients(
        x, z, dy, b, c, prepared, b_bias, c_bias, d, chunk_ssm, chunk_grad,
        block=choose_block(batch, length, heads, b.shape[2]), interpret=interpret,
    )  # fmt: skip
    return found, first_grad


def combine(
    inputs: Inputs, found: Gradients, first_grad: jax.Array | None,
    ssm: jax.Array | None, dssm: jax.Array | None, dphase: jax.Array | None,
) -> Inputs:  # fmt: skip
    """Gradients of the inputs.

    Args:
      inputs: of the scan.
      found: what `kernels` found.
      first_grad: likewise.
      ssm: H after the last token, needed with its gradient.
      dssm: gradient of that, [b, h, P, N]; None = zeros, as is the next.
      dphase: gradient of the phase after the last token, [b, h, S].
    """
    seq, length = inputs.seq, inputs.seq.x.shape[1]
    last_decay = None if dssm is None else jnp.sum(dssm * ssm, axis=(-2, -1))
    ddt, da, dlam, skips = _of_coefficients(inputs, found.vectors, last_decay)
    db, dc, domega = (v[:, :length] for v in _over_blocks(found, seq.b.shape[3], seq.b.dtype))
    dstart = None if inputs.phase is None else jnp.zeros_like(inputs.phase)
    if dssm is not None:
        # The kernel knows nothing of what is left after the last token: H, which turns with all phases (those of the
        # last chunk have their part of that as it is), and the last phase itself.
        last = dphase + phase_flow(dssm, ssm, S, paired=False)
        beyond = jnp.stack([last] * (found.vectors.shape[2] - 1) + [dphase], axis=2)
        step, turned = of_later_phases(seq, beyond, T)
        domega, ddt = domega + step, ddt + turned
        dstart = None if dstart is None else last
    if inputs.ssm is not None:
        dstart = dstart - phase_flow(first_grad, inputs.ssm, S, paired=False)
    b_bias, c_bias, d = _of_weights(found.biases, skips, seq.x.shape[2] // found.b.shape[0])
    weights = {"b_bias": b_bias[:, None], "c_bias": c_bias[:, None], "d": d}
    given = inputs.weights._asdict()
    weights = Weights(**{name: None if given[name] is None else weights[name] for name in Weights._fields})
    dz = None if found.z is None else found.z[:, :length]
    dseq = Sequence(x=found.x[:, :length], dt=ddt, a=da, b=db, c=dc, lam=dlam, omega=domega, z=dz)
    return gathered(inputs, dseq, weights, None if inputs.ssm is None else first_grad, dstart)


def _of_coefficients(inputs: Inputs, vectors: jax.Array, last_decay: jax.Array | None) -> list[jax.Array]:
    """Gradients of Δ, A and λ, [b, l, h], and parts of D's, [b, chunks, h]."""
    seq, document = inputs.seq, inputs.document
    batch, length, heads = seq.dt.shape
    chunks = vectors.shape[2]
    nothing = jnp.zeros((1,), jnp.int32)
    return launch(
        coefficient_gradients,
        [seq.dt, seq.a, seq.lam, nothing if document is None else document, vectors,
         nothing if last_decay is None else last_decay],
        {"length": length},
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [seq.dt.shape] * 3 + [(batch, chunks, heads)]],
        (chunks, math.ceil(heads / _HEADS), batch), _WARPS,
        {"H": heads, "T": T, "HEADS": _HEADS, "VECTORS": VECTORS, "OVERLAP": OVERLAP, "SCORE": SCORE, "FLOW": FLOW,
         "QUERY": QUERY, "KEY": KEY, "TURN": TURN, "HAS_DOC": document is not None,
         "HAS_LAST": last_decay is not None},
    )  # fmt: skip


def _of_weights(biases: jax.Array, skips: jax.Array, block: int) -> list[jax.Array]:
    """Gradients of B's and C's biases, [h, N], and of D, [h]."""
    batch, chunks, heads = skips.shape
    rows, columns = _TILE
    return launch(
        weight_gradients, [biases, skips], {"rows": batch * chunks},
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((heads, N), (heads, N), (heads,))],
        (heads, N // columns, 2), _WARPS, {"H": heads, "BLOCK": block, "N": N, "ROWS": rows, "PART": columns},
    )  # fmt: skip


def _over_blocks(found: Gradients, groups: int, dtype: jnp.dtype) -> list[jax.Array]:
    """Gradients of B and C, [b, l, 1, g, N], and of ω, [b, l, S], of so many whole chunks."""
    blocks, batch, length, _ = found.b.shape
    if blocks == 1:
        return [found.b[0, :, :, None, None], found.c[0, :, :, None, None], found.omega[0]]
    rows = jax.ShapeDtypeStruct((batch, length, 1, groups, N), dtype)
    return launch(
        sum_blocks, [found.b, found.c, found.omega], {"rows": batch * length},
        [rows, rows, jax.ShapeDtypeStruct(found.omega.shape[1:], found.omega.dtype)],
        (batch * length // _ROWS, groups, 1), _WARPS,
        {"G": groups, "PER": blocks // groups, "N": N, "S": S, "ROWS": _ROWS},
    )  # fmt: skip
