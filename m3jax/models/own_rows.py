"""Kernels on a mesh: every device runs them on its own rows of the batch."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

PyTree = Any


def on_own_rows(f: Callable[[PyTree, PyTree], PyTree], rows: PyTree, shared: PyTree) -> PyTree:
    """f(rows, shared), with f called per device where a mesh is set: the compiler cannot divide a kernel by itself.

    Args:
      f: treats every row alone, whatever the others are.
      rows: arrays whose first axis is the batch, divided over all axes of the mesh.
      shared: arrays that every device needs whole.

    Returns:
      What f returns, its arrays' first axis the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return f(rows, shared)
    batch = P(mesh.axis_names)
    # The scan's carries begin as constants, which the check would take for replicated.
    return jax.shard_map(f, in_specs=(batch, P()), out_specs=batch, check_vma=False)(rows, shared)
