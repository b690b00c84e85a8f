"""Where arrays live: a mesh of axes data, fsdp and sequence; batches are split over the first two, their sequences over
the third, parameters and optimizer state over fsdp.

One device is the 1 x 1 x 1 mesh of the same code, and several hosts are the same mesh over all their devices: each
process feeds its own rows of the batch.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import Config
from m3jax.errors import ConfigError
from m3jax.models.own_rows import SEQUENCE_AXIS

PyTree = Any

BATCH_AXES = ("data", "fsdp")
# These hold nearly all of the memory; to gather the rest would cost more than it saves.
_SHARDED = ("kernel", "embedding", "head")


def make_mesh(config: Config) -> Mesh:
    """Lays the devices out as config.mesh asks.

    Raises:
      ConfigError: more devices asked for than there are, or a batch or sequence that they do not divide.
    """
    devices, fsdp, pieces = jax.devices(), config.mesh.fsdp, config.mesh.sequence
    data = config.mesh.data if config.mesh.data > 0 else max(len(devices) // (fsdp * pieces), 1)
    asked = data * fsdp * pieces
    if asked > len(devices) or (jax.process_count() > 1 and asked != len(devices)):
        raise ConfigError(
            f"config.mesh.data = {data} times fsdp = {fsdp} times sequence = {pieces} is {asked} devices: "
            f"there are {len(devices)}. Change one of them, as with --config.mesh.fsdp=1."
        )
    rows = config.data.batch_size // config.train.grad_accumulation
    if rows % (data * fsdp):
        raise ConfigError(
            f"config.data.batch_size = {config.data.batch_size} in {config.train.grad_accumulation} microbatches "
            f"(train.grad_accumulation) is {rows} sequences at a time: expected a multiple of the {data * fsdp} "
            "devices that share a batch. Change one of them, or set mesh.data to use fewer devices."
        )
    if config.data.sequence_length % pieces:
        raise ConfigError(
            f"config.mesh.sequence = {pieces}: expected a divisor of data.sequence_length = "
            f"{config.data.sequence_length}."
        )
    if jax.process_count() > 1 and jax.local_device_count() % pieces:  # each feeds whole sequences
        raise ConfigError(
            f"config.mesh.sequence = {pieces}: expected a divisor of the {jax.local_device_count()} devices that each "
            "process has."
        )
    axes = *BATCH_AXES, SEQUENCE_AXIS
    return jax.make_mesh((data, fsdp, pieces), axes, 3 * (AxisType.Auto,), devices=devices[:asked])


def state_shardings(abstract_state: PyTree, mesh: Mesh) -> PyTree:
    """Chooses the sharding of each array: of a matrix the first axis that fsdp divides, never the layers' axis.

    First means rows: columns of a projection's weight are taken apart, which across devices would be an exchange.

    Args:
      abstract_state: a tree of arrays or ShapeDtypeStructs (parameters, optimizer moments, averages, counters).
      mesh: from make_mesh.

    Returns:
      The same tree with a NamedSharding per array.
    """
    fsdp = mesh.shape["fsdp"]

    def choose(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [getattr(key, "key", None) for key in path]
        axes = [axis for axis in range(int("layers" in names), leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes or names[-1] not in _SHARDED:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(["fsdp" if i == axes[0] else None for i in range(leaf.ndim)])))

    return jax.tree_util.tree_map_with_path(choose, abstract_state)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns the abstract arrays with their shardings attached, as a checkpoint is restored into."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows, and pieces of these."""
    return NamedSharding(mesh, P(BATCH_AXES, SEQUENCE_AXIS))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process' rows of a batch on its devices, as part of the global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
