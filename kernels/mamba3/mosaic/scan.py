"""The Mosaic GPU implementation behind `mamba3_scan`: what it can take, what runs when, and its two ends in JAX.

For Hopper and SISO, forward only: derivatives are those of the Triton implementation, which then runs forward too.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ..ends import entering_ssm, leaving_state
from ..inputs import Sequence, Weights
from ..state import Mamba3State
from ..triton import op
from ..triton.launch import launch
from ..triton.plans import choose_plan
from .forward import Prepared, output_pass, state_pass
from .pieces import COEFFICIENTS, N, P, S, T
from .prepare import coefficients, phases

_LEAST_JAX = (0, 11)
_CAPABILITY = "9.0"
_PROGRAMS = 264  # two to each multiprocessor of a large Hopper GPU
# Of the kernels in prepare.py: heads of a program, positions of a tile of phases, chunks of a tile of their sums.
_HEADS, _PART, _CHUNKS = 8, 8, 64
_OPERANDS = ("x", "b", "c", "z")


def unsupported(seq: Sequence, weights: Weights, segment_ids: jax.Array | None, chunk_size: int | None) -> str | None:
    """Why the kernels cannot take these inputs, or run here; None if they can."""
    return _unsupported_here() or _unsupported_inputs(seq, weights, segment_ids, chunk_size)


def _unsupported_here() -> str | None:
    if jax.__version_info__ < _LEAST_JAX:
        return f"the Mosaic GPU kernels need jax 0.11 or later, this is {jax.__version__}"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability != _CAPABILITY:
        return f"the Mosaic GPU kernels are for Hopper GPUs, this is a {jax.local_devices()[0].device_kind}"
    return None


def _unsupported_inputs(
    seq: Sequence, weights: Weights, segment_ids: jax.Array | None, chunk_size: int | None
) -> str | None:
    rank, _, n = seq.b.shape[2:]
    p, s = seq.x.shape[-1], seq.omega.shape[-1]
    if seq.z is None:
        return "z is absent; the Mosaic GPU kernels always gate"
    for name in _OPERANDS:
        if getattr(seq, name).dtype != jnp.bfloat16:
            return f"{name} has dtype {getattr(seq, name).dtype}; the Mosaic GPU kernels take bfloat16"
    if rank != 1 or any(w is not None for w in (weights.mimo_x, weights.mimo_z, weights.mimo_o)):
        return "the Mosaic GPU kernels are for rank 1 without MIMO weights"
    if (p, n, s) != (P, N, S):
        return f"p = {p}, n = {n}, s = {s}; the Mosaic GPU kernels take p = {P}, n = {N}, s = {S}"
    if seq.omega.ndim == 4:
        return "omega differs between heads; the Mosaic GPU kernels take one for all"
    if weights.norm_weight is not None:
        return "norm_weight is given; the Mosaic GPU kernels have no norm before the gate"
    if segment_ids is not None:
        return "segment_ids is given; the Mosaic GPU kernels take one document"
    if chunk_size not in (None, T):
        return f"chunk_size = {chunk_size}; the Mosaic GPU kernels take {T}"
    return None


def scan(
    chunk_size: int | None,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State,
    segment_ids: jax.Array | None,
    norm_eps: float,
) -> tuple[jax.Array, Mamba3State]:
    """Same contract as `xla.scan`, for inputs that `unsupported` has no objection to."""
    del segment_ids, norm_eps
    acc = jnp.float32
    seq = seq._replace(**{name: getattr(seq, name).astype(acc) for name in ("dt", "a", "lam", "omega")})
    inputs = op.Inputs(seq, weights, entering_ssm(seq, weights, state, acc), state.angle.astype(acc), None)
    y, ssm, angle = _scan(choose_plan(seq, chunk_size), inputs)
    return y, leaving_state(angle, ssm, seq, weights, acc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: op.Plan, inputs: op.Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, H and the phase after the last token; `plan` is for the derivative, H not in its kernels' order."""
    del plan
    return forward(inputs)


