"""Kernels on a mesh: every device runs them on its own rows of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PyTree = Any


def on_own_rows(f: Callable[[PyTree, PyTree], PyTree], rows: PyTree, shared: PyTree) -> PyTree:
    """f(rows, shared), with f called per device where a mesh is set: the compiler cannot divide a kernel by itself.

    Rows that the devices cannot share evenly are not divided, and then f has no kernels.

    Args:
      f: treats every row alone, whatever the others are.
      rows: arrays whose first axis is the batch, divided over all axes of the mesh.
      shared: arrays that every device needs whole.

    Returns:
      What f returns, its arrays' first axis the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    leaves, tree = jax.tree.flatten(rows)
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or leaves[0].shape[0] % mesh.size:
        return f(rows, shared)
    batch = P(mesh.axis_names)

    def on_one_device(own: list[jax.Array], shared: PyTree) -> PyTree:
        count, arrays = own[0].shape[0], iter(own)
        made = (next(arrays) if v.size else jnp.zeros((count, *v.shape[1:]), v.dtype) for v in leaves)
        return f(tree.unflatten(made), shared)

    # XLA's partitioner ends the process at an argument without elements that a gradient does not use (jax 0.11.2).
    full = [v for v in leaves if v.size]
    # The scan's carries begin as constants, which the check would take for replicated.
    return jax.shard_map(on_one_device, in_specs=(batch, P()), out_specs=batch, check_vma=False)(full, shared)
