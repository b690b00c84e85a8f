"""Generation from token ids: the prompts' prefill and the decode loop, together one compiled program."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from m3jax.errors import ConfigError
from m3jax.inference.listener import Listener, OnTokens, tell
from m3jax.inference.prompts import check_prompts, left_pad, length_bucket
from m3jax.inference.sampling import SamplingParams, sample

NO_TOKEN = -1  # fills a row after its end
_SMALLEST_OUTPUT = 256  # tokens a row of the output has room for
_STOP_TOKENS_MULTIPLE = 8


def generate(
    model: nn.Module,
    params: Any,
    prompt_tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: OnTokens | None = None,
) -> np.ndarray:
    """Continues a batch of prompts.

    Only another model, another number of prompts or a length that rounds up to another size compiles; other lengths and
    parameters do not. Token i of a row's sequence, the prompt counted, is drawn with the row's key folded with i. So a
    row does not depend on its neighbours, and with a key for every row two calls draw the same tokens as one long one.

    Args:
      model: a language model with the methods `initial_state`, `prefill`, `step` and `logits`, and its `config`.
      params: the model's parameters.
      prompt_tokens: [b, l] integers, or b sequences of any lengths of at least 1.
      max_new_tokens: how many tokens a row may gain.
      temperature: divides the logits; 0 takes the most probable token. As the next three, one number or one per row.
      top_k: keep this many of the most probable tokens; 0 keeps all.
      top_p: keep the most probable tokens that together reach this probability; 1 keeps all.
      min_p: drop tokens less probable than this share of the best token's probability; 0 keeps all.
      key: one random key, to be folded with the row's number, or b keys. None is `jax.random.key(0)`: the same call
        draws the same tokens.
      stop_tokens: ids that end the row they are drawn in; they are part of the result.
      on_tokens: called on the host after every step with the new tokens [b] int32, -1 in rows that have ended; may
        return [b] booleans, True to end that row with this token. What it raises ends the call and is raised by it.

    Returns:
      [b, max_new_tokens] int32, the new tokens alone; -1 after a row's end.

    Raises:
      ConfigError: a parameter outside its range.
      DataError: a prompt that is empty, not integers, or has a token outside the vocabulary.
    """
    vocab_size = model.config.vocab_size
    prompts = check_prompts(prompt_tokens, vocab_size)
    batch = len(prompts)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens!r}: expected an integer of at least 1.")
    sampling = SamplingParams.for_batch(batch, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    key = _check_key(key, batch)
    stop_tokens = _pad_stop_tokens(stop_tokens, vocab_size)
    with nullcontext() if on_tokens is None else Listener(on_tokens) as listener:
        output = _prefill_and_decode(
            model,
            params,
            *left_pad(prompts),
            key,
            sampling,
            stop_tokens,
            np.int32(max_new_tokens),
            None if listener is None else listener.number,
            output_size=length_bucket(int(max_new_tokens), _SMALLEST_OUTPUT),
        )
        return np.asarray(output)[:, :max_new_tokens]


@partial(jax.jit, static_argnames=("model", "output_size"))
def _prefill_and_decode(
    model: nn.Module,
    params: Any,
    prompts: jax.Array,  # [b, l] int32, left-padded
    segment_ids: jax.Array,  # [b, l] int32, 1 on the prompt and 0 on the padding
    lengths: jax.Array,  # [b] int32
    key: jax.Array,  # [] or [b]
    sampling: SamplingParams,
    stop_tokens: jax.Array,  # [n] int32
    max_new_tokens: jax.Array,  # [] int32
    listener: jax.Array | None,  # [] int32, its number
    *,
    output_size: int,
) -> jax.Array:
    """Returns [b, output_size] int32, of which the first max_new_tokens columns are the result."""
    batch = prompts.shape[0]
    row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    apply = partial(model.apply, {"params": params})

    def advance(carry):
        step, logits, state, done, output = carry
        keys = jax.vmap(jax.random.fold_in)(row_keys, lengths + step)
        # The padding rows of the embedding have logits too, but are no tokens.
        tokens = sample(logits[:, : model.config.vocab_size], keys, sampling)
        new = jnp.where(done, NO_TOKEN, tokens)
        done |= jnp.any(new[:, None] == stop_tokens[None, :], axis=-1)
        if listener is not None:
            done |= tell(listener, new)  # the next step waits for `done`, which keeps the calls in order
        # Not needed after the last token, but a branch here could cost a copy of the state at every step.
        logits, state = apply(tokens, state, method="step")
        return step + 1, logits, state, done, output.at[:, step].set(new)

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    state = model.initial_state(batch, prompts.shape[1] + output_size)
    hidden, state = apply(prompts, segment_ids, state, method="prefill")
    logits = apply(hidden[:, -1], method="logits")
    output = jnp.full((batch, output_size), NO_TOKEN, jnp.int32)
    *_, output = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), logits, state, jnp.zeros(batch, bool), output))
    return output


def _check_key(key: jax.Array | None, batch: int) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    dtype = getattr(key, "dtype", None)
    if dtype == np.uint32:  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(key)
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ConfigError(f"key = {key!r}: expected a random key, such as jax.random.key(0).")
    if key.shape not in ((), (batch,)):
        raise ConfigError(
            f"key has shape {key.shape}: expected one random key, or one for each of the {batch} prompts."
        )
    return key


def _pad_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Returns the ids with padding that equals no token, so that another number of them rarely compiles."""
    for token in stop_tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise ConfigError(f"stop_tokens holds {token!r}: expected token ids in [0, {vocab_size}).")
    size = max(_STOP_TOKENS_MULTIPLE, -(-len(stop_tokens) // _STOP_TOKENS_MULTIPLE) * _STOP_TOKENS_MULTIPLE)
    return np.array([*stop_tokens, *[NO_TOKEN] * (size - len(stop_tokens))], np.int32)
