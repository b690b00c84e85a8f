"""m3jax: Mamba-3 state space models in JAX.

`m3jax.load` and `m3jax.generate` are imported when first used, so that `m3jax.kernels` alone stays light.
"""

import importlib
from typing import Any

__all__ = ["generate", "load"]

_HOMES = {"generate": "m3jax.inference", "load": "m3jax.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'm3jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
