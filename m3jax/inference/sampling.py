"""Drawing the next token from logits: temperature, top-k, top-p, min-p and a penalty on repetition, all by row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3jax.errors import ConfigError

# Below this temperature the logits are divided by it all the same: the quotients stay finite in float32 and a best
# token ahead of the second by 1e-4 is drawn with certainty.
_SMALLEST_TEMPERATURE = 1e-6


class SamplingParams(NamedTuple):
    """How each row of a batch is sampled; arrays, so that other values do not compile anything anew."""

    temperature: ArrayLike  # [b] float32, at least 0; 0 = the most probable token
    top_k: ArrayLike  # [b] int32, how many of the most probable tokens are kept; 0 = all
    top_p: ArrayLike  # [b] float32 in (0, 1], the probability that the kept tokens reach together; 1 = all
    min_p: ArrayLike  # [b] float32 in [0, 1], least probability as a share of the best token's; 0 = all
    repetition_penalty: ArrayLike  # [b] float32 over 0, of tokens that the sequence has already; 1 = none

    @classmethod
    def for_batch(
        cls,
        batch: int,
        *,
        temperature: ArrayLike = 1.0,
        top_k: ArrayLike = 0,
        top_p: ArrayLike = 1.0,
        min_p: ArrayLike = 0.0,
        repetition_penalty: ArrayLike = 1.0,
    ) -> "SamplingParams":
        """Returns checked parameters for `batch` rows from one number, or one number per row, of each kind.

        Raises:
          ConfigError: a value outside its range, of the wrong type or of another number of rows.
        """
        return cls(
            _per_row("temperature", temperature, batch, np.float32, lambda v: v >= 0, "at least 0"),
            _per_row("top_k", top_k, batch, np.int32, lambda v: (v >= 0) & (v < 2**31), "in [0, 2^31) (0 keeps all)"),
            _per_row("top_p", top_p, batch, np.float32, lambda v: (v > 0) & (v <= 1), "in (0, 1] (1 keeps all)"),
            _per_row("min_p", min_p, batch, np.float32, lambda v: (v >= 0) & (v <= 1), "in [0, 1] (0 keeps all)"),
            _per_row(
                "repetition_penalty", repetition_penalty, batch, np.float32, lambda v: v > 0, "over 0 (1 is none)"
            ),
        )


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits [b, V] with those of `seen` tokens [b, V] made less likely (arXiv 1909.05858, section 4.1).

    Positive ones are divided by the penalty [b] and negative ones multiplied, as in Hugging Face transformers.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of tokens [b] by the softmax of logits [b, V]: [b]."""
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def sample(logits: jax.Array, keys: jax.Array, params: SamplingParams) -> jax.Array:
    """Draws one token per row.

    The filters act in the order of Hugging Face transformers. The logits are divided by the temperature; top-k keeps
    the k most probable tokens; of these, top-p keeps the fewest most probable whose probabilities, renormalised after
    top-k, reach p; min-p drops those less probable than min_p times the best. Between equal logits the smaller id
    counts as the more probable. The best token always stays.

    A row's token depends on that row's logits, key and parameters alone, not on the rest of the batch.

    Args:
      logits: [b, V] float32, of every token that may be drawn.
      keys: [b] random keys.
      params: the sampling parameters of each row.

    Returns:
      [b] int32 token ids.
    """
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.maximum(params.temperature, _SMALLEST_TEMPERATURE)[:, None]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # The sort is what costs time.
    last_logit, last_id = jax.lax.cond(
        jnp.any((params.top_k > 0) | (params.top_p < 1)), _last_kept, _keep_all, logits, ids, params
    )
    keep = (logits > last_logit) | ((logits == last_logit) & (ids <= last_id))
    keep &= logits >= jnp.log(params.min_p)[:, None]  # the best has logit 0
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    noise = jnp.where((params.temperature > 0)[:, None], noise, 0)
    return jnp.argmax(jnp.where(keep, logits + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _last_kept(logits: jax.Array, ids: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """Returns the logit and the id, each [b, 1], of the least probable token that top-k and then top-p keep."""
    vocab_size = logits.shape[-1]
    descending, order = jax.lax.sort((-logits, ids), num_keys=1, is_stable=True)
    top_k = jnp.where(params.top_k > 0, params.top_k, vocab_size)[:, None]
    in_top_k = ids < top_k  # here `ids` counts ranks
    probabilities = jax.nn.softmax(jnp.where(in_top_k, -descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding can bring the sum to 1 before the last token, so 1 is no bound but the absence of one.
    in_top_p = (before < params.top_p[:, None]) | (params.top_p >= 1)[:, None]
    last = jnp.maximum(jnp.sum(in_top_k & in_top_p, axis=-1, keepdims=True) - 1, 0)  # a subnormal top_p counts as 0
    return -jnp.take_along_axis(descending, last, axis=-1), jnp.take_along_axis(order, last, axis=-1)


def _keep_all(logits: jax.Array, ids: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    return jnp.full_like(logits[:, :1], -jnp.inf), jnp.full_like(ids[:, :1], logits.shape[-1])


def _per_row(name: str, value: ArrayLike, batch: int, dtype: type, is_valid: object, expected: str) -> np.ndarray:
    array = np.asarray(value)
    kinds, kind_name = ("iu", "integer") if dtype is np.int32 else ("iuf", "number")
    if array.dtype.kind not in kinds or array.shape not in ((), (batch,)):
        raise ConfigError(f"{name} = {value!r}: expected one {kind_name}, or one for each of the {batch} prompts.")
    invalid = ~(is_valid(array) & np.isfinite(array))
    if invalid.any():
        raise ConfigError(f"{name} = {array[invalid][0]}: expected a finite {kind_name} {expected}.")
    return np.broadcast_to(array.astype(dtype), (batch,))