def _scan_forward(plan: op.Plan, inputs: op.Inputs):
    (y, ssm, angle), residuals = op._scan_forward(plan, inputs._replace(ssm=op.to_kernel_order(inputs.ssm, S)))
    return (y, op.from_kernel_order(ssm, S), angle), residuals


def _scan_backward(plan: op.Plan, residuals, cotangents) -> tuple[op.Inputs]:
    dy, dssm, dangle = cotangents
    (gradients,) = op._scan_backward(plan, residuals, (dy, op.to_kernel_order(dssm, S), dangle))
    return (gradients._replace(ssm=op.from_kernel_order(gradients.ssm, S)),)


# Under jax.checkpoint the first pass then runs the kernels here, and only the second those that save.
_scan.defvjp(_scan_forward, _scan_backward, optimize_remat=True)


@jax.custom_batching.sequential_vmap
def forward(inputs: op.Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y [b, l, h, p], and H [b, h, p, n] and the phase in radians [b, h, s] after the last token; not differentiable.

    `inputs` as for the Triton kernels, but H with its coordinates in the order of B's. Under vmap the launches follow
    one another.
    """
    return forward_in_segments(inputs, choose_segments(*inputs.seq.x.shape[:3]))


def choose_segments(batch: int, length: int, heads: int) -> int:
    """Of the sequence, so that the GPU is full: all but the last have equally many chunks."""
    chunks = math.ceil(length / T)
    wanted = max(1, min(chunks, round(_PROGRAMS / (batch * heads))))
    return math.ceil(chunks / math.ceil(chunks / wanted))


def forward_in_segments(inputs: op.Inputs, segments: int, interpret=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`forward` with a given number of segments; `interpret`: parameters of the interpreter, if it is to run them."""
    seq, weights = inputs.seq, inputs.weights
    length, heads = seq.x.shape[1:3]
    prepared, angle = prepare(inputs)
    padding = -length % T  # Δ = 0 there: it changes no state

    def padded(v: jax.Array) -> jax.Array:
        return jnp.pad(v, ((0, 0), (0, padding)) + ((0, 0),) * (v.ndim - 2)) if padding else v

    def weight(v: jax.Array | None, *shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32) if v is None else v.astype(jnp.float32)

    x, z, b, c = padded(seq.x), padded(seq.z), padded(seq.b[:, :, 0]), padded(seq.c[:, :, 0])
    b_bias, c_bias = weight(weights.b_bias, heads, 1, N), weight(weights.c_bias, heads, 1, N)
    how = {"segments": segments, "interpret": interpret}
    before = state_pass(x, b, prepared, b_bias, **how) if segments > 1 else None
    y, ssm = output_pass(x, z, b, c, prepared, b_bias, c_bias, weight(weights.d, heads), inputs.ssm, before, **how)
    return y[:, :length], ssm, angle


def prepare(inputs: op.Inputs) -> tuple[Prepared, jax.Array]:
    """What the kernels need of every chunk, and the phase after the last token; see prepare.py."""
    dt, a, lam, omega = (getattr(inputs.seq, name) for name in ("dt", "a", "lam", "omega"))
    batch, length, heads = dt.shape
    chunks = math.ceil(length / T)

    def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *axes), dtype)

    coefs, rates, steps = launch(
        coefficients, [dt, a, lam, omega], {"length": length},
        [shape(heads, chunks, COEFFICIENTS, T), shape(chunks * T, 2 * S, dtype=jnp.bfloat16),
         shape(heads, chunks, S, dtype=jnp.int32)],
        (chunks, math.ceil(heads / _HEADS), batch), 4,
        {"H": heads, "S": S, "T": T, "HEADS": _HEADS, "ROWS": COEFFICIENTS, "PART": _PART},
    )  # fmt: skip
    starts, angle = launch(
        phases, [inputs.phase, steps], {"chunks": chunks}, [shape(heads, chunks, S), shape(heads, S)],
        (heads, batch, 1), 4, {"H": heads, "S": S, "MANY": _CHUNKS},
    )  # fmt: skip
    return Prepared(coefs, rates, starts), angle
