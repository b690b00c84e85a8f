"""The Mosaic GPU backward: its two kernels, and those that make gradients of the inputs of what they leave."""

import math

import jax
import jax.numpy as jnp

from ...triton_launch import launch
from ..cotangents import gathered, of_later_phases, phase_flow
from ..inputs import Inputs, Sequence, Weights
from .finish import finish
from .forward import Operands, Prepared
from .gradients import gradients
from .head_gradients import FLOW, KEY, OVERLAP, QUERY, SCORE, TURN, VECTORS, Gradients
from .pieces import MULTIPROCESSORS, N, S, T
from .state_gradients import state_gradients

# Of the kernels in finish.py: heads of a program, rows and columns of a tile of the biases' parts, rows of a sum over
# blocks, warps.
_HEADS, _TILE, _ROWS, _WARPS = 8, (32, 64), 8, 4


def choose_block(batch: int, length: int, heads: int, groups: int) -> int:
    """How many heads of a group one program of `gradients` walks: as many as leave no multiprocessor idle.

    Every block of heads has sums of its own for the gradients of B, C and ω, to be written and added up afterwards.
    """
    per_group, chunks = heads // groups, batch * math.ceil(length / T)

    def cost(block: int) -> int:  # of the busiest multiprocessor; a program's two ends cost as much as a head
        return math.ceil(chunks * heads / block / MULTIPROCESSORS) * (block + 1)

    return min((block for block in range(per_group, 0, -1) if per_group % block == 0), key=cost)


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
        block=choose_block(batch, length, heads, b.shape[2]), no_first=not first, no_last=dssm is None,
        interpret=interpret,
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
    ddt, da, dlam, b_bias, c_bias, d, *sums = _finished(inputs, found, last_decay)
    db, dc, domega = (v[:, :length] for v in sums)
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
    weights = {"b_bias": b_bias[:, None], "c_bias": c_bias[:, None], "d": d}
    given = inputs.weights._asdict()
    weights = Weights(**{name: None if given[name] is None else weights[name] for name in Weights._fields})
    dz = None if found.z is None else found.z[:, :length]
    dseq = Sequence(x=found.x[:, :length], dt=ddt, a=da, b=db, c=dc, lam=dlam, omega=domega, z=dz)
    return gathered(inputs, dseq, weights, None if inputs.ssm is None else first_grad, dstart)


def _finished(inputs: Inputs, found: Gradients, last_decay: jax.Array | None) -> list[jax.Array]:
    """Gradients of Δ, A and λ, [b, l, h], of B's and C's biases, [h, N], of D, [h], and of so many whole chunks, of B
    and C, [b, l, 1, g, N], and ω, [b, l, S]; `last_decay`: of the log decay beyond the last token, [b, h].
    """
    seq, document = inputs.seq, inputs.document
    batch, length, heads = seq.dt.shape
    groups, blocks, chunks = seq.b.shape[3], found.b.shape[0], found.vectors.shape[2]
    has_blocks = blocks > 1
    nothing = jnp.zeros((1,), jnp.int32)
    rows, columns = _TILE
    f32, whole = jnp.float32, (batch, chunks * T)
    shapes = [(seq.dt.shape, f32)] * 3 + [((heads, N), f32)] * 2 + [((heads,), f32)]
    of_rows = ((*whole, 1, groups, N), seq.b.dtype), ((*whole, 1, groups, N), seq.b.dtype), ((*whole, S), f32)
    shapes += [(shape if has_blocks else (1,), dtype) for shape, dtype in of_rows]
    programs = heads * (2 * N // columns) + batch * chunks * math.ceil(heads / _HEADS)
    out = launch(
        finish,
        [seq.dt, seq.a, seq.lam, nothing if document is None else document, found.vectors,
         nothing if last_decay is None else last_decay, found.biases, found.b, found.c, found.omega],
        {"length": length, "chunks": chunks, "batches": batch},
        [jax.ShapeDtypeStruct(*shape) for shape in shapes],
        (programs + has_blocks * groups * batch * chunks * (T // _ROWS), 1, 1), _WARPS,
        {"H": heads, "T": T, "HEADS": _HEADS, "VECTORS": VECTORS, "OVERLAP": OVERLAP, "SCORE": SCORE, "FLOW": FLOW,
         "QUERY": QUERY, "KEY": KEY, "TURN": TURN, "HAS_DOC": document is not None,
         "HAS_LAST": last_decay is not None, "BLOCK": heads // blocks, "N": N, "S": S, "BIAS_ROWS": rows,
         "BIAS_COLUMNS": columns, "G": groups, "PER": blocks // groups, "ROWS": _ROWS, "HAS_BLOCKS": has_blocks},
    )  # fmt: skip
    if has_blocks:
        return out
    return [*out[:6], found.b[0, :, :, None, None], found.c[0, :, :, None, None], found.omega[0]]
