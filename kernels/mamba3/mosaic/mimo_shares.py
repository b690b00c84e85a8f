"""How the programs of the Mosaic GPU MIMO gradients share out all heads of all chunks, evenly.

Heads are counted chunk after chunk, and of a chunk group after group. A program has some in a row, each a step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .pieces import MULTIPROCESSORS

PROGRAMS = MULTIPROCESSORS  # at most; each runs one at a time


class Of(NamedTuple):
    """A step's group of a chunk, whose heads read the same rows."""

    number: jax.Array  # counted over the batch
    member: jax.Array  # which of the group's heads it is
    slot: jax.Array  # of two for what these share, which groups take in turn


class Place(NamedTuple):
    """Where a step is."""

    index: jax.Array  # in the batch
    chunk: jax.Array
    head: jax.Array
    of: Of


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of `chunks` of each of `batch` sequences."""

    batch: int
    chunks: int
    heads: int
    per_group: int
    programs: int

    @property
    def least(self) -> int:
        """Steps of a program; the first `longer` have one more."""
        return self.batch * self.chunks * self.heads // self.programs

    @property
    def longer(self) -> int:
        """Programs that have one more."""
        return self.batch * self.chunks * self.heads % self.programs

    def of(self, program: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A program's first step and the one after its last, counted over all."""
        first, end = (k * self.least + jnp.minimum(k, self.longer) for k in (program, program + 1))
        return first, end

    def place(self, step: jax.Array) -> Place:
        """Of a step."""
        chunk, head = lax.div(step, self.heads), lax.rem(step, self.heads)
        group, member = lax.div(step, self.per_group), lax.rem(step, self.per_group)
        return Place(
            lax.div(chunk, self.chunks), lax.rem(chunk, self.chunks), head, Of(group, member, lax.rem(group, 2))
        )


def share(batch: int, chunks: int, heads: int, groups: int) -> Shares:
    """As many programs as there can be."""
    return Shares(batch, chunks, heads, heads // groups, min(PROGRAMS, batch * chunks * heads))
