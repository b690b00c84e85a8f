"""Multi-query associative recall (MQAR): key and value pairs, then the keys again; each is to be answered by its value.

    tokens   0 blank, 1..v/2-1 keys, v/2..v-1 values; v = 8,192
    length   even, at least 4 tokens for each pair: k v k v .., then the queries with gaps between them
    2 pairs  2 8 4 7 0 0 4 0 0 0 0 0 2 0 0 0, answers 7 at the 4 and 8 at the 2 (v = 12)

Keys and values are drawn without replacement, and so are the queries' places 2 * pairs + 2 * gap: gap + 1 with a
probability proportional to (gap + 1)^(0.01 - 1), which leaves most queries near the pairs. The values that answer are
never written. By default a random token of the whole vocabulary fills each blank, which may be a key; upstream's
sweeps of Mamba-2 and Based do so, its first figures do not. After HazyResearch/zoology (multiquery_ar.py).

The chance level is that of a guess among all values; one among the sequence's own has 1 / pairs.
"""

from functools import partial

import jax
import jax.numpy as jnp

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths

_POWER = 0.01


def _distinct(key: jax.Array, batch_size: int, n: int, k: int) -> jax.Array:
    """Draws k of 0..n-1 without replacement, in random order, for each row: int32 [b, k].

    What repeats an earlier one of its row is drawn again until nothing does. No step tells the n numbers apart, so all
    ordered selections are equally probable. To sort n random numbers would take far longer where k is far less than n.
    """
    earlier = jnp.tri(k, k=-1, dtype=bool)

    def repeats(numbers: jax.Array) -> jax.Array:
        return jnp.any((numbers[:, :, None] == numbers[:, None, :]) & earlier[None], axis=2)

    def draw_again(loop: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, numbers, wrong = loop
        key, now = jax.random.split(key)
        numbers = jnp.where(wrong, draw(now, numbers.shape, n), numbers)
        return key, numbers, repeats(numbers)

    nothing_yet = key, jnp.zeros((batch_size, k), jnp.int32), jnp.ones((batch_size, k), bool)
    return jax.lax.while_loop(lambda loop: jnp.any(loop[2]), draw_again, nothing_yet)[1]


def _gaps(key: jax.Array, spaces: jax.Array, widest: int, k: int) -> jax.Array:
    """Draws k of 0..space-1 without replacement by the power law for each space of spaces [b]: int32 [b, k].

    The largest of independent Gumbel variates shifted by log-probabilities are drawn as one by one without replacement.
    """
    index = jnp.arange(widest, dtype=jnp.float32)
    logits = jnp.where(index[None, :] < spaces[:, None], (_POWER - 1) * jnp.log1p(index)[None, :], -jnp.inf)
    return jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape, jnp.float32), k)[1]


def _generate(
    key: jax.Array,
    batch_size: int,
    shortest: Length,
    longest: Length,
    width: int,
    *,
    pairs: int,
    vocab_size: int,
    random_blanks: bool,
) -> TaskBatch:
    length_key, key_key, value_key, gap_key, blank_key = jax.random.split(key, 5)
    # Traced lengths may be odd, as those of packed rows are: they count as the even ones below.
    lengths = 2 * draw_lengths(length_key, batch_size, shortest // 2, longest // 2)
    keys = 1 + _distinct(key_key, batch_size, vocab_size // 2 - 1, pairs)
    values = vocab_size // 2 + _distinct(value_key, batch_size, vocab_size - vocab_size // 2, pairs)
    context = jnp.stack([keys, values], axis=2).reshape(batch_size, 2 * pairs)
    places = 2 * pairs + 2 * _gaps(gap_key, lengths // 2 - pairs, width // 2 - pairs, pairs)

    row = jnp.arange(batch_size)[:, None]
    empty = jnp.zeros((batch_size, width), jnp.int32)
    tokens = empty.at[:, : 2 * pairs].set(context).at[row, places].set(keys)
    targets = empty.at[row, places].set(values)
    if random_blanks:
        inside = jnp.arange(width)[None, :] < lengths[:, None]
        tokens = jnp.where((tokens == 0) & inside, draw(blank_key, tokens.shape, vocab_size), tokens)
    return TaskBatch(tokens, targets, targets > 0, lengths)


def mqar(name: str, pairs: int, *, vocab_size: int = 8192, random_blanks: bool = True) -> Task:
    """Makes a recall task.

    Args:
      name: of the task.
      pairs: number of keys, each with a value and a query.
      vocab_size: v; half of it keys, half values.
      random_blanks: fill the positions that are neither pairs nor queries with random tokens instead of 0.

    Returns:
      The task.
    """
    generate = partial(_generate, pairs=pairs, vocab_size=vocab_size, random_blanks=random_blanks)
    chance = 1 / (vocab_size - vocab_size // 2)
    return Task(name, vocab_size, chance, 4 * pairs, lambda n: n, generate, answers=lambda n: pairs, even=True)


_PAIRS = (4, 8, 16, 32, 64, 128, 256)
MQAR = (
    *(mqar(f"mqar_{pairs}", pairs) for pairs in _PAIRS),
    *(mqar(f"mqar_blank_{pairs}", pairs, random_blanks=False) for pairs in _PAIRS),
    *(mqar(f"mqar_few_{pairs}", pairs, vocab_size=64) for pairs in (2, 4, 8, 16)),
)
