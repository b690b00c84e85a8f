"""The Mosaic GPU implementation behind `mamba3_scan`, for Hopper: what it takes, what runs when, its ends.

Forward and backward, SISO and MIMO of rank 2 and 4.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name

from ...documents import number_documents
from ...residuals import SCAN_RESIDUALS
from ...triton_launch import batch_too_large, launch
from ..ends import entering_ssm, leaving_state, start_at_last_document
from ..inputs import Inputs, Sequence, Weights
from ..readout import without_readout
from ..state import Mamba3State
from ..triton.readout import read_rows
from . import backward, mimo_backward, mimo_forward
from .forward import Operands, Prepared, in_chunks, output_pass
from .mimo_pieces import positions
from .mimo_state_gradients import choose_together
from .pieces import COEFFICIENTS, MULTIPROCESSORS, N, P, S, T
from .prepare import coefficients, phases
from .states import state_pass
from .widths import narrowed, widened

_LEAST_JAX = (0, 11)
_CAPABILITY = "9.0"
_PROGRAMS = 2 * MULTIPROCESSORS
# Of the kernels in prepare.py: heads of a program, its warps, positions whose steps are added in float32; at most so
# many chunks of a tile of their sums, and so many angles.
_HEADS, _WARPS, _PART, _CHUNKS, _ANGLES = 8, 4, 8, 256, 8
# In `state_pass`: pieces of a segment, at most; chunks of a piece, at least, where a segment has them; heads of a
# program, at most.
_PIECES, _LEAST, _TOGETHER = 8, 4, 4
_OPERANDS = ("x", "b", "c", "z")
_POSITIONS = {1: T, 2: positions(2), 4: positions(4)}  # of a chunk, by rank
_MAX_ELEMENTS = 2**31  # of an input or of H: offsets are int32


def unsupported(seq: Sequence, weights: Weights, chunk_size: int | None) -> str | None:
    """Why the kernels cannot take these inputs, or run here; None if they can."""
    return _unsupported_here() or _unsupported_inputs(seq, weights, chunk_size)


def _unsupported_here() -> str | None:
    if jax.__version_info__ < _LEAST_JAX:
        return f"the Mosaic GPU kernels need jax 0.11 or later, this is {jax.__version__}"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability != _CAPABILITY:
        return f"the Mosaic GPU kernels are for Hopper GPUs, this is a {jax.local_devices()[0].device_kind}"
    return None


def _unsupported_inputs(seq: Sequence, weights: Weights, chunk_size: int | None) -> str | None:
    rank, _, n = seq.b.shape[2:]
    p, s = seq.x.shape[-1], seq.omega.shape[-1]
    for name in _OPERANDS:
        v = getattr(seq, name)
        if v is not None and v.dtype != jnp.bfloat16:
            return f"{name} has dtype {v.dtype}; the Mosaic GPU kernels take bfloat16"
    if rank not in _POSITIONS:
        return f"rank {rank}; the Mosaic GPU kernels take 1, 2 and 4"
    if rank == 1 and any(w is not None for w in (weights.mimo_x, weights.mimo_z, weights.mimo_o)):
        return "MIMO weights are given; the Mosaic GPU kernels take none at rank 1"
    if p != P or n > N or s > S:
        return f"p = {p}, n = {n}, s = {s}; the Mosaic GPU kernels take p = {P}, n up to {N}, s up to {S}"
    if seq.omega.ndim == 4:
        return "omega differs between heads; the Mosaic GPU kernels take one for all"
    if chunk_size not in (None, _POSITIONS[rank]):
        return f"chunk_size = {chunk_size}; the Mosaic GPU kernels take {_POSITIONS[rank]} at rank {rank}"
    batch, _, heads, _ = seq.x.shape
    if max(seq.x.size, seq.b.size // n * N, batch * heads * P * N) >= _MAX_ELEMENTS:
        return "x, b or the state has 2^31 elements or more; the Mosaic GPU kernels take fewer: split the batch"
    return batch_too_large(batch)


def _is_read_out_elsewhere(seq: Sequence, weights: Weights) -> bool:
    return weights.norm_weight is not None or (seq.z is None and seq.b.shape[2] > 1)


# A program then has one copy of the kernels for all its layers of a shape, lowered once.
@functools.partial(jax.jit, static_argnames=("chunk_size", "norm_eps", "return_state"))
def scan(
    chunk_size: int | None,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State | None,
    segment_ids: jax.Array | None,
    norm_eps: float,
    return_state: bool = True,
) -> tuple[jax.Array, Mamba3State | None]:
    """Same contract as `xla.scan`, for inputs that `unsupported` has no objection to.

    None instead of a state that is zero spares reading it, and its gradient. Without `return_state` the state that is
    returned is None, SISO does not write it, and the backward need not look at its gradient. With a norm before the
    gate, and for MIMO without gate, the kernels leave y of every rank to another.
    """
    del chunk_size
    acc = jnp.float32
    rank, n, s = seq.b.shape[2], seq.b.shape[-1], seq.omega.shape[-1]
    seq = seq._replace(**{name: getattr(seq, name).astype(acc) for name in ("dt", "a", "lam", "omega")})
    ssm = None if state is None else entering_ssm(seq, weights, state, acc)
    phase = None if state is None else state.angle.astype(acc)
    if state is None:
        state = Mamba3State.zeros(*(seq.x.shape[k] for k in (0, 2, 3)), n, rank, s, seq.x.dtype)
    document = None if segment_ids is None else segment_ids.astype(jnp.int32)
    to_read_out = _is_read_out_elsewhere(seq, weights)
    given = without_readout(seq, weights) if to_read_out else (seq, weights)
    y, ssm, angle = _scan(return_state, widened(Inputs(*given, ssm, phase, document)))
    if to_read_out:
        rows, span = (y, _POSITIONS[rank]) if rank > 1 else (y[:, :, :, None], 0)
        y = read_rows(rows, seq, weights, norm_eps, span)
    if not return_state:
        return y, None
    ssm, angle = narrowed(ssm, n, s), angle[..., :s]
    if segment_ids is not None:
        ssm, angle = start_at_last_document(ssm, angle, seq, state, number_documents(segment_ids))
    return y, leaving_state(angle, ssm, seq, weights, acc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(return_state: bool, inputs: Inputs) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """y, and if wanted H and the phase after the last token."""
    y, ssm, angle = forward(inputs, last=return_state)
    return (y, ssm, angle) if return_state else (y, None, None)


def _scan_forward(return_state: bool, inputs: Inputs):
    y, ssm, angle, prepared, chunk_ssm = checkpoint_name(forward_saving(inputs, last=return_state), SCAN_RESIDUALS)
    if not return_state:
        ssm, angle = None, None
    return (y, ssm, angle), (inputs, prepared, chunk_ssm, ssm)


def _scan_backward(return_state: bool, residuals, cotangents) -> tuple[Inputs]:
    del return_state
    inputs, prepared, chunk_ssm, ssm = residuals
    dy, dssm, dangle = cotangents
    found, first_grad = backward_kernels(inputs, prepared, chunk_ssm, dy, dssm)
    if inputs.seq.b.shape[2] == 1:
        return (backward.combine(inputs, found, first_grad, ssm, dssm, dangle),)
    return (mimo_backward.combine(inputs, prepared, found, first_grad, ssm, dssm, dangle),)


_scan.defvjp(_scan_forward, _scan_backward)


def forward(inputs: Inputs, last: bool = True) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """y [b, l, h, p], and H [b, h, p, n] and the phase in radians [b, h, s] after the last token; not differentiable.

    MIMO without gate: y of every rank, in rows (mimo_pieces.py). Without `last` SISO leaves out H. Under vmap the
    launches follow one another.
    """
    return _one_after_another(inputs, last=last)


def forward_saving(inputs: Inputs, last: bool = True) -> tuple:
    """`forward`, and what the backward needs of it: `Prepared`, and H before every chunk."""
    return _one_after_another(inputs, last=last, save=True)


def _one_after_another(inputs: Inputs, **how: bool) -> tuple:
    run = functools.partial(forward_in_segments, segments=_segments_of(inputs), **how)
    return jax.custom_batching.sequential_vmap(lambda inputs: run(inputs))(inputs)


@jax.custom_batching.sequential_vmap
def backward_kernels(inputs: Inputs, prepared: Prepared, chunk_ssm, dy, dssm) -> tuple:
    """What the rank's `kernels` find, one launch after another under vmap."""
    return backward_in_segments(inputs, prepared, chunk_ssm, dy, dssm, _segments_back(inputs))


