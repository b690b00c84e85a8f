"""The Mosaic GPU implementation behind `mamba3_scan`, for Hopper: what it takes, what runs when, its ends.

SISO, forward and backward; MIMO of rank 2 and 4, forward, with Triton's derivative.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ..cotangents import combine
from ..ends import entering_ssm, leaving_state, number_documents, start_at_last_document
from ..inputs import Inputs, Sequence, Weights
from ..state import Mamba3State
from ..triton import op as triton
from ..triton.launch import batch_too_large, launch
from ..triton.plans import choose_plan
from . import backward, mimo_forward
from .forward import Operands, Prepared, in_chunks, output_pass, state_pass
from .pieces import COEFFICIENTS, N, P, S, T
from .prepare import coefficients, phases

_LEAST_JAX = (0, 11)
_CAPABILITY = "9.0"
_PROGRAMS = 264  # two to each multiprocessor of a large Hopper GPU
# Of the kernels in prepare.py: heads of a program, positions of a tile of phases, chunks of a tile of their sums.
_HEADS, _PART, _CHUNKS = 8, 8, 64
_OPERANDS = ("x", "b", "c", "z")
_POSITIONS = {1: T, 2: mimo_forward.T, 4: mimo_forward.T}  # of a chunk, by rank
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
    if seq.z is None:
        return "z is absent; the Mosaic GPU kernels always gate"
    for name in _OPERANDS:
        if getattr(seq, name).dtype != jnp.bfloat16:
            return f"{name} has dtype {getattr(seq, name).dtype}; the Mosaic GPU kernels take bfloat16"
    if rank not in _POSITIONS:
        return f"rank {rank}; the Mosaic GPU kernels take 1, 2 and 4"
    if rank == 1 and any(w is not None for w in (weights.mimo_x, weights.mimo_z, weights.mimo_o)):
        return "MIMO weights are given; the Mosaic GPU kernels take none at rank 1"
    if (p, n, s) != (P, N, S):
        return f"p = {p}, n = {n}, s = {s}; the Mosaic GPU kernels take p = {P}, n = {N}, s = {S}"
    if seq.omega.ndim == 4:
        return "omega differs between heads; the Mosaic GPU kernels take one for all"
    if weights.norm_weight is not None:
        return "norm_weight is given; the Mosaic GPU kernels have no norm before the gate"
    if chunk_size not in (None, _POSITIONS[rank]):
        return f"chunk_size = {chunk_size}; the Mosaic GPU kernels take {_POSITIONS[rank]} at rank {rank}"
    batch, _, heads, _ = seq.x.shape
    if max(seq.x.size, seq.b.size, batch * heads * P * N) >= _MAX_ELEMENTS:
        return "x, b or the state has 2^31 elements or more; the Mosaic GPU kernels take fewer: split the batch"
    return batch_too_large(batch)


def scan(
    chunk_size: int | None,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State | None,
    segment_ids: jax.Array | None,
    norm_eps: float,
    return_state: bool = True,
) -> tuple[jax.Array, Mamba3State | None]:
    """Same contract as `xla.scan`, for inputs that `unsupported` has no objection to; at rank 2 and 4 Triton's, too.

    None instead of a state that is zero spares reading it. Without `return_state` the state that is returned is None,
    and the backward need not look at its gradient.
    """
    del chunk_size, norm_eps
    acc = jnp.float32
    rank = seq.b.shape[2]
    seq = seq._replace(**{name: getattr(seq, name).astype(acc) for name in ("dt", "a", "lam", "omega")})
    ssm = None if state is None else entering_ssm(seq, weights, state, acc)
    if state is None:
        state = Mamba3State.zeros(*(seq.x.shape[k] for k in (0, 2, 3)), N, rank, S, seq.x.dtype)
    document = None if segment_ids is None else segment_ids.astype(jnp.int32)
    if rank == 1:
        y, ssm, angle = _scan(return_state, Inputs(seq, weights, ssm, state.angle.astype(acc), document))
    else:
        ssm = state.ssm if ssm is None else ssm
        inputs = Inputs(seq, weights, ssm, state.angle.astype(acc), document)
        y, ssm, angle = _mimo_scan(choose_plan(seq, None), inputs)
    if not return_state:
        return y, None
    if segment_ids is not None:
        ssm, angle = start_at_last_document(ssm, angle, seq, state, number_documents(segment_ids))
    return y, leaving_state(angle, ssm, seq, weights, acc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(return_state: bool, inputs: Inputs) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """y, and if wanted H and the phase after the last token."""
    y, ssm, angle = forward(inputs)
    return (y, ssm, angle) if return_state else (y, None, None)


def _scan_forward(return_state: bool, inputs: Inputs):
    y, ssm, angle, prepared, chunk_ssm = forward_saving(inputs)
    if not return_state:
        ssm, angle = None, None
    return (y, ssm, angle), (inputs, prepared, chunk_ssm, ssm)


def _scan_backward(return_state: bool, residuals, cotangents) -> tuple[Inputs]:
    del return_state
    inputs, prepared, chunk_ssm, ssm = residuals
    dy, dssm, dangle = cotangents
    found, first_grad = backward_kernels(operands(inputs), prepared, chunk_ssm, in_chunks(dy), dssm)
    return (combine(inputs, backward.parts(inputs, prepared, found, first_grad, ssm, dssm), T, dangle),)


# Under jax.checkpoint the first pass then saves nothing.
_scan.defvjp(_scan_forward, _scan_backward, optimize_remat=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mimo_scan(plan: triton.Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, and H and the phase after the last token; `plan` is for Triton's kernels, whose derivative it has."""
    del plan
    return mimo(inputs)


