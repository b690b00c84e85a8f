"""Even pairs: is the number of unequal neighbours even, that is, does the last letter equal the first?

    tokens   0 padding, 1 the letter a, 2 the letter b
    length   n letters; the answer is 1 (equal) or 2, at the last letter
    n = 5    2 1 1 2 1 -> 2

After SLiCE (Benjamin-Walker/structured-linear-cdes).
"""

import jax
import jax.numpy as jnp

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths, question


def _generate(key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int) -> TaskBatch:
    length_key, letter_key = jax.random.split(key)
    lengths = draw_lengths(length_key, batch_size, shortest, longest)
    position = jnp.arange(width)[None, :]
    last = lengths[:, None] - 1
    tokens = jnp.where(position <= last, 1 + draw(letter_key, (batch_size, width), 2), 0)
    last_letter = jnp.sum(jnp.where(position == last, tokens, 0), axis=1)
    return question(tokens, lengths - 1, jnp.where(tokens[:, 0] == last_letter, 1, 2), lengths)


EVEN_PAIRS = Task("even_pairs", vocab_size=3, chance=1 / 2, shortest=1, positions=lambda n: n, generate=_generate)
