"""The public functions: argument checks and the choice of implementation."""

import functools
import logging

import jax

from ..choice import CannotRunHereError
from ..gpu import no_triton_here, partitioned
from . import across, reference, xla
from .coefficients import ProjectionWeights, Rule, from_projection
from .inputs import Sequence, Weights, check_inputs
from .state import Mamba3State

try:
    from .triton import scan as triton_scan
    from .triton import step as triton_step
except ImportError:  # jax-triton comes with the extra "cuda"
    triton_scan, triton_step = None, None

try:
    from .mosaic import scan as mosaic_scan
except ImportError as error:
    mosaic_scan, _NO_MOSAIC = None, str(error)

_log = logging.getLogger(__name__)
_IMPLEMENTATIONS = ("mosaic", "reference", "triton", "xla")


def mamba3_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    lam: jax.Array,
    omega: jax.Array,
    *,
    b_bias: jax.Array | None = None,
    c_bias: jax.Array | None = None,
    mimo_x: jax.Array | None = None,
    mimo_z: jax.Array | None = None,
    mimo_o: jax.Array | None = None,
    d: jax.Array | None = None,
    z: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-5,
    initial_state: Mamba3State | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    return_state: bool = False,
    sequence_axis: str | None = None,
) -> jax.Array | tuple[jax.Array, Mamba3State]:
    """The Mamba-3 recurrence over a sequence (arXiv 2603.15569, Propositions 1 and 4; MIMO: appendix C).

    Letters: b batch, l length, h heads, p head width, r rank (1 = SISO), g groups, n state width, s angles (2s ≤ n).
    B and C rotate in coordinate pairs (i, s + i). Gradients flow to every float argument and from every output.

    Args:
      x: input, [b, l, h, p].
      dt: step size Δ > 0, [b, l, h].
      a: decay rate A ≤ 0 per unit of dt, [b, l, h].
      b: B after its norm, before bias and rotation, [b, l, r, g, n]; head i reads group i // (h/g).
      c: C likewise, [b, l, r, g, n].
      lam: trapezoid weight of the current token in [0, 1], [b, l, h]; 1 is exponential Euler.
      omega: angular rate in radians per unit of dt, [b, l, s] or [b, l, h, s]; s may be 0.
      b_bias: added to B per head, [h, r, n].
      c_bias: added to C per head, [h, r, n].
      mimo_x: input weight per rank, [h, r, p]; None = 1, as for mimo_z and mimo_o.
      mimo_z: gate weight per rank, [h, r, p].
      mimo_o: output weight per rank, [h, r, p].
      d: skip weight, [h].
      z: gate, [b, l, h, p]; the output is multiplied by silu(z).
      norm_weight: [h, p]; given, y passes through an RMSNorm over p before the gate.
      norm_eps: epsilon of that norm.
      initial_state: state before the first token, as a scan or step returned it; None = zeros.
      segment_ids: integers, [b, l]; where they change, a new document starts from the zero state. The first token
        continues `initial_state`.
      chunk_size: positions per chunk of the chunked implementations; no influence on the result beyond rounding.
      implementation: "reference" (token by token), "xla" (chunked matrix products, any device), "triton" (kernels for
        NVIDIA GPUs), "mosaic" (for Hopper GPUs and bfloat16, p 64, n up to 128, s up to 32, SISO and MIMO of rank 2
        and 4), or None for the fastest that can run here.
      return_state: also return the state after the last token. Its gradient costs time even where it is 0.
      sequence_axis: inside `jax.shard_map`, the mesh axis over whose devices the sequence is divided, each with a piece
        of l tokens, in order. y is the piece's; initial_state and the state returned are those of the whole sequence,
        the same on all devices. It takes two scans of the piece. The shard_map needs check_vma=False.

    Returns:
      y [b, l, h, p] in x's dtype, or (y, Mamba3State).

    Raises:
      ValueError: a shape that does not fit (the argument is named), a chunk size under 1, an unknown implementation or
        one that cannot run here (with the reason), an axis that no `jax.shard_map` around has.
      TypeError: an argument that is not floating point.
    """
    seq = Sequence(x, dt, a, b, c, lam, omega, z)
    weights = Weights(b_bias, c_bias, mimo_x, mimo_z, mimo_o, d, norm_weight)
    check_inputs(seq, weights, initial_state, segment_ids, has_length=True)
    rank = b.shape[2]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}; expected at least 1.")
    if sequence_axis is not None:
        across.check_axis(sequence_axis)
    state = initial_state
    if state is None:
        state = Mamba3State.zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[-1], rank, omega.shape[-1], x.dtype)
    why_not = {
        "mosaic": _why_not_mosaic(seq, weights, chunk_size),
        "triton": _why_not_triton(seq, chunk_size),
    }
    if implementation is None:
        able = () if partitioned() else (name for name, reason in why_not.items() if reason is None)
        implementation = next(iter(able), "xla")
        _log_choice("scan", implementation, jax.default_backend())
    _require(implementation, why_not.get(implementation))
    match implementation:
        case "reference":
            run = reference.scan
        case "xla":
            run = functools.partial(xla.scan, chunk_size)
        case "triton":
            run = functools.partial(triton_scan.scan, chunk_size)
        case "mosaic":
            across_devices = sequence_axis is not None  # then states count, whoever asks for them
            state = state if across_devices else initial_state
            run = functools.partial(mosaic_scan.scan, chunk_size, return_state=return_state or across_devices)
        case _:
            raise _unknown(implementation)
    run = functools.partial(run, norm_eps=norm_eps)
    if sequence_axis is not None:
        run = functools.partial(across.scan, run, sequence_axis)
    y, state = run(seq, weights, state, segment_ids)
    return (y, state) if return_state else y