def _triton_scan(plan: triton.Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    document = None if inputs.document is None else number_documents(inputs.document)
    ssm = triton.to_kernel_order(inputs.ssm, S)
    y, ssm, angle = triton.scan(plan, inputs._replace(ssm=ssm, document=document))
    return y, triton.from_kernel_order(ssm, S), angle


def _mimo_scan_forward(plan: triton.Plan, inputs: Inputs):
    return jax.vjp(functools.partial(_triton_scan, plan), inputs)


def _mimo_scan_backward(plan: triton.Plan, pullback, cotangents) -> tuple[Inputs]:
    del plan
    return pullback(cotangents)


# Under jax.checkpoint the first pass then runs the faster forward, and only the second the one that saves.
_mimo_scan.defvjp(_mimo_scan_forward, _mimo_scan_backward, optimize_remat=True)


@jax.custom_batching.sequential_vmap
def forward(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y [b, l, h, p], and H [b, h, p, n] and the phase in radians [b, h, s] after the last token; not differentiable.

    Under vmap the launches follow one another.
    """
    return forward_in_segments(inputs, choose_segments(*inputs.seq.x.shape[:3]))


@jax.custom_batching.sequential_vmap
def forward_saving(inputs: Inputs) -> tuple:
    """`forward`, and what the backward needs of it: `Prepared`, and H before every chunk."""
    return forward_in_segments(inputs, choose_segments(*inputs.seq.x.shape[:3]), save=True)


@jax.custom_batching.sequential_vmap
def backward_kernels(given: Operands, prepared: Prepared, chunk_ssm, dy, dssm) -> tuple[backward.Gradients, jax.Array]:
    """`backward.kernels`, one launch after another under vmap."""
    return backward.kernels(given, prepared, chunk_ssm, dy, dssm, segments=choose_segments(*dy.shape[:3]))


@jax.custom_batching.sequential_vmap
def mimo(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`forward` at rank 2 and 4."""
    return mimo_in_segments(inputs, choose_segments(*inputs.seq.x.shape[:3], mimo_forward.T))


def choose_segments(batch: int, length: int, heads: int, positions: int = T) -> int:
    """Of the sequence, so that the GPU is full: all but the last have equally many chunks of `positions`."""
    chunks = math.ceil(length / positions)
    wanted = max(1, min(chunks, round(_PROGRAMS / (batch * heads))))
    return math.ceil(chunks / math.ceil(chunks / wanted))


def forward_in_segments(inputs: Inputs, segments: int, save: bool = False, interpret=None) -> tuple:
    """`forward` with a given number of segments.

    `save` adds `Prepared` and H before every chunk. `interpret`: parameters of the interpreter, if it is to run them.
    """
    prepared, angle = prepare(inputs)
    x, z, b, c, b_bias, c_bias, d = operands(inputs)
    how = {"segments": segments, "interpret": interpret}
    before = state_pass(x, b, prepared, b_bias, **how) if segments > 1 else None
    y, ssm, *saved = output_pass(x, z, b, c, prepared, b_bias, c_bias, d, inputs.ssm, before, save=save, **how)
    return y[:, : inputs.seq.x.shape[1]], ssm, angle, *((prepared, *saved) if save else ())


def mimo_in_segments(inputs: Inputs, segments: int, interpret=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`mimo` with a given number of segments; `interpret` as in `forward_in_segments`."""
    prepared, angle = prepare(inputs, mimo_forward.T)
    return *mimo_forward.forward_in_segments(inputs, prepared, segments, interpret), angle


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


def prepare(inputs: Inputs, positions: int = T) -> tuple[Prepared, jax.Array]:
    """What the kernels need of every chunk of `positions`, and the phase after the last token; see prepare.py."""
    dt, a, lam, omega = (getattr(inputs.seq, name) for name in ("dt", "a", "lam", "omega"))
    batch, length, heads = dt.shape
    chunks = math.ceil(length / positions)
    document = jnp.zeros((1,), jnp.int32) if inputs.document is None else inputs.document

    def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *axes), dtype)

    coefs, rates, steps = launch(
        coefficients, [dt, a, lam, omega, document], {"length": length},
        [shape(heads, chunks, COEFFICIENTS, positions), shape(chunks * positions, 2 * S, dtype=jnp.bfloat16),
         shape(heads, chunks, S, dtype=jnp.int32)],
        (chunks, math.ceil(heads / _HEADS), batch), 4,
        {"H": heads, "S": S, "T": positions, "HEADS": _HEADS, "ROWS": COEFFICIENTS, "PART": _PART,
         "HAS_DOC": inputs.document is not None},
    )  # fmt: skip
    starts, angle = launch(
        phases, [inputs.phase, steps], {"chunks": chunks}, [shape(heads, chunks, S), shape(heads, S)],
        (heads, batch, 1), 4, {"H": heads, "S": S, "MANY": _CHUNKS},
    )  # fmt: skip
    return Prepared(coefs, rates, starts), angle
