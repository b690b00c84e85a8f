"""How copies between global and shared memory are issued.

jax finds the one thread that issues a kernel's copies once, at the kernel's beginning. Where a copy is, the assembler
then knows only of a predicate of each thread, finds addresses in vector registers and moves them to the scalar unit's,
some 15 instructions for a copy. With the thread elected in a branch on the spot it takes a third of that.
"""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm


def elect_on_the_spot(simulated: bool) -> None:
    """Lets all later copies of the kernel be issued by a thread that is elected where they are."""
    if simulated:
        return

    @plgpu.inline_mgpu()
    def inline(ctx):
        ctx.async_copy = functools.partial(_copy, ctx.async_copy)

    inline()


def _copy(copy, *, arrive: bool, predicate: ir.Value, **options) -> None:
    is_first, _ = predicate.owner.operands  # of the warpgroup's warps; and elected
    copy(arrive=False, predicate=is_first, **options)
    issued = _last()
    operands = list(issued.operands)
    if isinstance(issued.opview, nvvm.CpAsyncBulkTensorSharedCTAToGlobalOp):
        descriptor, shared, *at, _ = operands
        places, kind = f"[$1, {{{', '.join(f'${k + 3}' for k in range(len(at)))}}}], [$2]", "global.shared::cta.bulk_group"
        given, constraints = [is_first, descriptor, shared, *at], "b,l,r" + ",r" * len(at)
    else:
        shared, descriptor, *at, barrier, _ = operands
        places = f"[$1], [$2, {{{', '.join(f'${k + 4}' for k in range(len(at)))}}}], [$3]"
        kind = "shared::cluster.global.mbarrier::complete_tx::bytes"
        given, constraints = [is_first, shared, descriptor, barrier, *at], "b,r,l,r" + ",r" * len(at)
    code = (
        "{ .reg .pred p; @!$0 bra others; elect.sync _|p, -1; "
        f"@p cp.async.bulk.tensor.{len(at)}d.{kind} {places}; others: }}"
    )
    llvm.inline_asm(ir.Type.parse("!llvm.void"), given, code, constraints, has_side_effects=True)
    issued.erase()
    if arrive:
        nvvm.cp_async_bulk_commit_group()


def _last() -> ir.Operation:
    """The operation before the insertion point."""
    point = ir.InsertionPoint.current
    before = None
    for operation in point.block.operations:
        if point.ref_operation is not None and operation.operation == point.ref_operation.operation:
            break
        before = operation.operation
    return before
