"""Generation from token ids: prompts read by buckets of lengths, then one compiled loop for all of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from m3jax.config import round_up
from m3jax.errors import ConfigError
from m3jax.inference.listener import Listener, OnTokens
from m3jax.inference.prompts import Prefill, check_prompts, length_bucket, plan_prefills
from m3jax.inference.rows import NO_TOKEN, Drawing, Drawn, Rows, admit, decode, empty_rows
from m3jax.inference.sampling import GENERATOR, SamplingParams
from m3jax.kernels import one_device

_SMALLEST_OUTPUT = 256  # tokens a row has room for
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
    repetition_penalty: ArrayLike = 1.0,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: OnTokens | None = None,
    return_logprobs: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Continues a batch of prompts.

    Only another model, another number of prompts or a length that rounds up to another size compiles; other lengths and
    parameters do not. Token i of a row's sequence, the prompt counted, is drawn with the row's key folded with i. So a
    row does not depend on its neighbours, and with a key for every row two calls draw the same tokens as one long one.
    Prompts that are equal are read once.

    Args:
      model: a language model with the methods `initial_state`, `prefill`, `step`, `logits` and `separate_layers`, and
        its `config`.
      params: the model's parameters.
      prompt_tokens: [b, l] integers, or b sequences of any lengths of at least 1.
      max_new_tokens: how many tokens a row may gain.
      temperature: divides the logits; 0 takes the most probable token. As the next four, one number or one per row.
      top_k: keep this many of the most probable tokens; 0 keeps all.
      top_p: keep the most probable tokens that together reach this probability; 1 keeps all.
      min_p: drop tokens less probable than this share of the best token's probability; 0 keeps all.
      repetition_penalty: over 1 makes tokens that the row has already, prompt included, less likely; 1 does nothing.
      key: one random key, to be folded with the row's number, or b keys. None is `jax.random.key(0)`: the same call
        draws the same tokens.
      stop_tokens: ids that end the row they are drawn in; they are part of the result.
      on_tokens: called on the host after every step with the new tokens [b] int32, -1 in rows that have ended; may
        return [b] booleans, True to end that row with this token. What it raises ends the call and is raised by it.
      return_logprobs: return the tokens' log-probabilities too: those of the model itself, whatever temperature,
        filters and penalty did.

    Returns:
      [b, max_new_tokens] int32, the new tokens alone; -1 after a row's end. With return_logprobs a pair of it and
      [b, max_new_tokens] float32, 0 after a row's end.

    Raises:
      ConfigError: a parameter outside its range.
      DataError: a prompt that is empty, not integers, or has a token outside the vocabulary.
    """
    vocab_size = model.config.vocab_size
    prompts = check_prompts(prompt_tokens, vocab_size)
    batch = len(prompts)
    check_max_new_tokens(max_new_tokens)
    sampling = SamplingParams.for_batch(batch, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                        repetition_penalty=repetition_penalty)  # fmt: skip
    keys = _row_keys(key, batch)
    stop_tokens = pad_stop_tokens(stop_tokens, vocab_size)
    drawing = Drawing(keys, sampling, np.tile(stop_tokens, (batch, 1)))
    room = length_bucket(int(max_new_tokens), _SMALLEST_OUTPUT)
    params = _separate_layers(model, params)
    with one_device(params), nullcontext() if on_tokens is None else Listener(on_tokens) as listener:
        capacity = max(length_bucket(len(prompt)) for prompt in prompts) + room
        rows, first = _read_prompts(model, params, prompts, int(max_new_tokens), drawing, capacity)
        ended = np.zeros(batch, bool) if listener is None else listener.hear(first.tokens)
        number = None if listener is None else listener.number
        _, drawn = decode(model, params, rows, ended, np.int32(max_new_tokens - 1), number, most=room)
        drawn = jax.tree.map(np.asarray, drawn)
    tokens, logprobs = (
        np.concatenate([one[None], more])[:max_new_tokens].T for one, more in zip(first, drawn, strict=True)
    )
    return (tokens, logprobs) if return_logprobs else tokens


