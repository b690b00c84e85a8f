"""Parity: is the number of ones odd? One answer, at the last bit.

    tokens   0 padding, 1 the bit 0, 2 the bit 1
    length   n counts the answer, which the input does not hold: n - 1 bits
    n = 6    2 1 2 2 1 -> 2, the bit 1: three ones

After Grazzi et al., arXiv 2411.12537. SLiCE's parity of the length n is this one's of n + 1.
"""

import jax
import jax.numpy as jnp

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths, question


def _generate(key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int) -> TaskBatch:
    length_key, bit_key = jax.random.split(key)
    lengths = draw_lengths(length_key, batch_size, shortest, longest)
    bits = draw(bit_key, (batch_size, width), 2)
    inside = jnp.arange(width)[None, :] < lengths[:, None] - 1
    tokens = jnp.where(inside, 1 + bits, 0)
    return question(tokens, lengths - 2, 1 + jnp.sum(inside * bits, axis=1) % 2, lengths)


PARITY = Task("parity", vocab_size=3, chance=1 / 2, shortest=2, positions=lambda n: n - 1, generate=_generate)
