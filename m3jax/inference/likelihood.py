"""Log-likelihoods of given continuations: batches of few shapes, and the head only where a token is predicted.

A sequence is padded behind its end, which a causal model does not see. Continuations that share what the model reads
(the one-token answers to a question) share a row.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from m3jax.errors import DataError
from m3jax.inference.batches import Batch, length_batches
from m3jax.inference.prompts import check_prompts
from m3jax.inference.sampling import log_probability
from m3jax.kernels import one_device

_MOST_LOGITS, _FEWEST_LOGITS = 1024, 64  # tokens whose logits exist at one time


class Continuation(NamedTuple):
    """Tokens, and tokens that may follow them; at least one of each."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
      log_likelihood: Σ log p(token | all before it), in nats; p is over the whole head, as in the training loss.
      is_greedy: whether each of its tokens is the most probable one, so that greedy generation gives them.
    """

    log_likelihood: float
    is_greedy: bool


class _Request(NamedTuple):
    index: int
    start: int  # position of the last token of the context
    targets: np.ndarray


def score_continuations(
    model: nn.Module, params: Any, continuations: Sequence[Continuation], *, max_length: int, batch_tokens: int
) -> Iterator[tuple[int, Score]]:
    """Yields (index, score) of every continuation, those of the longest sequences first.

    Args:
      model: a language model with the methods `hidden` and `logits`, and its `config`.
      params: the model's parameters.
      continuations: what to score.
      max_length: the model reads at most this many tokens, of a longer sequence those at the end.
      batch_tokens: how many tokens are computed at one time, padding included.

    Raises:
      DataError: an empty context or continuation, a token outside the vocabulary, or a continuation over max_length.
    """
    requests: dict[bytes, list[_Request]] = {}  # by what the model reads
    for i, (context, tokens) in enumerate(continuations):
        _check(i, context, tokens, max_length)
        (sequence,) = check_prompts([[*context, *tokens]], model.config.vocab_size)
        read = sequence[-(max_length + 1) :][:-1].astype(np.int32)
        request = _Request(i, len(read) - len(tokens), sequence[len(context) :].astype(np.int32))
        requests.setdefault(read.tobytes(), []).append(request)
    rows = [(np.frombuffer(read, np.int32), same) for read, same in requests.items()]
    before = None
    for batch in length_batches([len(tokens) for tokens, _ in rows], batch_tokens):
        members = [rows[i] for i in batch.members]
        # The device computes this batch while the host reads the results of the one before.
        with one_device(params):
            dispatched = members, _dispatch(model, params, batch, members)
        if before is not None:
            yield from _read(*before)
        before = dispatched
    if before is not None:
        yield from _read(*before)


def _dispatch(
    model: nn.Module, params: Any, batch: Batch, members: list[tuple[np.ndarray, list[_Request]]]
) -> list[tuple[jax.Array, jax.Array]]:
    """Starts to compute a batch; returns (log p, is the best) of all targets in turn, then padding, in chunks."""
    tokens = np.zeros((batch.rows, batch.size), np.int32)
    positions, targets = [], []
    for row, (read, requests) in enumerate(members):
        tokens[row, : len(read)] = read
        for request in requests:
            positions.append(row * batch.size + request.start + np.arange(len(request.targets), dtype=np.int32))
            targets.append(request.targets)
    hidden = _hidden(model, params, tokens)
    positions, targets, scores = np.concatenate(positions), np.concatenate(targets), []
    for start in range(0, len(positions), _MOST_LOGITS):
        chunk = slice(start, start + _MOST_LOGITS)
        n = len(positions[chunk])
        padding = (0, max(_FEWEST_LOGITS, 1 << (n - 1).bit_length()) - n)  # only the last chunk has any
        scores.append(
            _score_tokens(model, params, hidden, np.pad(positions[chunk], padding), np.pad(targets[chunk], padding))
        )
    return scores


def _read(
    members: list[tuple[np.ndarray, list[_Request]]], scores: list[tuple[jax.Array, jax.Array]]
) -> Iterator[tuple[int, Score]]:
    log_p, is_best = (np.concatenate(chunks) for chunks in zip(*jax.device_get(scores), strict=True))
    end = 0
    for request in (request for _, requests in members for request in requests):
        start, end = end, end + len(request.targets)
        yield request.index, Score(float(log_p[start:end].sum(dtype=np.float64)), bool(is_best[start:end].all()))


@partial(jax.jit, static_argnames="model")
def _hidden(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """[b, l] → [b * l, d_model]."""
    hidden = model.apply({"params": params}, tokens, method="hidden")
    return hidden.reshape(-1, hidden.shape[-1])


@partial(jax.jit, static_argnames="model")
def _score_tokens(
    model: nn.Module, params: Any, hidden: jax.Array, positions: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of targets [n] after these positions [n]: log p, and whether no token of the vocabulary is more probable."""
    logits = model.apply({"params": params}, hidden[positions], method="logits")
    best = jnp.argmax(logits[:, : model.config.vocab_size], axis=-1)
    return log_probability(logits, targets), best == targets


def _check(i: int, context: Sequence[int], tokens: Sequence[int], max_length: int) -> None:
    for name, part in (("context", context), ("tokens", tokens)):
        if len(part) == 0:
            raise DataError(f"continuations[{i}].{name} is empty: expected at least one token.")
    if len(tokens) > max_length:
        raise DataError(
            f"continuations[{i}] has {len(tokens)} tokens: expected at most max_length = {max_length}, all that the "
            "model reads."
        )
