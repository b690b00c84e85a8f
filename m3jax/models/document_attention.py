"""Causal attention of packed documents on a GPU, by cuDNN's kernels for sequences of different lengths.

A mask would do too, and does where a sequence has many documents; but it is [b, l, l], read by every head, and spares
no product. Told where the documents are, cuDNN does what they need alone. Its backward takes memory for as many whole
sequences as a sequence may have documents, so that their number is bounded here.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m3jax.kernels import SCAN_RESIDUALS
from m3jax.kernels.documents import number_documents
from m3jax.kernels.gpu import compute_capability

try:  # Nothing public of jax takes the documents' offsets.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None

_MOST = 16  # documents of a sequence
_LEAST_CAPABILITY = 90  # the first for which cuDNN takes documents


def can_run() -> bool:
    """Whether `attend_documents` can run on the default device."""
    return cudnn is not None and compute_capability() >= _LEAST_CAPABILITY


@jax.custom_vjp
def attend_documents(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """As `attention.attend`, for arguments that cuDNN takes."""
    return _choose(_documents, _masked, q, k, v, segment_ids)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array):
    y = checkpoint_name(attend_documents(q, k, v, segment_ids), SCAN_RESIDUALS)
    return y, (q, k, v, segment_ids)


def _backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    *qkv, segment_ids = residuals

    def pullback(attend, q, k, v, document, cotangent):
        return jax.vjp(lambda *qkv: attend(*qkv, document), q, k, v)[1](cotangent)

    # The forward runs again here: what it would keep differs in shape between the two ways.
    ways = (functools.partial(pullback, way) for way in (_documents, _masked))
    return *_choose(*ways, *qkv, segment_ids, cotangent), None


attend_documents.defvjp(_forward, _backward)


def _choose(few, many, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *rest: jax.Array):
    document = number_documents(segment_ids)
    return jax.lax.cond(jnp.all(document[:, -1] < _MOST), few, many, q, k, v, document, *rest)


def _masked(q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array) -> jax.Array:
    mask = document[:, None, :, None] == document[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _documents(q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array) -> jax.Array:
    lengths, offsets = document_bounds(document)
    return cudnn.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=1 / math.sqrt(q.shape[-1]), mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def document_bounds(document: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lengths [b, most] and first positions [b, most + 1] of documents numbered from 0, [b, l]; -1 beyond the last."""
    number = jnp.arange(_MOST + 1)[None]
    ends = jnp.sum(document[:, None] <= number[..., None], axis=-1, dtype=jnp.int32)
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    is_there = number <= document[:, -1:]
    lengths, offsets = (jnp.where(is_there, v, -1) for v in (ends - starts, starts))
    return lengths[:, :-1], offsets