def _read_prompts(
    model: nn.Module, params: Any, prompts: list[np.ndarray], max_new_tokens: int, drawing: Drawing, capacity: int
) -> tuple[Rows, Drawn]:
    """Rows with a prompt and its first token each, and these tokens, [b]."""
    batch = len(prompts)
    rows = empty_rows(model, batch, capacity, drawing.stop_tokens.shape[1])
    first = Drawn(np.zeros(batch, np.int32), np.zeros(batch, np.float32))
    pending = []
    for plan in plan_prefills(prompts, batch):
        rows, drawn = enter(model, params, rows, plan, plan.members, drawing, [max_new_tokens] * batch)
        pending.append((plan.members, drawn))
    for members, drawn in pending:
        for all_, some in zip(first, drawn, strict=True):
            all_[members] = np.asarray(some)[: len(members)]
    return rows, first


def enter(
    model: nn.Module, params: Any, rows: Rows, plan: Prefill, targets: Sequence[int], drawing: Drawing,
    max_new_tokens: Sequence[int],
) -> tuple[Rows, Drawn]:  # fmt: skip
    """Admits a prefill's members.

    Args:
      model: as in `generate`.
      params: with separate layers.
      rows: the batch, whose memory the result takes.
      plan: what to read.
      targets: the row that each member goes to.
      drawing: of all prompts that were planned.
      max_new_tokens: of all prompts that were planned.

    Returns:
      The rows, and what was drawn for each member, [b], with anything after the last.
    """
    batch = rows.token.shape[0]

    def padded(values: Sequence[int]) -> np.ndarray:
        return np.array([*values, *[0] * (batch - len(values))], np.int32)

    which = padded(plan.members)
    return admit(
        model, params, rows, plan.tokens, plan.segment_ids, padded(plan.source), padded(targets),
        np.int32(len(plan.members)), np.asarray(max_new_tokens, np.int32)[which],
        jax.tree.map(lambda v: v[which], drawing),
    )  # fmt: skip


@partial(jax.jit, static_argnames="model")
def _separate_layers(model: nn.Module, params: Any) -> Any:
    return model.separate_layers(params)


def needs_room(model: nn.Module) -> bool:
    """Whether a state grows with the tokens it has room for."""
    one, two = (jax.tree.leaves(jax.eval_shape(lambda n=n: model.initial_state(1, n))) for n in (1, 2))
    return any(a.shape != b.shape for a, b in zip(one, two, strict=True))


def check_max_new_tokens(value: int) -> None:
    """Raises ConfigError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"max_new_tokens = {value!r}: expected an integer of at least 1.")


def _row_keys(key: jax.Array | None, batch: int) -> jax.Array:
    key = _check_key(key, batch)
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _check_key(key: jax.Array | None, batch: int) -> jax.Array:
    if key is None:
        return jax.random.key(0, impl=GENERATOR)
    dtype = getattr(key, "dtype", None)
    if dtype == np.uint32:  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(key, impl={2: GENERATOR}.get(key.shape[-1]))
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ConfigError(f"key = {key!r}: expected a random key, such as jax.random.key(0).")
    if str(jax.random.key_impl(key)) != GENERATOR:
        raise ConfigError(
            f"key is of {jax.random.key_impl(key)}, with which a row's tokens would depend on the others': expected "
            f"one of {GENERATOR}, such as jax.random.key(0, impl={GENERATOR!r})."
        )
    if key.shape not in ((), (batch,)):
        raise ConfigError(
            f"key has shape {key.shape}: expected one random key, or one for each of the {batch} prompts."
        )
    return key


def pad_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Returns the ids with padding that equals no token, so that another number of them rarely compiles."""
    for token in stop_tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise ConfigError(f"stop_tokens holds {token!r}: expected token ids in [0, {vocab_size}).")
    size = max(_STOP_TOKENS_MULTIPLE, round_up(len(stop_tokens), _STOP_TOKENS_MULTIPLE))
    return np.array([*stop_tokens, *[NO_TOKEN] * (size - len(stop_tokens))], np.int32)
