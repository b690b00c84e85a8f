"""Rows of a decode state taken, put and cleared, whatever mixers the layers have.

A state (`LanguageModel.initial_state`) is a tree of arrays of which each has the batch as its first axis. That is all
that is known of it here, so that the same functions serve every model, and any other tree of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def take_row(tree: PyTree, row: jax.Array) -> PyTree:
    """One row of every array, [b, ...] → [1, ...]."""
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, row), tree)


def put_rows(tree: PyTree, first: jax.Array, new: PyTree) -> PyTree:
    """The tree with `new`, arrays [r, ...], in place of its rows from `first` on.

    All of a row is replaced: where `new` has less room, as attention's keys after a short prompt, zeros follow.
    """

    def put(v: jax.Array, new: jax.Array) -> jax.Array:
        if new.shape[1:] != v.shape[1:]:
            room = [(0, 0)] + [(0, whole - part) for whole, part in zip(v.shape[1:], new.shape[1:], strict=True)]
            new = jnp.pad(new, room)
        return jax.lax.dynamic_update_slice_in_dim(v, new, first, axis=0)

    return jax.tree.map(put, tree, new)


def clear_rows(state: PyTree, rows: jax.Array) -> PyTree:
    """The state with the rows [b] bool as they were before any token."""
    return jax.tree.map(lambda v: jnp.where(rows.reshape(-1, *(1,) * (v.ndim - 1)), jnp.zeros_like(v), v), state)
