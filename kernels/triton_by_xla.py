"""Triton kernels that XLA compiles and launches as its own, for one row of a decode step.

In a CUDA graph such a kernel is a node, where a call of a library is a graph of its own. It may start before the one
before it has ended (programmatic dependent launch): it waits for that one before it reads or writes anything, and then
lets the next one start.
"""

import re

import jax
import triton
from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir
from triton._C.libtriton import ir as triton_ir
from triton.compiler import ASTSource
from triton.compiler.code_generator import ast_to_ttir
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gpu import compute_capability

TARGET = "__gpu$xla.gpu.triton"
# Of jax and Triton: the XLA of the first has to read what the second writes, and to start a kernel early.
_TRIED = {("0.11.2", "3.6.0")}
_CAPABILITY = 90  # the first that can


def available() -> bool:
    """Whether kernels can be launched so here; an argument EARLY tells a kernel that it is."""
    return (jax.__version__, triton.__version__) in _TRIED and compute_capability() == _CAPABILITY


@triton.jit
def wait_and_let_next_start():
    """What a kernel does first. The next one then waits beside it for its end, if there is room."""
    gdc_wait()
    gdc_launch_dependents()


def lower(ctx: mlir.LoweringRuleContext, *args: ir.Value, **params) -> list[ir.Value]:
    """As the lowering of a jax-triton call, of which the parameters are."""
    text = _ttir(ctx, **params)
    grid = triton_lib.normalize_grid(params["grid"], {})
    numbers = dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True)) | {
        "num_warps": params["num_warps"], "num_stages": params["num_stages"],
    }  # fmt: skip
    config = {
        "name": ir.StringAttr.get(re.search(r"tt\.func public @(\w+)", text)[1]),
        "ir": ir.StringAttr.get(text),
        "debug": ir.BoolAttr.get(False),
    } | {key: mlir.i32_attr(v) for key, v in numbers.items()}
    aliases = dict(params["input_output_aliases"])
    return jax.ffi.ffi_lowering(TARGET, backend_config=config, operand_output_aliases=aliases)(ctx, *args)


def _ttir(ctx: mlir.LoweringRuleContext, fn, scalar_args, num_warps: int, num_stages: int, **params) -> str:
    """The kernel in Triton's language of tiles; XLA passes arrays alone, so scalars are constants."""
    scalars = {fn.arg_names[i]: v for i, _, v in scalar_args}
    constants = {name: params[name] for name in fn.arg_names if name in params} | scalars
    arrays = iter([*ctx.avals_in, *ctx.avals_out])
    signature = {
        name: "constexpr" if name in constants else triton_lib.get_triton_type(next(arrays)) for name in fn.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name not in constants}
    backend = triton_lib.get_cuda_backend(0, _CAPABILITY)
    options = backend.parse_options({"num_warps": num_warps, "num_stages": num_stages})
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn, constexprs=constants, signature=signature, attrs=aligned)
    module = ast_to_ttir(
        fn, source, options=options, codegen_fns=backend.get_codegen_implementation(options), context=context,
        module_map=backend.get_module_map(),
    )  # fmt: skip
    backend.make_ttir(module, {}, options, _CAPABILITY)  # inlines, simplifies
    return str(module)
