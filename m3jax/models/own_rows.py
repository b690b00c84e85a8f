"""Kernels on a mesh: every device runs them on its own rows of the batch, and maybe on its own pieces of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PyTree = Any

SEQUENCE_AXIS = "sequence"  # of a mesh, whose devices share a sequence; all other axes share the batch


def on_own_rows(f: Callable[[PyTree, PyTree], PyTree], rows: PyTree, shared: PyTree) -> PyTree:
    """f(rows, shared), with f called per device where a mesh is set: the compiler cannot divide a kernel by itself.

    Rows that the devices cannot share evenly are not divided, and then f has no kernels.

    Args:
      f: treats every row alone, whatever the others are.
      rows: arrays whose first axis is the batch, divided over all axes of the mesh but that of sequences.
      shared: arrays that every device needs whole.

    Returns:
      What f returns, its arrays' first axis the batch.
    """
    return _per_device(lambda rows, shared, _: f(rows, shared), rows, shared, None)


def on_own_pieces(f: Callable[[PyTree, PyTree, str | None], PyTree], rows: PyTree, shared: PyTree) -> PyTree:
    """As `on_own_rows`, of arrays [b, l, ...] whose second axis the mesh's axis of sequences divides, too.

    Args:
      f: of rows, shared and that axis; None where there is none, or one that does not divide the length.
      rows: arrays [b, l, ...].
      shared: arrays that every device needs whole.

    Returns:
      What f returns, arrays [b, l, ...].
    """
    pieces = dict(jax.sharding.get_abstract_mesh().shape).get(SEQUENCE_AXIS, 1)
    divides = pieces > 1 and jax.tree.leaves(rows)[0].shape[1] % pieces == 0
    return _per_device(f, rows, shared, SEQUENCE_AXIS if divides else None)


def _per_device(
    f: Callable[[PyTree, PyTree, str | None], PyTree], rows: PyTree, shared: PyTree, axis: str | None
) -> PyTree:
    """f(rows, shared, axis), of rows whose first axis the devices of the batch divide, and `axis` the second."""
    mesh = jax.sharding.get_abstract_mesh()
    leaves, tree = jax.tree.flatten(rows)
    batch = tuple(name for name in mesh.axis_names if name != SEQUENCE_AXIS)
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    if alone or leaves[0].shape[0] % math.prod(mesh.shape[name] for name in batch):
        return f(rows, shared, None)
    spec = P(batch) if axis is None else P(batch, axis)

    def on_one_device(own: list[jax.Array], shared: PyTree) -> PyTree:
        lead, arrays = own[0].shape[: len(spec)], iter(own)
        made = (next(arrays) if v.size else jnp.zeros((*lead, *v.shape[len(spec) :]), v.dtype) for v in leaves)
        return f(tree.unflatten(made), shared, axis)

    # XLA's partitioner ends the process at an argument without elements that a gradient does not use (jax 0.11.2).
    full = [v for v in leaves if v.size]
    # The scan's carries begin as constants, which the check would take for replicated.
    return jax.shard_map(on_one_device, in_specs=(spec, P()), out_specs=spec, check_vma=False)(full, shared)
