"""Runs the Mosaic GPU kernels on a CPU, in JAX's interpreter for them, which needs two things added.

Its warpgroups block threads of the CPU client, of which there must be enough (tests/conftest.py).
"""

import functools
import inspect
import textwrap

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import effects
from jax._src.callback import OrderedIOEffect
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from m3jax.kernels.mamba3.mosaic import scan
from tests.kernels import interpreter

INTERPRET = plgpu.InterpretGPUParams()
# The interpreter's callbacks have to happen in order, which functions with derivatives of their own refuse to know of.
effects.custom_derivatives_allowed_effects.add_type(OrderedIOEffect)
_READ_A = "a, _, _ = shared_memory"
_READ_B = "b, _, _ = shared_memory"
_KEY = "a_allocation_key = HostAllocationKey.from_array(a_allocation_key_as_array)"


def _with_operands_in_registers():
    """The callback of wgmma, taking an array for A where it expects the key of a buffer.

    The products are of bfloat16 numbers added in float32, as the hardware does.
    """
    source = inspect.getsource(gpu_callbacks.wgmma)
    source = source[source.index("def wgmma") :]
    keyed = "in_registers = tuple(a_allocation_key_as_array.shape) != (6,)\n  "
    source = source.replace(_KEY, keyed + _KEY.replace("= ", "= None if in_registers else ", 1))
    start, end = source.index(f"  {_READ_A}"), source.index(f"  {_READ_B}")
    read = textwrap.indent(source[start:end], "  ")
    given = "  if in_registers:\n    a = np.asarray(a_allocation_key_as_array)\n  else:\n"
    source = source[:start] + given + read + source[end:]
    wide = "np.matmul(a.astype(acc.dtype), np.asarray(b).astype(acc.dtype), dtype"
    source = source.replace("np.matmul(a, b, dtype", wide)
    names = vars(gpu_callbacks) | {"np": np}
    exec(compile(source, "wgmma", "exec"), names)
    return gpu_callbacks.fail_on_exception(names["wgmma"])


def use(monkeypatch, segments: int) -> None:
    """Makes `scan` run here, with its Triton kernels, and cut sequences into as many segments."""
    interpreter.use(monkeypatch)
    monkeypatch.setattr(gpu_callbacks, "wgmma", _with_operands_in_registers())
    monkeypatch.setattr(scan, "_unsupported_here", lambda: None)
    monkeypatch.setattr(scan, "scan", scan.scan.__wrapped__)  # else what is patched below may be an earlier test's
    how = {"segments": segments, "interpret": INTERPRET}
    monkeypatch.setattr(scan, "forward", functools.partial(scan.forward_in_segments, **how))
    monkeypatch.setattr(scan, "forward_saving", functools.partial(scan.forward_in_segments, save=True, **how))
    monkeypatch.setattr(scan, "backward_kernels", functools.partial(scan.backward_in_segments, **how))
