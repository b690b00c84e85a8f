"""Whether Triton kernels can run here."""

import jax

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
    """Several devices, outside shard_map: XLA cannot split a kernel over them, and would give each the whole batch."""
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
