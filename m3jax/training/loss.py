"""Cross-entropy of a linear head without the logits of the whole batch.

Logits exist for a chunk of positions at a time. Their gradient follows from them at once, so the forward pass also
forms the gradients of the hidden states and of the head, and the backward pass only scales them: the head's product is
computed once, not twice.
"""

import functools

import jax
import jax.numpy as jnp

from m3jax.kernels.products import operand_dtype


def linear_cross_entropy(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Σ weight · -log softmax(hidden · embeddingᵀ)[target].

    Args:
      hidden: [b, l, d]; its dtype is that of the matrix products' operands (sums are float32 or better).
      embedding: the head's weight, [V, d].
      targets: int, [b, l], in [0, V).
      weights: [b, l]; 0 leaves a position out.
      chunk: about how many tokens have logits at one time.

    Returns:
      A float32 (float64 for float64 inputs) scalar; differentiable in hidden and embedding.
    """
    batch, length, _ = hidden.shape
    positions = min(length, max(1, chunk // batch))
    padding = -length % positions

    def split(v: jax.Array) -> jax.Array:  # [b, l, ...] → [chunks, b, positions, ...]
        v = jnp.pad(v, [(0, 0), (0, padding)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(batch, -1, positions, *v.shape[2:]), 1, 0)

    return _chunked_nll(split(hidden), embedding, split(targets), split(weights))


@jax.custom_vjp
def _chunked_nll(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    head = embedding.astype(operand_dtype(hidden.dtype))

    def body(total: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        logits, log_z = _logits(chunk[0], head)
        return total + _nll_sum(logits, log_z, *chunk[1:]), None

    return jax.lax.scan(body, jnp.zeros((), _sum_dtype(hidden)), (hidden, targets, weights))[0]


def _forward(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array):
    operand = operand_dtype(hidden.dtype)
    head = embedding.astype(operand)
    product = functools.partial(jnp.einsum, preferred_element_type=_sum_dtype(hidden))

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array, jax.Array]):
        total, head_grad = carry
        h, target, weight = chunk
        logits, log_z = _logits(h, head)
        total = total + _nll_sum(logits, log_z, target, weight)
        one_hot = target[..., None] == jnp.arange(logits.shape[-1])[None, None]
        logits_grad = ((jnp.exp(logits - log_z[..., None]) - one_hot) * weight[..., None]).astype(operand)
        hidden_grad = product("blv,vd->bld", logits_grad, head).astype(h.dtype)
        head_grad = head_grad + product("blv,bld->vd", logits_grad, h.astype(operand))
        return (total, head_grad), hidden_grad

    start = jnp.zeros((), _sum_dtype(hidden)), jnp.zeros(embedding.shape, _sum_dtype(hidden))
    (total, head_grad), hidden_grad = jax.lax.scan(body, start, (hidden, targets, weights))
    return total, (hidden_grad, head_grad.astype(embedding.dtype))


def _backward(gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    hidden_grad, head_grad = gradients
    return (
        (hidden_grad * cotangent).astype(hidden_grad.dtype),
        (head_grad * cotangent).astype(head_grad.dtype),
        None,
        None,
    )


_chunked_nll.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = jnp.einsum("bld,vd->blv", hidden.astype(head.dtype), head, preferred_element_type=_sum_dtype(hidden))
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _nll_sum(logits: jax.Array, log_z: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.sum(weight.astype(logits.dtype) * (log_z - chosen))


def _sum_dtype(hidden: jax.Array) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)
