"""Cycle navigation: steps on a cycle of five places, from place 0; where does the walk end?

    tokens   0 padding, 1 stay, 2 forward, 3 back, 4..8 the places 0..4
    length   n steps; the answer is a place, at the last step
    n = 4    3 3 1 2 -> 8, place 4

After SLiCE (Benjamin-Walker/structured-linear-cdes).
"""

import jax
import jax.numpy as jnp

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths, question

_PLACES = 5
_FORWARD, _BACK, _PLACE_0 = 2, 3, 4


def _generate(key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int) -> TaskBatch:
    length_key, step_key = jax.random.split(key)
    lengths = draw_lengths(length_key, batch_size, shortest, longest)
    inside = jnp.arange(width)[None, :] < lengths[:, None]
    tokens = jnp.where(inside, 1 + draw(step_key, (batch_size, width), 3), 0)
    travelled = jnp.sum((tokens == _FORWARD).astype(jnp.int32) - (tokens == _BACK), axis=1)
    return question(tokens, lengths - 1, _PLACE_0 + travelled % _PLACES, lengths)


CYCLE_NAVIGATION = Task(
    "cycle_navigation", vocab_size=9, chance=1 / _PLACES, shortest=1, positions=lambda n: n, generate=_generate
)
