"""Whether kernels can run here: which device there is, and how many the program may be divided over."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

_NO_TRITON = None
try:
    import jax_triton  # noqa: F401
except ImportError as error:  # it comes with the extra "cuda"
    _NO_TRITON = " ".join(str(error).split()).partition(". ")[0]  # its first sentence

_LEAST_CAPABILITY = 80  # the first with bfloat16 matrix products and asynchronous copies


def compute_capability() -> int:
    """Of the default device: 90 for 9.0; 0 for what is not an NVIDIA GPU."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0.0"))
    return int(capability.replace(".", "")) if capability.replace(".", "", 1).isdigit() else 0


def no_triton_here() -> str | None:
    """Why no Triton kernel can run on this machine; None if they can."""
    if _NO_TRITON is not None:
        return f'{_NO_TRITON} (install the extra "cuda")'
    if jax.default_backend() != "gpu":
        return f"the default device is a {jax.default_backend()}"
    if compute_capability() < _LEAST_CAPABILITY:
        return f"{jax.local_devices()[0].device_kind} is not an NVIDIA GPU of compute capability 8.0 or more"
    return None


def partitioned() -> bool:
    """Several devices, outside shard_map: XLA cannot split a kernel over them, and would give each the whole batch.

    A mesh that is set says how many devices there are for the program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    return mesh.size > 1 and not mesh.manual_axes


def one_device(arrays: Any = None) -> AbstractContextManager:
    """What runs in this context runs on one device, whatever the number of those there are, so kernels are chosen.

    Args:
      arrays: a tree of arrays that the program takes. If one of them is spread over several devices, or a mesh is set
        already, nothing is said.
    """
    if jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    if any(len(v.devices()) > 1 for v in jax.tree.leaves(arrays) if isinstance(v, jax.Array)):
        return nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), (AxisType.Auto,)))
