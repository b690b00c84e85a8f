"""Lets a kernel read the number of a thread anew wherever it needs it, instead of once.

What depends on nothing else does not change in a loop, so that the compiler finds it before: dozens of addresses. In a
kernel that is short of registers they go to memory, from where each comes back after hundreds of cycles if the
first-level cache has little room beside shared memory. To read the number and find an address again takes a few.
"""

from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import thread_idx as _read_once  # without it there are no Mosaic kernels
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

_kernels: set[str] = set()


def read_anew(name: str) -> None:
    """In kernels whose body is a function of that name. All others stay as they are."""
    _kernels.add(name)


def _thread_idx() -> ir.Value:
    operation = ir.InsertionPoint.current.block.owner
    while (parent := operation.parent) is not None:
        operation = parent
    attributes = operation.attributes
    if "sym_name" not in attributes or ir.StringAttr(attributes["sym_name"]).value not in _kernels:
        return _read_once()
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)


utils.thread_idx = _thread_idx
