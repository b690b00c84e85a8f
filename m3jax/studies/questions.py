"""Sequences of a task with the positions that ask, drawn on the device many batches at a time.

Drawing is a program apart from training: its loops (brackets go down a tree, level by level) run once for a whole block
of steps, and tasks whose arrays have the same shapes share the compiled training step.

Packed rows hold two sequences each. Lengths are drawn in pairs that add up to the shortest and the longest, so that
every pair fits into a row of these two; each of them is drawn evenly all the same, and half as many rows are computed.

Letters: n steps, s seeds, b sequences, w positions, k supervised positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3jax.data.tasks import Task
from m3jax.data.tasks.task import Length, draw_lengths

# Streams of random numbers, apart from each other and from all others of a seed.
INITIALISATION, DATA, VALIDATION, TEST = range(4)


class Questions(NamedTuple):
    """Sequences, padded on the right, which no causal model sees."""

    tokens: jax.Array  # int32 [..., b, w]
    positions: jax.Array  # int32 [..., b, k], where answers are due
    targets: jax.Array  # int32 [..., b, k]
    real: jax.Array  # bool [..., b, k]; False = a sequence with fewer answers than k
    documents: jax.Array | None = None  # int32 [..., b, w], which sequence of its row a position is of; None = one each


def stream(seed: jax.Array | int, purpose: int) -> jax.Array:
    """A key for one purpose of a seed."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


@functools.partial(jax.jit, static_argnames=("task", "batch_size", "width", "answers", "bos"))
def draw_questions(
    key: jax.Array, task: Task, batch_size: int, shortest: Length, longest: Length, width: int, answers: int, bos: bool
) -> Questions:
    """Draws a batch.

    Args:
      key: a jax key.
      task: what is asked.
      batch_size: b.
      shortest: least length, in the task's own count; may be traced.
      longest: greatest length; may be traced.
      width: w, with the token before the sequence if there is one.
      answers: k, at least the task's number for the longest sequence.
      bos: put a token that the task does not have, its vocabulary's size, before every sequence.
    """
    batch = task.sample(key, batch_size, shortest, longest, width - bos)
    _, positions = jax.lax.top_k(batch.mask.astype(jnp.int32), answers)  # the first where it is one, then others
    positions = positions.astype(jnp.int32)
    targets, real = (jnp.take_along_axis(v, positions, axis=1) for v in (batch.targets, batch.mask))
    tokens = jnp.pad(batch.tokens, ((0, 0), (int(bos), 0)), constant_values=task.vocab_size)
    return Questions(tokens, positions + bos, targets, real)


def draw_packed(
    key: jax.Array, task: Task, batch_size: int, shortest: Length, longest: Length, width: int, answers: int, bos: bool
) -> Questions:
    """Draws a batch of half as many rows, arguments as in `draw_questions`; w for a shortest and a longest sequence."""
    length_key, key = jax.random.split(key)
    first = draw_lengths(length_key, batch_size // 2, shortest, longest)
    lengths = jnp.stack([first, shortest + longest - first])

    def draw(key: jax.Array, length: jax.Array) -> Questions:
        one = draw_questions(key, task, 1, length, length, width, answers, bos)
        return jax.tree.map(lambda v: v[0], one)

    drawn = jax.vmap(jax.vmap(draw))(jax.random.split(key, lengths.shape), lengths)
    return jax.vmap(_pack)(*(jax.tree.map(lambda v, i=i: v[i], drawn) for i in range(2)))


def _pack(first: Questions, second: Questions) -> Questions:
    """Puts the second sequence behind the last answer of the first; rows [w], [k] → [w], [2k]."""
    begins = 1 + jnp.max(jnp.where(first.real, first.positions, 0))
    at = jnp.arange(first.tokens.shape[-1])
    asked = jnp.concatenate([first.positions, jnp.minimum(second.positions + begins, at[-1])])
    targets, real = (jnp.concatenate(both) for both in ((first.targets, second.targets), (first.real, second.real)))
    tokens = jnp.where(at < begins, first.tokens, jnp.roll(second.tokens, begins))
    return Questions(tokens, asked, targets, real, (at >= begins).astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("task", "batch_size", "width", "answers", "bos", "packed"))
def draw_block(
    seeds: jax.Array, steps: jax.Array, shortest: jax.Array, longest: jax.Array, *, task: Task, batch_size: int,
    width: int, answers: int, bos: bool, packed: bool,
) -> Questions:  # fmt: skip
    """Draws the batches of several steps for several seeds; what a step draws depends on its number and width alone.

    Args:
      seeds: int32 [s].
      steps: int32 [n], their numbers.
      shortest: int32 [n], of every step.
      longest: int32 [n], likewise.
      task: what is asked; it and the rest as in `draw_questions`.
      batch_size: b.
      width: w.
      answers: k.
      bos: whether a token of its own comes first.
      packed: whether rows hold two sequences.

    Returns:
      Arrays [n, s, b, ...]; packed, [n, s, b/2, ...].
    """

    def draw(step: jax.Array, shortest: jax.Array, longest: jax.Array, seed: jax.Array) -> Questions:
        key = jax.random.fold_in(stream(seed, DATA), step)
        draw_batch = draw_packed if packed else draw_questions
        return draw_batch(key, task, batch_size, shortest, longest, width, answers, bos)

    over_seeds = jax.vmap(draw, in_axes=(None, None, None, 0))
    return jax.vmap(over_seeds, in_axes=(0, 0, 0, None))(steps, shortest, longest, seeds)
