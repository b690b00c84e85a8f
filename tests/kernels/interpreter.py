"""Runs Triton kernels on a CPU, in Triton's interpreter (TRITON_INTERPRET=1), from inside jitted JAX functions."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from m3jax.kernels import triton_launch
from m3jax.kernels.cached_attention import api as cached_attention_api
from m3jax.kernels.few_rows import api as few_rows_api
from m3jax.kernels.gated_delta import api as gated_delta_api
from m3jax.kernels.mamba3 import api
from m3jax.kernels.mamba3.triton import scan as triton_scan

_patch_tensors = interpreter._patch_lang_tensor


def _patch_tensors_for_numpy(tensor, scope) -> None:
    """Loop bounds are arrays of one element in the interpreter, which NumPy from 2.4 on does not turn into integers."""
    _patch_tensors(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensors_for_numpy


# Kernels that write only some of an array that they update in place.
_WRITE_IN_PART = ("_attend",)

# The interpreter patches the language's module while a kernel runs; XLA runs callbacks in threads of its own.
_ONE_AT_A_TIME = threading.Lock()


class _Pointer:
    """A numpy array in the form in which the interpreter takes tensors: an address, a dtype and a storage."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = f"torch.{array.dtype}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Pointer":
        return self

    def cpu(self) -> "_Pointer":
        return self

    def new_empty(self, *_, **__) -> "_Pointer":
        return _Pointer(self.array)

    def set_(self, *_) -> None:
        """The interpreter's copy for the host is the array itself."""

    def copy_(self, *_) -> None:
        """Results are in the array already."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    stride = size


def _interpretable(dtype) -> np.dtype:
    """The interpreter cannot multiply bfloat16 matrices: there they are float32."""
    return np.dtype(np.float32) if dtype == jax.numpy.bfloat16 else np.dtype(dtype)


def call_kernel(kernel, args, scalars, out, grid, warps, constants, aliases):
    """Stands in for `m3jax.kernels.triton_launch.call_kernel`; outputs start as NaN, so that what is left shows."""
    del warps
    # Here no output lies on an input; that the pairs match is checked.
    for source, target in (aliases or {}).items():
        assert (args[source].shape, args[source].dtype) == (out[target].shape, out[target].dtype)
    left_as_it_is = aliases if kernel.__name__ in _WRITE_IN_PART else {}
    # The hardware's approximations are inline assembly, which the interpreter cannot read.
    constants = constants | {"FAST": False}

    def run(*arrays):
        inputs = [np.array(v, _interpretable(v.dtype)) for v in arrays]
        outputs = [
            np.full(v.shape, -1 if np.issubdtype(v.dtype, np.integer) else np.nan, _interpretable(v.dtype)) for v in out
        ]
        for source, target in left_as_it_is.items():
            outputs[target][:] = inputs[source]
        pointers = [_Pointer(v) for v in inputs], [_Pointer(v) for v in outputs]
        with _ONE_AT_A_TIME, np.errstate(all="ignore"):
            kernel[grid](*pointers[0], *(v if isinstance(v, int) else float(v) for v in scalars.values()),
                              *pointers[1], **constants)  # fmt: skip
        return [v.astype(shape.dtype) for v, shape in zip(outputs, out, strict=True)]

    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in out]
    return jax.pure_callback(run, shapes, *args, vmap_method="sequential")


def launches(function, *args) -> int:
    """Kernels in the program of a function, those in a loop once."""

    def count(jaxpr) -> int:
        inner = (v for equation in jaxpr.eqns for v in jax.tree.leaves(equation.params) if hasattr(v, "eqns"))
        return sum(equation.primitive.name == "pure_callback" for equation in jaxpr.eqns) + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*args))


def launches_of_step(layer, state) -> int:
    """Kernels in one token's step of a layer 16 wide, three rows."""
    u = jnp.zeros((3, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), u[:, None])
    return launches(lambda *args: layer.apply(*args[:2], state=args[2]), params, u, state)


def use(monkeypatch) -> None:
    """Makes scans and steps take implementation="triton" on this machine, and run it here."""
    monkeypatch.setattr(triton_launch, "call_kernel", call_kernel)
    for module in (api, cached_attention_api, few_rows_api, gated_delta_api):
        monkeypatch.setattr(module, "no_triton_here", lambda: None)
    # Else what a test patches may be missing in what an earlier one has traced.
    monkeypatch.setattr(triton_scan, "_scan", triton_scan._scan.__wrapped__)
