"""Sequences of a task with the positions that ask, drawn on the device many batches at a time.

Drawing is a program apart from training: its loops (brackets go down a tree, level by level) run once for a whole block
of steps, and tasks whose arrays have the same shapes share the compiled training step.

Letters: n steps, s seeds, b sequences, w positions, k supervised positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3jax.data.tasks import Task
from m3jax.data.tasks.task import Length

# Streams of random numbers, apart from each other and from all others of a seed.
INITIALISATION, DATA, VALIDATION, TEST = range(4)


class Questions(NamedTuple):
    """Sequences, padded on the right, which no causal model sees."""

    tokens: jax.Array  # int32 [..., b, w]
    positions: jax.Array  # int32 [..., b, k], where answers are due
    targets: jax.Array  # int32 [..., b, k]
    real: jax.Array  # bool [..., b, k]; False = a sequence with fewer answers than k


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


@functools.partial(jax.jit, static_argnames=("task", "batch_size", "width", "answers", "bos"))
def draw_block(
    seeds: jax.Array, steps: jax.Array, shortest: jax.Array, longest: jax.Array, *, task: Task, batch_size: int,
    width: int, answers: int, bos: bool,
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

    Returns:
      Arrays [n, s, b, ...].
    """

    def draw(step: jax.Array, shortest: jax.Array, longest: jax.Array, seed: jax.Array) -> Questions:
        key = jax.random.fold_in(stream(seed, DATA), step)
        return draw_questions(key, task, batch_size, shortest, longest, width, answers, bos)

    over_seeds = jax.vmap(draw, in_axes=(None, None, None, 0))
    return jax.vmap(over_seeds, in_axes=(0, 0, 0, None))(steps, shortest, longest, seeds)
