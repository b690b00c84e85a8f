"""The Triton implementation behind `mamba3_scan`: what it can take, how it cuts a shape up, and its two ends in JAX."""

import functools

import jax
import jax.numpy as jnp

from ...documents import number_documents
from ...triton_launch import MAX_ELEMENTS, batch_too_large
from ..ends import entering_ssm, leaving_state, start_at_last_document
from ..inputs import Sequence, Weights
from ..readout import without_readout
from ..state import Mamba3State
from . import op
from .plans import choose_plan, too_large
from .readout import read_rows

_MAX_WIDTH = 256  # of the state and of a head, padded to a power of two
_OPERANDS = (jnp.float32, jnp.bfloat16, jnp.float16)


def unsupported(seq: Sequence, chunk_size: int | None) -> str | None:
    """Why the kernels cannot take these inputs; None if they can."""
    rank, _, n = seq.b.shape[2:]
    p = seq.x.shape[-1]
    for name in "xbcz":
        v = getattr(seq, name)
        if v is not None and v.dtype not in _OPERANDS:
            return f"{name} has dtype {v.dtype}; the Triton kernels take float32, bfloat16 and float16"
    if n > _MAX_WIDTH or p > _MAX_WIDTH // 2:
        return f"n = {n}, p = {p}; the Triton kernels take n up to {_MAX_WIDTH} and p up to {_MAX_WIDTH // 2}"
    reason = too_large(p, n) or batch_too_large(seq.x.shape[0])
    if reason is not None:
        return reason
    if rank & (rank - 1) or rank > 16:
        return f"rank {rank}; the Triton kernels take powers of two up to 16"
    if max(rank * seq.x.size, seq.b.size) >= MAX_ELEMENTS:
        return f"b, or x times rank {rank}, has 2^31 elements or more; the Triton kernels take fewer: split the batch"
    if chunk_size is not None and (chunk_size & (chunk_size - 1) or not 16 <= chunk_size * rank <= 128):
        return (
            f"chunk_size = {chunk_size}; the Triton kernels take powers of two with 16 to 128 rows (positions · rank)"
        )
    return None


def scan(
    chunk_size: int | None,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State,
    segment_ids: jax.Array | None,
    norm_eps: float,
) -> tuple[jax.Array, Mamba3State]:
    """Same contract as `xla.scan`."""
    dtype = seq.x.dtype
    operand = jnp.result_type(*(v for v in (seq.x, seq.b, seq.c, seq.z) if v is not None))
    narrow = {name: None if getattr(seq, name) is None else getattr(seq, name).astype(operand) for name in "xbcz"}
    wide = {name: getattr(seq, name).astype(jnp.float32) for name in ("dt", "a", "lam", "omega")}
    seq = seq._replace(**narrow, **wide)
    plan = choose_plan(seq, chunk_size)._replace(row_output=weights.norm_weight is not None)
    y, state = _scan(plan, norm_eps, seq, weights, state, segment_ids)
    return y.astype(dtype), state._replace(x=state.x.astype(dtype))


# A program then has one copy of the kernels for all its layers of a shape, lowered once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(
    plan: op.Plan,
    norm_eps: float,
    seq: Sequence,
    weights: Weights,
    state: Mamba3State,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, Mamba3State]:
    acc = jnp.float32
    document = None if segment_ids is None else number_documents(segment_ids)
    kernel_seq, kernel_weights = without_readout(seq, weights) if plan.row_output else (seq, weights)
    s = seq.omega.shape[-1]
    ssm = op.to_kernel_order(entering_ssm(seq, weights, state, acc), s)
    inputs = op.Inputs(kernel_seq, kernel_weights, ssm, state.angle.astype(acc), document)
    y, ssm, angle = op.scan(plan, inputs)
    if plan.row_output:
        y = read_rows(y, seq, weights, norm_eps)
    ssm = op.from_kernel_order(ssm, s)
    if document is not None:
        ssm, angle = start_at_last_document(ssm, angle, seq, state, document)
    return y, leaving_state(angle, ssm, seq, weights, acc)
