"""What a synthetic task is: batches of token sequences with their answers, drawn on the device from a key.

Everything is traceable: a training loop draws its batch inside its own jit, a sweep under vmap, and the lengths may be
traced, so that a curriculum does not compile again. Only the batch size and the width of the arrays are static.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.errors import ConfigError

Length = int | jax.Array


class TaskBatch(NamedTuple):
    """Sequences of a task, padded on the right.

    Attributes:
      tokens: int32 [b, l], the input.
      targets: int32 [b, l], what is to be predicted at each position; 0 where nothing is.
      mask: bool [b, l], the supervised positions.
      lengths: int32 [b], the length drawn for each sequence, in the task's own count.
    """

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array
    lengths: jax.Array


@dataclass(frozen=True)
class Task:
    """A synthetic task.

    Attributes:
      name: its name in the registry.
      vocab_size: number of tokens, inputs and targets together.
      chance: accuracy of guessing, the zero of the scaled accuracy.
      shortest: the least length that can be asked for.
      positions: number of input positions that a sequence of a given length takes.
      generate: (key, batch_size, shortest, longest, width) -> TaskBatch; call `sample` instead.
      answers: the most supervised positions that a sequence of a given length has.
      even: whether all lengths are even.
    """

    name: str
    vocab_size: int
    chance: float
    shortest: int
    positions: Callable[[int], int]
    generate: Callable[[jax.Array, int, Length, Length, int], TaskBatch]
    answers: Callable[[int], int] = lambda n: 1
    even: bool = False

    def sample(self, key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int) -> TaskBatch:
        """Draws a batch.

        Args:
          key: a jax key; the same one gives the same batch.
          batch_size: number of sequences b.
          shortest: least length, in the task's own count (its file says of what); may be traced.
          longest: greatest length, included; may be traced, and must then keep within the width.
          width: positions l of the arrays, at least `positions(longest)`.

        Returns:
          The batch, [b, l].

        Raises:
          ConfigError: lengths that the task does not have, or that do not fit the width.
        """
        given = {"shortest": shortest, "longest": longest}
        known = {name: length for name, length in given.items() if isinstance(length, int | np.integer)}
        least = self.shortest
        for name, length in known.items():
            if length < least:
                raise ConfigError(f"task '{self.name}': {name} = {length}: expected at least {least}.")
            if self.even and length % 2:
                raise ConfigError(f"task '{self.name}': {name} = {length}: expected an even length.")
            least = length
        least = self.positions(known.get("longest", self.shortest))
        if width < least:
            raise ConfigError(f"task '{self.name}': width = {width}: expected at least {least} positions.")
        return self.generate(key, batch_size, shortest, longest, width)


def scaled_accuracy(accuracy, chance: float):
    """Rescales an accuracy so that guessing is 0 and no error is 1; worse than guessing stays negative.

    Args:
      accuracy: in [0, 1], a number or an array.
      chance: the task's.

    Returns:
      (accuracy - chance) / (1 - chance).
    """
    return (accuracy - chance) / (1 - chance)


def draw(key: jax.Array, shape: tuple[int, ...], n: Length) -> jax.Array:
    """Draws int32 integers in [0, n); out of 32 random bits, so uneven by at most n / 2^32."""
    return (jax.random.bits(key, shape, jnp.uint32) % jnp.uint32(n)).astype(jnp.int32)


def draw_lengths(key: jax.Array, batch_size: int, shortest: Length, longest: Length) -> jax.Array:
    """Draws int32 [b] lengths, evenly in [shortest, longest]."""
    shortest = jnp.int32(shortest)
    return shortest + draw(key, (batch_size,), jnp.int32(longest) - shortest + 1)


def question(tokens: jax.Array, position: jax.Array, answer: jax.Array, lengths: jax.Array) -> TaskBatch:
    """Makes the batch of a task with one answer per sequence.

    Args:
      tokens: int32 [b, l].
      position: int32 [b], where the answer is to be given.
      answer: int32 [b].
      lengths: int32 [b].

    Returns:
      The batch.
    """
    mask = jnp.arange(tokens.shape[1])[None, :] == position[:, None]
    return TaskBatch(tokens, jnp.where(mask, answer.astype(jnp.int32)[:, None], 0), mask, lengths)