def choose_segments(batch: int, length: int, heads: float, positions: int = T) -> int:
    """Of the sequence, so that the GPU is full: all but the last have equally many chunks of `positions`."""
    chunks = math.ceil(length / positions)
    wanted = max(1, min(chunks, round(_PROGRAMS / (batch * heads))))
    return math.ceil(chunks / math.ceil(chunks / wanted))


def _segments_of(inputs: Inputs) -> int:
    return choose_segments(*inputs.seq.x.shape[:3], _positions_of(inputs))


def _segments_back(inputs: Inputs) -> int:
    """For `backward_kernels`: of MIMO a program has several heads, and a multiprocessor one program."""
    batch, length, heads = inputs.seq.x.shape[:3]
    ranks, groups = inputs.seq.b.shape[2:4]
    together = 1 if ranks == 1 else choose_together(heads // groups) / 2
    return choose_segments(batch, length, heads / together, _positions_of(inputs))


def _positions_of(inputs: Inputs) -> int:
    return _POSITIONS[inputs.seq.b.shape[2]]


def forward_in_segments(inputs: Inputs, segments: int, last: bool = True, save: bool = False, interpret=None) -> tuple:
    """`forward` with a given number of segments.

    `save` adds `Prepared` and H before every chunk. `interpret`: parameters of the interpreter, if it is to run them.
    """
    prepared, angle = prepare(inputs)
    if inputs.seq.b.shape[2] == 1:
        y, ssm, *saved = _siso_forward(inputs, prepared, segments, last, save, interpret)
    else:
        y, ssm, *saved = mimo_forward.forward_in_segments(inputs, prepared, segments, save, interpret)
    return y, ssm, angle, *((prepared, *saved) if save else ())


def _siso_forward(
    inputs: Inputs, prepared: Prepared, segments: int, last: bool, save: bool, interpret
) -> tuple[jax.Array | None, ...]:
    x, z, b, c, b_bias, c_bias, d = operands(inputs)
    cut = choose_cut(x.shape[1] // T, segments, heads=x.shape[2], groups=b.shape[2])
    before = None
    if cut.segments > 1:
        before = state_pass(
            x, b, prepared, b_bias, segments=cut.segments, pieces=cut.pieces, count=cut.count // cut.pieces,
            together=cut.together, interpret=interpret,
        )  # fmt: skip
    y, *states = output_pass(
        x, z, b, c, prepared, b_bias, c_bias, d, inputs.ssm, before,
        count=cut.count, pieces=cut.pieces, last=last, save=save, interpret=interpret,
    )  # fmt: skip
    return y[:, : inputs.seq.x.shape[1]], *states


class Cut(NamedTuple):
    """How the SISO forward cuts a sequence."""

    segments: int  # of `output_pass`
    count: int  # chunks of a segment, but for the last
    pieces: int  # of a segment in `state_pass`; divides `count`
    together: int  # heads of a program there


def choose_cut(chunks: int, segments: int, heads: int, groups: int) -> Cut:
    """Of a sequence of so many chunks into about as many segments, of which all but the last are whole pieces."""
    most = math.ceil(chunks / segments)
    pieces = max(1, min(_PIECES, most // _LEAST))
    count = math.ceil(most / pieces) * pieces
    return Cut(math.ceil(chunks / count), count, pieces, math.gcd(heads // groups, _TOGETHER))


def backward_in_segments(
    inputs: Inputs, prepared: Prepared, chunk_ssm, dy: jax.Array, dssm, segments: int, interpret=None
) -> tuple:
    """`backward_kernels` with a given number of segments; `interpret` as in `forward_in_segments`."""
    given = operands(inputs) if inputs.seq.b.shape[2] == 1 else mimo_forward.operands(inputs)
    if dy.shape == inputs.seq.x.shape:  # else in rows, which are of whole chunks
        dy = in_chunks(dy, _positions_of(inputs))
    how = {"segments": segments, "interpret": interpret}
    if inputs.seq.b.shape[2] == 1:
        return backward.kernels(given, prepared, chunk_ssm, dy, dssm, first=inputs.ssm is not None, **how)
    return mimo_backward.kernels(given, prepared, chunk_ssm, dy, dssm, **how)


def operands(inputs: Inputs) -> Operands:
    """With whole chunks of positions: Δ = 0 in those beyond the length, so that they change no state."""
    seq, weights = inputs.seq, inputs.weights
    heads = seq.x.shape[2]

    def weight(v: jax.Array | None, *shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32) if v is None else v.astype(jnp.float32)

    return Operands(
        *(in_chunks(v) for v in (seq.x, seq.z, seq.b[:, :, 0], seq.c[:, :, 0])),
        weight(weights.b_bias, heads, 1, N), weight(weights.c_bias, heads, 1, N), weight(weights.d, heads),
    )  # fmt: skip


def prepare(inputs: Inputs) -> tuple[Prepared, jax.Array]:
    """What the kernels need of every chunk, and the phase after the last token; see prepare.py."""
    dt, a, lam, omega = (getattr(inputs.seq, name) for name in ("dt", "a", "lam", "omega"))
    batch, length, heads = dt.shape
    span = _positions_of(inputs)
    chunks = math.ceil(length / span)
    document = jnp.zeros((1,), jnp.int32) if inputs.document is None else inputs.document

    def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *axes), dtype)

    coefs, rates, steps = launch(
        coefficients, [dt, a, lam, omega, document], {"length": length},
        [shape(heads, chunks, COEFFICIENTS, span), shape(chunks * span, 2 * S, dtype=jnp.bfloat16),
         shape(heads, chunks, S, dtype=jnp.int32)],
        (chunks, math.ceil(heads / _HEADS), batch), _WARPS,
        {"H": heads, "S": S, "T": span, "HEADS": _HEADS, "ROWS": COEFFICIENTS, "PART": _PART,
         "HAS_DOC": inputs.document is not None},
    )  # fmt: skip
    starts, angle, totals = launch(
        phases, [jnp.zeros((1,)) if inputs.phase is None else inputs.phase, steps, coefs], {"chunks": chunks},
        [shape(heads, chunks, S), shape(heads, S), shape(heads, chunks)], (heads, batch, S // _ANGLES), _WARPS,
        {"H": heads, "S": S, "T": span, "ROWS": COEFFICIENTS, "MANY": min(_CHUNKS, triton.next_power_of_2(chunks)),
         "PART": _ANGLES, "HAS_ANGLE": inputs.phase is not None},
    )  # fmt: skip
    return Prepared(coefs, rates, starts, totals), angle
