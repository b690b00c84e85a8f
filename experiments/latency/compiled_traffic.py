"""Counts what a training step's or a prefill's kernels read and write, compiled for an H100 that need not be there.

python experiments/latency/compiled_traffic.py --config configs/1b_siso.py --batch-size 8 [--prefill] [--top 20]

Needs jax 0.11 with the extra "cuda" and no GPU: XLA's compiler is told of one. Two versions of the code can be compared
so before they are timed. Bytes are those of the arrays that a kernel takes and returns, of what a fusion only slices
the slices; what is updated in place counts whole, and a loop's body once. The choices that XLA makes by timing are left
out: products are all the library's.
"""

import collections
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.cli import Parser, read_config, run_main
from m3jax.config import Config
from m3jax.models.language_model import LanguageModel
from m3jax.training.sharding import make_mesh
from m3jax.training.step import init_state, make_train_step

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
# What launches kernels; of the rest, such as bitcasts, nothing moves.
_KERNELS = {
    "fusion", "custom-call", "copy", "copy-start", "dot", "sort", "reduce", "transpose", "convert", "concatenate",
    "slice", "dynamic-update-slice", "scatter",
}  # fmt: skip
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


class Kernel(NamedTuple):
    """One launch in the compiled program."""

    n_bytes: int
    kind: str  # "product", "kernel of ours" or "XLA's"
    name: str
    result: str


def kernels_of(text: str) -> list[Kernel]:
    """The launches in an optimised HLO module's text, those in a loop once, both sides of a branch."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if begins:
            name = begins[2]
            entry = name if begins[1] else entry
            computations[name] = []
        elif line.startswith("  ") and name:
            computations[name].append(line)
    return _launches(entry, computations)


def _launches(name: str, computations: dict[str, list[str]]) -> list[Kernel]:
    found, shapes = [], {}
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        instruction, result, operation, rest = match.groups()
        shapes[instruction] = result
        if operation in ("while", "conditional", "call"):
            for inner in re.findall(r"(?:body|to_apply|true_computation|false_computation)=%([\w.\-]+)", line):
                found += _launches(inner, computations)
        elif operation in _KERNELS:
            called = re.search(r"calls=%([\w.\-]+)", line)
            body = computations.get(called[1], []) if called else []
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            read = sum(_read(_size(shapes.get(v, "")), i, body) for i, v in enumerate(operands))
            found.append(Kernel(_size(result) + read, _kind([line, *body]), instruction, result))
    return found


def _read(whole: int, number: int, body: list[str]) -> int:
    """Bytes that a fusion reads of its operand of that number: of one that it only slices, the slices."""
    elements: dict[str, int] = {}  # what is the operand in another form, and bytes of an element there
    sliced = width = 0
    for line in body:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, operation, rest = match.groups()
        if operation == "parameter" and rest.startswith(f"{number})"):
            width = elements[name] = _element(result)
        elif form := next((v for v in re.findall(r"%([\w.\-]+)", rest.split(")")[0]) if v in elements), None):
            if operation in ("bitcast", "convert"):
                elements[name] = _element(result)
            elif operation in ("slice", "dynamic-slice", "gather"):
                sliced += _size(result) * width // elements[form]
            else:
                return whole
    return min(whole, sliced) if elements else whole


def _kind(lines: list[str]) -> str:
    calls = [line for line in lines if " custom-call(" in line]
    if not calls:
        return "XLA's"
    return "product" if "cublas" in calls[0] else "kernel of ours"


def _element(shape: str) -> int:
    return _BYTES.get(shape.partition("[")[0], 1)


def _size(shape: str) -> int:
    """Bytes of an array or a tuple of arrays."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(_BYTES.get(d, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for d, dims in arrays)


def pretend_gpu() -> None:
    """Lets everything that asks for the device believe in an H100."""
    from jax_triton import triton_lib  # noqa: PLC0415

    from m3jax.kernels import gpu  # noqa: PLC0415
    from m3jax.kernels.few_rows import api as few_rows_api  # noqa: PLC0415
    from m3jax.kernels.gated_delta import api as gated_delta_api  # noqa: PLC0415
    from m3jax.kernels.mamba3 import api as mamba3_api  # noqa: PLC0415
    from m3jax.kernels.mamba3.mosaic import scan as mosaic_scan  # noqa: PLC0415
    from m3jax.kernels.mamba3.triton import plans  # noqa: PLC0415

    triton_lib.triton_kernel_call_lib.get_compute_capability = lambda device: 90
    for module in (gpu, plans):
        module.compute_capability = lambda: 90
    mosaic_scan._unsupported_here = lambda: None
    for api in (mamba3_api, gated_delta_api, few_rows_api):
        api.no_triton_here = lambda: None
    jax.default_backend = lambda: "gpu"


def lowered(config: Config, prefill: bool) -> jax.stages.Lowered:
    """The program for one H100; of a prefill, also the most probable next tokens."""
    devices = np.array(topologies.get_topology_desc("H100", "cuda", target_config=_H100, topology="1x1x1").devices)
    names = make_mesh(config).axis_names
    mesh = Mesh(devices.reshape([1] * len(names)), names)
    pretend_gpu()
    model = LanguageModel(config.model)
    shape = config.data.batch_size, config.data.sequence_length
    if not prefill:
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "segment_ids")}
        batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        given = jax.eval_shape(lambda: (init_state(config, model), batch, jnp.asarray(True)))
        return make_train_step(config, model, mesh).trace(*given).lower(lowering_platforms=("cuda",))

    def read(params, tokens: jax.Array):
        hidden, state = model.apply({"params": params}, tokens, method="prefill")
        return state, jnp.argmax(model.apply({"params": params}, hidden[:, -1], method="logits"), axis=-1)

    def init():
        return model.separate_layers(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])

    given = jax.eval_shape(lambda: (init(), jnp.zeros(shape, jnp.int32)))
    given = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P())), given)
    return jax.jit(read).trace(*given).lower(lowering_platforms=("cuda",))


def main() -> None:
    """Compiles, counts, prints."""
    parser = Parser("experiments/latency/compiled_traffic.py", __doc__.splitlines()[0], Config)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--prefill", action="store_true", help="of as many prompts; else a training step")
    parser.add_argument("--top", type=int, default=0, help="also so many kinds of launches, those that move most first")
    options, overrides = parser.parse(None)
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
    changes = {"data.batch_size": options.batch_size, "train.grad_accumulation": 1}
    began = time.perf_counter()
    program = lowered(read_config(options.config, changes | overrides), options.prefill)
    print(f"traced and lowered in {time.perf_counter() - began:.1f} s")
    program = program.compile()
    launches = kernels_of(program.as_text())
    for kind in ("product", "kernel of ours", "XLA's"):
        of_kind = [k for k in launches if k.kind == kind]
        print(f"{kind:16s}{len(of_kind):6d} launches{sum(k.n_bytes for k in of_kind) / 1e9:9.2f} GB")
    print(f"{'temporaries':31s}{program.memory_analysis().temp_size_in_bytes / 1e9:9.2f} GB")
    alike = collections.defaultdict(list)
    for k in launches:
        alike[re.sub(r"[.\d]+$", "", k.name), k.result].append(k.n_bytes)
    for (name, result), sizes in sorted(alike.items(), key=lambda item: -sum(item[1]))[: options.top]:
        print(f"{sum(sizes) / 1e9:9.2f} GB {len(sizes):5d} {name} {result[:80]}")


if __name__ == "__main__":
    run_main(main)