def mamba3_step(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    lam: jax.Array,
    omega: jax.Array,
    state: Mamba3State,
    *,
    b_bias: jax.Array | None = None,
    c_bias: jax.Array | None = None,
    mimo_x: jax.Array | None = None,
    mimo_z: jax.Array | None = None,
    mimo_o: jax.Array | None = None,
    d: jax.Array | None = None,
    z: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[jax.Array, Mamba3State]:
    """One token of the recurrence; arguments as in `mamba3_scan` without the length axis.

    "reference" and "xla" are the same here. "triton" is one kernel; where x and `state.ssm` are both bfloat16 and the
    rank is 4 or more, it reads y from the state as it is stored (rounded to bfloat16), not as it was before rounding.

    Returns:
      y [b, h, p] in x's dtype, and the next state, whose `ssm` and `b` keep the dtypes they came in.

    Raises:
      ValueError: a shape that does not fit (the argument is named), an unknown implementation or one that cannot run
        here (with the reason).
      TypeError: an argument that is not floating point.
    """
    token = Sequence(x, dt, a, b, c, lam, omega, z)
    weights = Weights(b_bias, c_bias, mimo_x, mimo_z, mimo_o, d, norm_weight)
    check_inputs(token, weights, state, None, has_length=False)
    run = triton_step.step if _step_in_triton(token, state, implementation) else reference.step
    y, new_state = run(token, weights, state, norm_eps)
    return y, new_state.stored_in(state.ssm.dtype, state.b.dtype)


def mamba3_projected_step(
    projected: jax.Array,
    state: Mamba3State,
    *,
    dt_bias: jax.Array,
    b_norm: jax.Array,
    c_norm: jax.Array,
    a_activation: str = "heavy_tail",
    a_floor: float = 1e-4,
    fixed_lambda: float | None = None,
    b_bias: jax.Array | None = None,
    c_bias: jax.Array | None = None,
    mimo_x: jax.Array | None = None,
    mimo_z: jax.Array | None = None,
    mimo_o: jax.Array | None = None,
    d: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-5,
    implementation: str | None = None,
) -> tuple[jax.Array, Mamba3State]:
    """`mamba3_step` of the `mamba3_coefficients` of one token; "triton" is one kernel, as decoding wants it.

    Args:
      projected: z and x [h·p], B and C [r·g·n], raw Δ, A and λ [h each; no λ if it is fixed] and raw angular rates [s]
        side by side, [b, width]; the sizes are those of the state, g follows from the width.
      state: state before the token, its x in the dtype of `projected`.
      dt_bias: as in `mamba3_coefficients`, like the next five.
      b_norm: weight of B's norm, [n].
      c_norm: weight of C's norm, [n].
      a_activation: "heavy_tail" or "softplus".
      a_floor: least decay rate.
      fixed_lambda: the trapezoid weight of all tokens; None = the projection has it.
      b_bias: as in `mamba3_scan`, like those below.
      c_bias: added to C per head, [h, r, n].
      mimo_x: input weight per rank, [h, r, p].
      mimo_z: gate weight per rank, [h, r, p].
      mimo_o: output weight per rank, [h, r, p].
      d: skip weight, [h].
      norm_weight: weight of the norm before the gate, [h, p].
      norm_eps: epsilon of all norms.
      implementation: as in `mamba3_step`.

    Returns:
      y [b, h, p] in the dtype of `projected`, and the next state, whose `ssm` and `b` keep the dtypes they came in.

    Raises:
      ValueError: as `mamba3_step`, and for an unknown activation.
      TypeError: an argument that is not floating point.
    """
    own, rule = ProjectionWeights(dt_bias, b_norm, c_norm), Rule(a_activation, a_floor, fixed_lambda)
    weights = Weights(b_bias, c_bias, mimo_x, mimo_z, mimo_o, d, norm_weight)

    def coefficients(projected: jax.Array, own: ProjectionWeights, state: Mamba3State) -> Sequence:
        return from_projection(projected, own, rule, state, norm_eps)

    token = jax.eval_shape(coefficients, projected, own, state)
    check_inputs(token, weights, state, None, has_length=False)
    if _step_in_triton(token, state, implementation):
        return triton_step.projected_step(projected, own, rule, weights, state, norm_eps)
    y, new_state = reference.step(coefficients(projected, own, state), weights, state, norm_eps)
    return y, new_state.stored_in(state.ssm.dtype, state.b.dtype)


def _step_in_triton(token: Sequence, state: Mamba3State, implementation: str | None) -> bool:
    """Whether the step is the kernel, else the reference; of `token` only shapes and dtypes matter."""
    why_not = _why_not_triton_step(token, state)
    if implementation is None:
        implementation = "reference" if why_not or partitioned() else "triton"
        _log_choice("step", implementation, jax.default_backend())
    match implementation:
        case "reference" | "xla":
            return False
        case "triton" | "mosaic":  # A step's kernel is Triton's on every GPU.
            _require(implementation, why_not)
            return True
        case _:
            raise _unknown(implementation)


def _why_not_mosaic(seq: Sequence, weights: Weights, chunk_size: int | None) -> str | None:
    return _NO_MOSAIC if mosaic_scan is None else mosaic_scan.unsupported(seq, weights, chunk_size)


def _why_not_triton(seq: Sequence, chunk_size: int | None) -> str | None:
    return no_triton_here() or triton_scan.unsupported(seq, chunk_size)


def _why_not_triton_step(token: Sequence, state: Mamba3State) -> str | None:
    return no_triton_here() or triton_step.unsupported(token, state)


def _require(implementation: str, why_not: str | None) -> None:
    if why_not is not None:
        raise CannotRunHereError(f'implementation = "{implementation}" cannot run here: {why_not}.')


def _unknown(implementation: str) -> ValueError:
    return ValueError(f"implementation = {implementation!r}; expected None or one of {', '.join(_IMPLEMENTATIONS)}.")


@functools.cache
def _log_choice(function: str, name: str, backend: str) -> None:
    _log.info("The Mamba-3 %s runs the %r implementation on %s.", function, name, backend)
