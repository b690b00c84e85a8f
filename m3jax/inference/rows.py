"""The device's part of generation: prompts enter rows of a batch, and one compiled loop draws tokens for all rows.

A row depends on nothing but its own request: everything that decides its tokens is in it, and no operation mixes rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from m3jax.inference.cache import put_rows, take_row
from m3jax.inference.listener import tell
from m3jax.inference.sampling import GENERATOR, SamplingParams, sample

PyTree = Any

NO_TOKEN = -1  # of a row that has ended

# How XLA compiles what reads prompts: not as a CUDA graph, whose hundreds of kernels would have to be told, one by one
# and before the first may run, where the new state is. A loop of steps has its arrays where they were.
READING = {"xla_gpu_enable_command_buffer": ""}


class Drawing(NamedTuple):
    """How the tokens of each row are drawn."""

    keys: jax.Array  # [b] random keys; token i of a sequence, the prompt counted, is drawn with its key folded with i
    sampling: SamplingParams
    stop_tokens: jax.Array  # [b, n] int32, padded with NO_TOKEN


class Rows(NamedTuple):
    """What the rows of a batch carry from token to token; V is the size of the vocabulary."""

    state: PyTree  # the model's, after all tokens but the last
    token: jax.Array  # [b] int32, the last one
    length: jax.Array  # [b] int32, tokens of the sequence, that one and the prompt counted
    left: jax.Array  # [b] int32, tokens that it may still gain; 0 in a row that has ended
    seen: jax.Array  # [b, V] bool, the tokens that the sequence has
    drawing: Drawing


class Drawn(NamedTuple):
    """Tokens as they come out."""

    tokens: jax.Array  # [..., b] int32; NO_TOKEN in rows that have ended
    logprobs: jax.Array  # [..., b] float32, of the tokens by the model alone; 0 where there is none


@partial(jax.jit, static_argnames=("model", "batch", "capacity", "stop_tokens"))
def empty_rows(model: nn.Module, batch: int, capacity: int, stop_tokens: int) -> Rows:
    """Rows that have ended, with room for `capacity` tokens and for so many stop tokens each."""
    none = jnp.zeros(batch, jnp.int32)
    keys = jnp.broadcast_to(jax.random.key(0, impl=GENERATOR), (batch,))
    sampling = jax.tree.map(jnp.asarray, SamplingParams.for_batch(batch))
    drawing = Drawing(keys, sampling, jnp.full((batch, stop_tokens), NO_TOKEN, jnp.int32))
    seen = jnp.zeros((batch, model.config.vocab_size), bool)
    return Rows(model.initial_state(batch, capacity), none, none, none, seen, drawing)


@partial(jax.jit, static_argnames="model", donate_argnames="rows", compiler_options=READING)
def admit(
    model: nn.Module,
    params: PyTree,
    rows: Rows,
    prompts: jax.Array,  # [r, l] int32, left-padded
    segment_ids: jax.Array,  # [r, l] int32, 1 on a prompt and 0 on padding
    source: jax.Array,  # [b] int32, the prompt that each newcomer has
    target: jax.Array,  # [b] int32, the row that it goes to
    newcomers: jax.Array,  # [] int32, of b
    max_new_tokens: jax.Array,  # [b] int32, of each newcomer
    drawing: Drawing,  # of each newcomer
) -> tuple[Rows, Drawn]:
    """Reads prompts, draws each newcomer's first token, and puts the newcomers into their rows.

    Returns:
      The rows, and what was drawn for each newcomer, [b].
    """
    count = jnp.arange(prompts.shape[0])[:, None]
    seen = jnp.zeros((prompts.shape[0], model.config.vocab_size), bool).at[count, prompts].max(segment_ids == 1)
    hidden, state = model.apply(
        {"params": params}, prompts, segment_ids, model.initial_state(*prompts.shape), method="prefill"
    )
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    length = segment_ids.sum(axis=1, dtype=jnp.int32)
    new = Rows((), jnp.zeros_like(target), length[source], max_new_tokens, seen[source], drawing)
    new, drawn = draw(model, logits[source], new)

    def enter(i: jax.Array, rows: Rows) -> Rows:
        return put_rows(rows, target[i], take_row(new, i)._replace(state=take_row(state, source[i])))

    return jax.lax.fori_loop(0, newcomers, enter, rows), drawn


@partial(jax.jit, static_argnames="model", compiler_options=READING)
def read(
    model: nn.Module, params: PyTree, state: PyTree, seen: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """The logits [b, ...] after more tokens [b, l], the state with them, and `seen` with them."""
    hidden, state = model.apply({"params": params}, tokens, None, state, method="prefill")
    seen = seen.at[jnp.arange(tokens.shape[0])[:, None], tokens].set(True)
    return model.apply({"params": params}, hidden[:, -1], method="logits"), state, seen


@partial(jax.jit, static_argnames=("model", "most"), donate_argnames="rows")
def decode(
    model: nn.Module,
    params: PyTree,
    rows: Rows,
    ended: jax.Array,  # [b] bool, rows that end here
    steps: jax.Array,  # [] int32
    listener: jax.Array | None,  # [] int32, its number
    *,
    most: int,
) -> tuple[Rows, Drawn]:
    """Draws tokens until all rows have ended, at most `steps`, which is at most `most`.

    Returns:
      The rows, and what was drawn, [most, b]; nothing after the last step.
    """
    batch = rows.token.shape[0]
    drawn = Drawn(jnp.full((most, batch), NO_TOKEN, jnp.int32), jnp.zeros((most, batch), jnp.float32))

    def unfinished(carry: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
        step, rows, _ = carry
        return (step < steps) & jnp.any(rows.left > 0)

    def advance(carry: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
        step, rows, drawn = carry
        logits, state = model.apply({"params": params}, rows.token, rows.state, method="step")
        rows, new = draw(model, logits, rows._replace(state=state))
        if listener is not None:
            # The next step waits for the answer, which keeps the calls in order.
            rows = rows._replace(left=jnp.where(tell(listener, new.tokens), 0, rows.left))
        return step + 1, rows, jax.tree.map(lambda all_, one: all_.at[step].set(one), drawn, new)

    rows = rows._replace(left=jnp.where(ended, 0, rows.left))
    _, rows, drawn = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), rows, drawn))
    return rows, drawn


@partial(jax.jit, static_argnames="model")
def draw(model: nn.Module, logits: jax.Array, rows: Rows) -> tuple[Rows, Drawn]:
    """The rows with a token more, drawn from logits [b, ...], unless they have ended."""
    logits = logits[
        :, : model.config.vocab_size
    ]  # the padding rows of the embedding have logits too, but are no tokens
    keys = jax.vmap(jax.random.fold_in)(rows.drawing.keys, rows.length)
    running, sampling = rows.left > 0, rows.drawing.sampling
    # A row that has ended asks for no sort, which all rows would wait for.
    sampling = sampling._replace(
        top_k=jnp.where(running, sampling.top_k, 0), top_p=jnp.where(running, sampling.top_p, 1)
    )
    token, logprob = sample(logits, rows.seen, keys, sampling)
    stops = jnp.any(token[:, None] == rows.drawing.stop_tokens, axis=-1)
    drawn = Drawn(jnp.where(running, token, NO_TOKEN), jnp.where(running, logprob, 0).astype(jnp.float32))
    left = jnp.where(stops, 0, jnp.maximum(rows.left - 1, 0))
    seen = rows.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return rows._replace(token=token, length=rows.length + 1, left=left, seen=seen), drawn
