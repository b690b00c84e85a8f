"""How a kernel's copies between global and shared memory are issued.

jax finds the thread that issues copies once, at the kernel's beginning. At a copy the assembler then knows of a
predicate that differs between threads: it finds addresses in vector registers and moves them to the scalar unit's, some
15 instructions a copy. If the thread is elected at the copy, in a branch that a whole warp takes, all happens in the
scalar unit, in a third of that. The branch is within the copy's assembly: LLVM would move what is before it.
"""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm


def elect_at_copies(simulated: bool) -> None:
    """Lets all later copies of the kernel elect the thread that issues them."""
    if simulated:
        return

    @plgpu.inline_mgpu()
    def inline(ctx):
        ctx.async_copy = functools.partial(_copy, ctx.async_copy)

    inline()


def _copy(copy, *, arrive: bool, predicate: ir.Value, **options) -> None:
    is_first, _ = predicate.owner.operands  # a warpgroup's first warp; and in it the elected thread
    copy(arrive=False, predicate=is_first, **options)
    issued = _last()
    if isinstance(issued.opview, nvvm.CpAsyncBulkTensorSharedCTAToGlobalOp):
        descriptor, shared, *at, _ = issued.operands
        fixed, constraints = [descriptor, shared], "l,r"
        kind, places = "global.shared::cta.bulk_group", "[$1, {at}], [$2]"
    else:
        shared, descriptor, *at, barrier, _ = issued.operands
        fixed, constraints = [shared, descriptor, barrier], "r,l,r"
        kind, places = "shared::cluster.global.mbarrier::complete_tx::bytes", "[$1], [$2, {at}], [$3]"
    numbers = ", ".join(f"${1 + len(fixed) + k}" for k in range(len(at)))
    places = places.replace("at", numbers)
    code = (
        "{ .reg .pred p; @!$0 bra others; elect.sync _|p, -1; "
        f"@p cp.async.bulk.tensor.{len(at)}d.{kind} {places}; others: }}"
    )
    constraints = f"b,{constraints}" + ",r" * len(at)
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [is_first, *fixed, *at], code, constraints, has_side_effects=True)
    issued.erase()
    if arrive:
        nvvm.cp_async_bulk_commit_group()


def _last() -> ir.Operation:
    """What has been put right before the insertion point."""
    point, before = ir.InsertionPoint.current, None
    for operation in point.block.operations:
        if point.ref_operation is not None and operation.operation == point.ref_operation.operation:
            break
        before = operation.operation
    return before
