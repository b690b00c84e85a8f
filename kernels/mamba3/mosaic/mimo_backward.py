"""The Mosaic GPU MIMO backward: its kernels, and the one that makes gradients of the inputs of what they leave."""

import jax
import jax.numpy as jnp
import triton

from ...triton_launch import launch
from ..cotangents import gathered, phase_flow
from ..inputs import Inputs, Sequence, Weights
from .forward import Prepared
from .mimo_finish import finish
from .mimo_forward import Operands
from .mimo_gradients import Gradients, gradients
from .mimo_head_gradients import (
    ALONG,
    FLOW,
    FLOWS,
    OVERLAP,
    SAME,
    THROUGH,
    TURN,
    TURNED_FLOW,
    VECTORS,
    WITHIN,
)
from .mimo_pieces import HALF_ROWS, RANKS, positions
from .mimo_shares import Shares, share
from .mimo_state_gradients import state_gradients
from .pieces import COEFFICIENTS, DECAY, N, P, S

# Of the kernel in mimo_finish.py: heads at a time, programs whose parts it adds up at a time, columns of these, warps.
_HEADS, _MANY, _PART, _WARPS = 64, 32, 64, 4
_LEAST_HEADS = 16  # for a product


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
    chunk_grad, first_grad = state_gradients(dy, z, c, prepared, weights, dssm, segments=segments, interpret=interpret)
    shares = _shares(prepared, b.shape[3])
    found = gradients(x, z, dy, b, c, prepared, weights, d, chunk_ssm, chunk_grad, shares=shares, interpret=interpret)
    return found, first_grad


def _shares(prepared: Prepared, groups: int) -> Shares:
    batch, heads, chunks = prepared.totals.shape
    return share(batch, chunks, heads, groups)


def combine(
    inputs: Inputs, prepared: Prepared, found: Gradients, first_grad: jax.Array,
    ssm: jax.Array | None, dssm: jax.Array | None, dphase: jax.Array | None,
) -> Inputs:  # fmt: skip
    """Gradients of the inputs.

    Args:
      inputs: of the scan.
      prepared: of it.
      found: what `kernels` found.
      first_grad: likewise.
      ssm: H after the last token, needed with its gradient.
      dssm: gradient of that, [b, h, P, N]; None = zeros, as is the next.
      dphase: gradient of the phase after the last token, [b, h, S].
    """
    last = None
    if dssm is not None:
        last = jnp.sum(dssm * ssm, axis=(-2, -1)), phase_flow(dssm, ssm, S, paired=False), dphase
    ddt, da, dlam, domega, db, dc, *of_weights = _finished(inputs, prepared, found, last)
    dstart = None if inputs.phase is None else jnp.zeros_like(inputs.phase)
    if last is not None and dstart is not None:
        dstart = last[1] + dphase
    if inputs.ssm is not None:
        dstart = dstart - phase_flow(first_grad, inputs.ssm, S, paired=False)
    names = ("b_bias", "c_bias", "mimo_o", "mimo_z", "mimo_x", "d")
    weights, given = dict(zip(names, of_weights, strict=True)), inputs.weights._asdict()
    weights = Weights(**{name: None if given[name] is None else weights[name] for name in Weights._fields})
    length = inputs.seq.x.shape[1]
    dz = None if found.z is None else found.z[:, :length]
    dseq = Sequence(x=found.x[:, :length], dt=ddt, a=da, b=db, c=dc, lam=dlam, omega=domega, z=dz)
    return gathered(inputs, dseq, weights, None if inputs.ssm is None else first_grad, dstart)


def _finished(inputs: Inputs, prepared: Prepared, found: Gradients, last: tuple | None) -> list[jax.Array]:
    """Gradients of Δ, A, λ, ω, B, C and weights.

    `last`: of the log decay and the phases beyond the last token, by H, and of the phases there.
    """
    seq, document = inputs.seq, inputs.document
    batch, length, heads = seq.dt.shape
    ranks, groups = seq.b.shape[2:4]
    shares, span, f32 = _shares(prepared, groups), positions(ranks), jnp.float32
    nothing = jnp.zeros((1,), jnp.int32)
    shapes = [(seq.dt.shape, f32)] * 3 + [(seq.omega.shape, f32)] + [(seq.b.shape, seq.b.dtype)] * 2
    shapes += [((heads, ranks, N), f32)] * 2 + [((heads, ranks, P), f32)] * 3 + [((heads,), f32)]
    rows = batch * shares.chunks
    return launch(
        finish,
        [seq.dt, seq.a, seq.lam, seq.omega, nothing if document is None else document, prepared.coefficients,
         found.vectors, found.flows, found.turned, found.down, found.omega, found.biases, found.mimo,
         *((nothing,) * 3 if last is None else last)],
        {"length": length, "chunks": shares.chunks, "batches": batch, "programs": shares.programs},
        [jax.ShapeDtypeStruct(*shape) for shape in shapes],
        (heads * ((2 * N + 3 * P) * RANKS // _PART + 1) + rows * (1 + 2 * groups), 1, 1), _WARPS,
        {"H": heads, "T": span, "S": S, "N": N, "P": P, "R": ranks, "RANKS": RANKS, "G": groups,
         "PER": shares.per_group, "LEAST": shares.least, "LONGER": shares.longer,
         "HEADS": max(_LEAST_HEADS, min(_HEADS, triton.next_power_of_2(heads))), "MANY": _MANY, "PART": _PART,
         "ROWS": COEFFICIENTS, "DECAY": DECAY, "VECTORS": VECTORS, "WIDTH": HALF_ROWS, "ALONG": ALONG,
         "THROUGH": THROUGH, "WITHIN": WITHIN, "SAME": SAME, "OVERLAP": OVERLAP, "TURN": TURN[0], "FLOWS": FLOWS,
         "FLOW": FLOW, "TURNED": TURNED_FLOW, "HAS_DOC": document is not None, "HAS_LAST": last is not None},
    )  # fmt: skip
