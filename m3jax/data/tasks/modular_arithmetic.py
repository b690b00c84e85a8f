"""Modular arithmetic without brackets: sums, differences and products of digits, modulo 5; products bind tighter.

    tokens   0 padding, 1 +, 2 -, 3 *, 4 =, 5..9 the digits 0..4
    length   n, odd, counts the answer, which the input does not hold: (n - 1) / 2 digits, operators between, then =
    n = 9    7 2 6 3 9 1 8 4 -> 6, that is 2 - 1 * 4 + 3 = 1

Half-lengths (n + 1) / 2 are drawn evenly in [(shortest + 1) // 2, (longest + 1) // 2], so an even `shortest` admits
the odd length below it. Short products make the answer 0 more frequent: 0.25 of the answers at length 5, 0.2003 at 21.
After Grazzi et al., arXiv 2411.12537.
"""

import jax
import jax.numpy as jnp

from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths, question

MODULUS = 5
_PLUS, _MINUS, _TIMES, _EQUALS, _DIGIT_0 = 1, 2, 3, 4, 5


def _products(starts: jax.Array, factors: jax.Array) -> jax.Array:
    """Running products modulo 5 along the last axis, begun anew where `starts` is true."""

    def join(left, right):
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] * right[1] % MODULUS)

    return jax.lax.associative_scan(join, (starts, factors), axis=1)[1]


def _evaluate(digits: jax.Array, operators: jax.Array, n_digits: jax.Array) -> jax.Array:
    """Values modulo 5, [b], of the first n_digits of digits [b, d]; operators [b, d] follow their digit."""
    before = jnp.pad(operators[:, :-1], ((0, 0), (1, 0)), constant_values=_PLUS)
    signed = jnp.where(before == _MINUS, MODULUS - digits, digits)
    terms = _products(before != _TIMES, signed)
    index = jnp.arange(digits.shape[1])[None, :]
    last = n_digits[:, None] - 1
    ends = (index == last) | ((index < last) & (operators != _TIMES))
    return jnp.sum(jnp.where(ends, terms, 0), axis=1) % MODULUS


def _generate(key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int) -> TaskBatch:
    length_key, digit_key, operator_key = jax.random.split(key, 3)
    halves = draw_lengths(length_key, batch_size, (shortest + 1) // 2, (longest + 1) // 2)
    lengths = 2 * halves - 1
    shape = (batch_size, (width + 1) // 2)
    digits = draw(digit_key, shape, MODULUS)
    operators = _PLUS + draw(operator_key, shape, 3)
    answer = _evaluate(digits, operators, halves - 1)

    both = jnp.stack([_DIGIT_0 + digits, operators], axis=2).reshape(batch_size, -1)[:, :width]
    position, equals_at = jnp.arange(width)[None, :], lengths[:, None] - 2
    tokens = jnp.where(position < equals_at, both, jnp.where(position == equals_at, _EQUALS, 0))
    return question(tokens, lengths - 2, _DIGIT_0 + answer, lengths)


MODULAR_ARITHMETIC = Task(
    "modular_arithmetic", vocab_size=10, chance=1 / MODULUS, shortest=3, positions=lambda n: n - 1, generate=_generate
)
