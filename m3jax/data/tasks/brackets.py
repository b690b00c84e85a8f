"""Modular arithmetic with brackets, modulo 5.

    tokens   0..4 the digits, 5 +, 6 -, 7 *, 8 (, 9 ), 10 =, 11 padding
    length   n counts the answer and one token of padding: an expression of exactly n - 3 tokens, then =
    n = 13   8 8 6 2 9 5 8 1 9 9 10 -> 4, that is ((-2)+(1)) = -1

The grammar G(size), after Deletang et al.: G(1) = d, G(2) = -d, G(3) = (d), G(4) = (-d), and from 5 on
( G(left) operator G(size - left - 3) ) with left even in [1, size - 4]; d and the operator are even, too. Lengths under
5 become 5. The place of the answer holds the token 0, a digit, as upstream; a causal model sees it too late.
After Grazzi et al., arXiv 2411.12537, whose code has the operator * since 68f8e5f only; both variants are here.

The chance level is the published 1/5. With * the value 0 is more frequent than the others, and a model that always
answers it reaches 0.29 at length 40 and 0.31 at 256, a scaled accuracy of 0.14; without *, 1/5 exactly.

The uneven variant is for training alone (`train.drawn_as`). Evenly cut expressions seldom ask for what comes after
nearly all of them to be added with a sign that was given before it: at 160 tokens a node's left part has more than 140
in one of twelve. In half of the uneven ones the nodes that hold most of the expression, more than a share of it
that is drawn from [0.6, 1], are cut within 8 tokens of an end; there it is two of three. Tokens and rules are the same.

Drawing a tree. A node is an interval of positions. It owns the bracket at its first position, so one random number per
position, drawn beforehand, is enough to cut every node once. Positions move down the tree together, a level at a
time: the loops run as often as the deepest tree of the batch has levels, about 8 at 40 tokens, 17 at 256 and 28 at
4,096. Where that matters (a training step of a millisecond), draw the batches of several steps by one call.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3jax.data.tasks.modular_arithmetic import MODULUS
from m3jax.data.tasks.task import Length, Task, TaskBatch, draw, draw_lengths, question

_PLUS, _MINUS, _TIMES, _OPEN, _CLOSE, _EQUALS, _PADDING = range(MODULUS, MODULUS + 7)
_LEAST = 5  # the length of the shortest sequence
_LEAST_CUT = 5  # the size of the smallest expression with an operator
_NEAR_END = 8  # tokens; where uneven nodes are cut
_LEAST_SHARE = 0.6  # of an expression, that a node must have to be uneven


class _Nodes(NamedTuple):
    """For every position, [b, l], the node that owns it."""

    start: jax.Array  # the node's first position
    size: jax.Array  # its tokens
    operator: jax.Array  # the position of its operator, if it has one


def _at(values: jax.Array, positions: jax.Array) -> jax.Array:
    """values [b, l] at other positions [b, l]; those beyond the end are read at the end (and not used)."""
    return jnp.take_along_axis(values, positions, axis=1, mode="clip")


def _below(randoms: jax.Array, n: jax.Array) -> jax.Array:
    """int32 in [0, n), of random bits."""
    return (randoms % n.astype(jnp.uint32)).astype(jnp.int32)


def _cut(sizes: jax.Array, randoms: jax.Array, uneven_above: jax.Array | None) -> tuple[_Nodes, jax.Array]:
    """Draws trees.

    Args:
      sizes: int32 [b], tokens of each expression.
      randoms: uint32 [b, l], random bits.
      uneven_above: [b], nodes of more tokens are cut near an end; None = all nodes are cut anywhere.

    Returns:
      The nodes; positions behind an expression stay with its root. And the number of levels below the roots.
    """
    position = jnp.broadcast_to(jnp.arange(randoms.shape[1], dtype=jnp.int32)[None, :], randoms.shape)

    def owned(start, size):
        choices, random = jnp.maximum(size - _LEAST_CUT + 1, 1), _at(randoms, start)
        left = 1 + _below(random, choices)
        if uneven_above is not None:
            near = jnp.minimum(_NEAR_END, choices)
            place = _below(random, 2 * near)
            at_an_end = jnp.where(place < near, 1 + place, choices + near - place)
            left = jnp.where(size > uneven_above[:, None], at_an_end, left)
        nodes = _Nodes(start, size, start + 1 + left)
        own = (position <= start) | (position == nodes.operator) | (position >= start + size - 1)
        return nodes, ~own & (size >= _LEAST_CUT)

    def descend(state):
        nodes, below, levels = state
        is_left = position < nodes.operator
        left = nodes.operator - nodes.start - 1
        start = jnp.where(is_left, nodes.start + 1, nodes.operator + 1)
        size = jnp.where(is_left, left, nodes.size - left - 3)
        start, size = jnp.where(below, start, nodes.start), jnp.where(below, size, nodes.size)
        return *owned(start, size), levels + 1

    roots = owned(jnp.zeros_like(position), jnp.broadcast_to(sizes[:, None], randoms.shape))
    nodes, _, levels = jax.lax.while_loop(lambda state: jnp.any(state[1]), descend, (*roots, jnp.int32(0)))
    return nodes, levels


def _spell(nodes: _Nodes, digits: jax.Array, operators: jax.Array) -> jax.Array:
    """Tokens [b, l] of the expressions; digits and operators [b, l] stand where the tree has a place for one."""
    position = jnp.arange(digits.shape[1])[None, :]
    start, size = nodes.start, nodes.size
    tokens = jnp.where((size >= _LEAST_CUT) & (position == nodes.operator), operators, digits)
    negative = ((size == 2) & (position == start)) | ((size == 4) & (position == start + 1))
    tokens = jnp.where(negative, _MINUS, tokens)
    tokens = jnp.where((size >= 3) & (position == start), _OPEN, tokens)
    return jnp.where((size >= 3) & (position == start + size - 1), _CLOSE, tokens)


def _evaluate(nodes: _Nodes, levels: jax.Array, digits: jax.Array, operators: jax.Array) -> jax.Array:
    """Values modulo 5, [b]. Each round is right one level further up, from the leaves to the root at position 0."""
    digit = _at(digits, nodes.start + nodes.size // 2)  # of a leaf
    leaf = jnp.where(nodes.size % 2 == 0, MODULUS - digit, digit)
    operator = _at(operators, nodes.operator)

    def ascend(_, values):
        left, right = _at(values, nodes.start + 1), _at(values, nodes.operator + 1)
        joined = jnp.where(operator == _PLUS, left + right, left - right)
        joined = jnp.where(operator == _TIMES, left * right, joined)
        return jnp.where(nodes.size >= _LEAST_CUT, joined % MODULUS, values)

    return jax.lax.fori_loop(0, levels, ascend, leaf % MODULUS)[:, 0]


def _generate(
    key: jax.Array, batch_size: int, shortest: Length, longest: Length, width: int, *, n_operators: int, uneven: bool
) -> TaskBatch:
    length_key, cut_key, digit_key, operator_key = jax.random.split(key, 4)
    lengths = jnp.maximum(draw_lengths(length_key, batch_size, shortest, longest), _LEAST)
    sizes = lengths - 3
    shape = (batch_size, width)
    digits = draw(digit_key, shape, MODULUS)
    operators = _PLUS + draw(operator_key, shape, n_operators)
    uneven_above = _draw_uneven(cut_key, sizes) if uneven else None
    nodes, levels = _cut(sizes, jax.random.bits(cut_key, shape, jnp.uint32), uneven_above)
    answer = _evaluate(nodes, levels, digits, operators)

    position, equals_at = jnp.arange(width)[None, :], sizes[:, None]
    tokens = jnp.where(position < equals_at, _spell(nodes, digits, operators), _PADDING)
    tokens = jnp.where(position == equals_at, _EQUALS, tokens)
    tokens = jnp.where(position == equals_at + 1, 0, tokens)
    return question(tokens, sizes, answer, lengths)


def _draw_uneven(key: jax.Array, sizes: jax.Array) -> jax.Array:
    """The size above which an expression's nodes are uneven, [b]; that of the whole where it is an even one."""
    share_key, half_key = jax.random.split(jax.random.fold_in(key, 1))
    share = jax.random.uniform(share_key, sizes.shape, minval=_LEAST_SHARE, maxval=1.0)
    return jnp.where(jax.random.bernoulli(half_key, shape=sizes.shape), share * sizes, sizes)


def _task(name: str, n_operators: int, uneven: bool = False) -> Task:
    generate = partial(_generate, n_operators=n_operators, uneven=uneven)
    return Task(name, MODULUS + 7, 1 / MODULUS, 1, lambda n: max(n, _LEAST) - 2, generate)


BRACKETS = _task("modular_arithmetic_brackets", n_operators=3)
BRACKETS_WITHOUT_TIMES = _task("modular_arithmetic_brackets_without_times", n_operators=2)
BRACKETS_WITHOUT_TIMES_UNEVEN = _task("modular_arithmetic_brackets_without_times_uneven", n_operators=2, uneven=True)
