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


GENERATOR = "threefry2x32"  # of random numbers: mapped over keys, those of a key depend on it alone


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
                "repetition_penalty",
                repetition_penalty,
                batch,
                np.float32,
                lambda v: (v > 1e-30) & (v < 1e30),
                "over 0 (1 is none), from 1e-30 to 1e30",
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


def sample(logits: jax.Array, seen: jax.Array, keys: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Penalty and filters act in the order of Hugging Face transformers. Tokens that the sequence has are penalised; the
    logits are divided by the temperature; top-k keeps the k most probable tokens; of these, top-p keeps the fewest most
    probable whose probabilities, renormalised after top-k, reach p; min-p drops those less probable than min_p times
    the best. Between equal logits the smaller id counts as the more probable. The best token always stays.

    A row's token depends on that row's logits, seen tokens, key and parameters alone, not on the rest of the batch.

    Args:
      logits: [b, V] float32, of every token that may be drawn.
      seen: [b, V] bool, the tokens that each sequence has.
      keys: [b] random keys.
      params: the sampling parameters of each row.

    Returns:
      [b] int32 token ids, and their log-probabilities by the softmax of the logits as they came, [b].
    """
    # The batch's logits are large. They are read twice, for the best and for the token, and nothing of their size is
    # written: what the branches below need is computed again in there.
    best, log_total = _best_and_log_total(logits, seen, params)
    # The sort is what costs time.
    last_logit, last_id = jax.lax.cond(
        jnp.any((params.top_k > 0) | (params.top_p < 1)), _last_kept, _keep_all, logits, seen, best, params
    )
    penalised, ids = penalise(logits, seen, params.repetition_penalty), _ids(logits)
    keep = (penalised > last_logit) | ((penalised == last_logit) & (ids <= last_id))
    scaled = _scale(penalised, best, params)
    keep &= scaled >= jnp.log(params.min_p)[:, None]  # the best has 0
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    noise = jnp.where((params.temperature > 0)[:, None], noise, 0)
    tokens = jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total


def _best_and_log_total(logits: jax.Array, seen: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """The largest penalised logit and the logarithm of the sum of the logits' exponentials, [b] each, in one pass."""
    penalised = penalise(logits, seen, params.repetition_penalty)

    def join(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest = jnp.maximum(one[1], other[1])
        base = jnp.where(jnp.isfinite(largest), largest, 0)  # of nothing yet, or of logits that are all -inf
        total = one[2] * jnp.exp(one[1] - base) + other[2] * jnp.exp(other[1] - base)
        return jnp.maximum(one[0], other[0]), largest, total

    lowest, none = (jnp.array(v, logits.dtype) for v in (-jnp.inf, 0))
    best, largest, total = jax.lax.reduce(
        (penalised, logits, jnp.ones_like(logits)), (lowest, lowest, none), join, dimensions=(1,)
    )
    return best, jnp.where(jnp.isfinite(largest), largest, 0) + jnp.log(total)


def _scale(penalised: jax.Array, best: jax.Array, params: SamplingParams) -> jax.Array:
    """Penalised logits, [b, V], over the temperature, the best of them 0."""
    return (penalised - best[:, None]) / jnp.maximum(params.temperature, _SMALLEST_TEMPERATURE)[:, None]


def _ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)


def _last_kept(
    logits: jax.Array, seen: jax.Array, best: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """The penalised logit and the id, each [b, 1], of the least probable token that top-k and then top-p keep."""
    ids = _ids(logits)  # and ranks
    descending, order = jax.lax.sort(
        (-penalise(logits, seen, params.repetition_penalty), ids), num_keys=1, is_stable=True
    )
    top_k = jnp.where(params.top_k > 0, params.top_k, logits.shape[-1])[:, None]
    in_top_k = ids < top_k
    probabilities = jax.nn.softmax(jnp.where(in_top_k, _scale(-descending, best, params), -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding can bring the sum to 1 before the last token, so 1 is no bound but the absence of one.
    in_top_p = (before < params.top_p[:, None]) | (params.top_p >= 1)[:, None]
    last = jnp.maximum(jnp.sum(in_top_k & in_top_p, axis=-1, keepdims=True) - 1, 0)  # a subnormal top_p counts as 0
    return -jnp.take_along_axis(descending, last, axis=-1), jnp.take_along_axis(order, last, axis=-1)


def _keep_all(
    logits: jax.Array, seen: jax.Array, best: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    return jnp.full_like(logits[:, :1], -jnp.inf), jnp.full_like(_ids(logits)[:, :1], logits.shape[-1])


def _per_row(name: str, value: ArrayLike, batch: int, dtype: type, is_valid: object, expected: str) -> np.ndarray:
    array = np.asarray(value)
    kinds, kind_name = ("iu", "integer") if dtype is np.int32 else ("iuf", "number")
    if array.dtype.kind not in kinds or array.shape not in ((), (batch,)):
        raise ConfigError(f"{name} = {value!r}: expected one {kind_name}, or one for each of the {batch} prompts.")
    invalid = ~(is_valid(array) & np.isfinite(array))
    if invalid.any():
        raise ConfigError(f"{name} = {array[invalid][0]}: expected a finite {kind_name} {expected}.")
    return np.broadcast_to(array.astype(dtype), (batch,))


def check_seed(seed: int) -> None:
    """Raises ConfigError unless a random key can be made of it."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed!r}: expected an integer in [0, 2^32).")
