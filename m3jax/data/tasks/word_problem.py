"""Word problems: the running product of elements of a finite group, an answer at every position.

    tokens   0..o-1 the elements of a group of order o, then seven special ones: o padding, o + 1 BOS, five unused
    length   k elements after BOS; k + 1 supervised positions: BOS at BOS, then the product of the first i elements
    Z60      61 20 50 7 -> 61 20 10 17

Elements are numbered in the lexicographic order of their permutations, so 0 is the identity. Products run from left to
right and are composed as functions: (ab)(i) = a(b(i)). After jopetty/word-problem ("The Illusion of State", arXiv
2404.08819), which draws from a fixed set of distinct sequences; here every sequence is fresh. The chance level is that
of the positions after BOS.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths

_SPECIAL_TOKENS = 7


def cyclic_table(order: int) -> np.ndarray:
    """Returns the multiplication table of the cyclic group, int32 [o, o]."""
    elements = np.arange(order, dtype=np.int32)
    return (elements[:, None] + elements[None, :]) % order


def permutation_table(degree: int, *, even: bool) -> np.ndarray:
    """Makes the multiplication table of a symmetric or alternating group.

    Args:
      degree: number of things that are permuted.
      even: only the even permutations.

    Returns:
      int32 [o, o], the number of the product of two elements.
    """
    elements = np.array(list(itertools.permutations(range(degree))))
    if even:
        inversions = sum(elements[:, i] > elements[:, j] for i, j in itertools.combinations(range(degree), 2))
        elements = elements[inversions % 2 == 0]
    numerals = elements @ degree ** np.arange(degree)[::-1]  # ascending, as the order is lexicographic
    products = elements[:, elements] @ degree ** np.arange(degree)[::-1]
    return np.searchsorted(numerals, products).astype(np.int32)


def _generate(
    key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int, *, table: np.ndarray
) -> TaskBatch:
    order = len(table)
    padding, bos = order, order + 1
    length_key, element_key = jax.random.split(key)
    lengths = draw_lengths(length_key, batch_size, shortest, longest)
    elements = draw(element_key, (batch_size, width - 1), order)
    flat = jnp.asarray(table.ravel())
    products = jax.lax.associative_scan(lambda left, right: flat[left * order + right], elements, axis=1)

    mask = jnp.arange(width)[None, :] <= lengths[:, None]
    tokens, targets = (jnp.pad(x, ((0, 0), (1, 0)), constant_values=bos) for x in (elements, products))
    return TaskBatch(jnp.where(mask, tokens, padding), jnp.where(mask, targets, 0), mask, lengths)


def word_problem(name: str, table: np.ndarray) -> Task:
    """Makes the word problem of a group.

    Args:
      name: of the task.
      table: int32 [o, o], the multiplication table; element 0 is the identity.

    Returns:
      The task.
    """
    generate = partial(_generate, table=table)
    return Task(
        name, len(table) + _SPECIAL_TOKENS, 1 / len(table), 1, lambda k: k + 1, generate, answers=lambda k: k + 1
    )


WORD_PROBLEMS = (
    word_problem("z60", cyclic_table(60)),
    word_problem("s3", permutation_table(3, even=False)),
    word_problem("a4", permutation_table(4, even=True)),
    word_problem("a5", permutation_table(5, even=True)),
    word_problem("s5", permutation_table(5, even=False)),
)
