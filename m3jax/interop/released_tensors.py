"""Names, shapes and axis orders of the released tensors (state-spaces/mamba), and the parameters here that they are.

Two things differ from here. Linear weights are [out, in] there. And the rotated coordinates of Mamba-3's B and C are
pairs (2i, 2i + 1) in SISO models and (i, i + n/2) in MIMO ones, where ours are (i, s + i): every axis that runs over
those n coordinates is permuted (rows of the projection, both norm weights, both biases). Mamba-2's convolution is
[channels, 1, taps] there, [taps, channels] here; the order of its channels (x, B, C) and of the projection's rows
(z, x, B, C, dt) is the same; so is that of attention's (q, k, v; heads that share keys and values are neighbours).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from m3jax.config import ModelConfig
from m3jax.errors import CheckpointError
from m3jax.interop.safetensors_files import LazyTensor
from m3jax.models.mamba3 import projection_widths

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
Shape = tuple[int, ...]
Names = dict[str, Shape]


@dataclass(frozen=True)
class _Tensor:
    """A released tensor and the parameter that it is."""

    released_shape: Shape
    shape: Shape
    path: tuple[str, ...]  # of the parameter, in the model or in its layer
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_released: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Stack:
    """Layers whose parameters here are stacked, in their order."""

    path: tuple[str, ...]
    layers: range
    tensors: dict[str, _Tensor]  # of each


def released_shapes(config: ModelConfig) -> Names:
    """Every released tensor of such a model, with its shape."""
    outer = {name: tensor.released_shape for name, tensor in _outer_tensors(config).items()}
    return outer | {
        f"{_layer_prefix(i)}{name}": tensor.released_shape
        for stack in _stacks(config)
        for i in stack.layers
        for name, tensor in stack.tensors.items()
    }


def differences(found: Mapping[str, Shape | None], expected: Names) -> list[str]:
    """One line for each name that is missing, unexpected or of another shape; None is a shape that is not known."""
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    unexpected = [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected]
    misshapen = [
        f"shape of {name}: {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name) is not None and tuple(found[name]) != shape
    ]
    return missing + unexpected + misshapen


def parameters(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree from tensors under their released names (or from gradients under those names).

    Args:
      tensors: of the shapes in `released_shapes`; each is asked for once and dropped, so that they may be in files.
      config: of the model; its param_dtype is that of the result.
    """
    dtype = jax.numpy.dtype(config.param_dtype)
    tree: dict[str, Any] = {}
    for name, tensor in _outer_tensors(config).items():
        _insert(tree, tensor.path, tensor.to_ours(tensors[name]).astype(dtype, copy=False))
    for stack in _stacks(config):
        for name, tensor in stack.tensors.items():
            stacked = np.empty((len(stack.layers), *tensor.shape), dtype)
            for row, i in enumerate(stack.layers):
                stacked[row] = tensor.to_ours(tensors[_layer_prefix(i) + name])
            _insert(tree, (*stack.path, *tensor.path), stacked)
    return tree


def released_tensors(params: Mapping[str, Any], config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors of our parameter tree under their released names, each made when it is asked for.

    Raises:
      CheckpointError: lists every parameter that is missing, unexpected or of another shape.
    """
    outer = _outer_tensors(config)
    expected = {"/".join(tensor.path): tensor.shape for tensor in outer.values()}
    for stack in _stacks(config):
        for tensor in stack.tensors.values():
            expected["/".join((*stack.path, *tensor.path))] = (len(stack.layers), *tensor.shape)
    leaves = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    problems = differences({name: leaf.shape for name, leaf in leaves.items()}, expected)
    if problems:
        raise CheckpointError("The parameters do not fit the config:\n  " + "\n  ".join(problems))

    def lazy(tensor: _Tensor, path: tuple[str, ...], index: int | tuple[()]) -> LazyTensor:
        leaf = leaves["/".join(path)]
        return LazyTensor(
            tensor.released_shape, np.dtype(leaf.dtype), lambda: tensor.to_released(np.asarray(leaf)[index])
        )

    result = {name: lazy(tensor, tensor.path, ()) for name, tensor in outer.items()}
    stacks = list(_stacks(config))
    for i in range(config.n_layers):
        stack, row = stacks[i % len(stacks)], i // len(stacks)
        for name, tensor in stack.tensors.items():
            result[_layer_prefix(i) + name] = lazy(tensor, (*stack.path, *tensor.path), row)
    return result


def rotary_order(config: ModelConfig) -> np.ndarray:
    """Released index of each of our n coordinates: s real parts, s imaginary parts, the rest in its order."""
    n, s = config.d_state, config.n_angles
    first = np.arange(s)
    real, imag = (first, first + n // 2) if config.mimo_rank > 1 else (2 * first, 2 * first + 1)
    rest = np.setdiff1d(np.arange(n), np.concatenate([real, imag]))
    return np.concatenate([real, imag, rest])


def _stacks(config: ModelConfig) -> Iterator[_Stack]:
    """One for each place in the pattern of mixers."""
    pattern = config.mixer_pattern
    for k, mixer in enumerate(pattern):
        path = ("layers",) if len(pattern) == 1 else ("layers", str(k))
        yield _Stack(path, range(k, config.n_layers, len(pattern)), _layer_tensors(config, mixer))


def _layer_prefix(i: int) -> str:
    return f"backbone.layers.{i}."


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _outer_tensors(config: ModelConfig) -> dict[str, _Tensor]:
    table = (config.padded_vocab_size, config.d_model)
    outer = {EMBEDDING: _same("embedding", *table)}
    if not config.tie_embeddings:
        outer[HEAD] = _same("head", *table)
    return outer | {"backbone.norm_f.weight": _same("norm/scale", config.d_model)}


def _layer_tensors(config: ModelConfig, mixer: str) -> dict[str, _Tensor]:
    of_mixer = {"attention": _attention, "mamba2": _mamba2, "mamba3": _mamba3}[mixer](config)
    tensors = {"norm.weight": _same("mixer_norm/scale", config.d_model)}
    tensors |= {f"mixer.{name}": tensor for name, tensor in of_mixer.items()}
    if config.d_intermediate:
        tensors["norm2.weight"] = _same("mlp_norm/scale", config.d_model)
        tensors["mlp.fc1.weight"] = _linear("mlp/fc1/kernel", 2 * config.d_mlp, config.d_model)
        tensors["mlp.fc2.weight"] = _linear("mlp/fc2/kernel", config.d_model, config.d_mlp)
    return tensors


def _mamba3(config: ModelConfig) -> dict[str, _Tensor]:
    heads, rank, n = config.n_heads, config.mimo_rank, config.d_state
    order = rotary_order(config)
    tensors = {
        "in_proj.weight": _linear("mixer/in_proj/kernel", *_projection(config, order)),
        "dt_bias": _same("mixer/dt_bias", heads),
        "B_norm.weight": _permuted("mixer/b_norm/scale", order, n),
        "C_norm.weight": _permuted("mixer/c_norm/scale", order, n),
        "B_bias": _permuted("mixer/b_bias", order, heads, rank, n),
        "C_bias": _permuted("mixer/c_bias", order, heads, rank, n),
        "D": _same("mixer/d", heads),
        "out_proj.weight": _linear("mixer/out_proj/kernel", config.d_model, config.d_inner),
    }
    if rank > 1:
        per_rank = (heads, rank, config.headdim)
        tensors |= {name: _same(f"mixer/{name}", *per_rank) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if config.outproj_norm:
        tensors["norm.weight"] = _reshaped("mixer/norm_scale", (config.d_inner,), (heads, config.headdim))
    return tensors


def _mamba2(config: ModelConfig) -> dict[str, _Tensor]:
    heads, taps = config.n_heads, config.d_conv
    channels = config.d_inner + 2 * config.ngroups * config.d_state
    return {
        "in_proj.weight": _linear("mixer/in_proj/kernel", config.d_inner + channels + heads, config.d_model),
        "conv1d.weight": _Tensor(
            (channels, 1, taps), (taps, channels), ("mixer", "conv", "conv_kernel"),
            lambda v: v[:, 0].T, lambda v: v.T[:, None],
        ),
        "conv1d.bias": _same("mixer/conv/conv_bias", channels),
        "dt_bias": _same("mixer/dt_bias", heads),
        "A_log": _same("mixer/a_log", heads),
        "D": _same("mixer/d", heads),
        "norm.weight": _same("mixer/norm/scale", config.d_inner),
        "out_proj.weight": _linear("mixer/out_proj/kernel", config.d_model, config.d_inner),
    }  # fmt: skip


def _attention(config: ModelConfig) -> dict[str, _Tensor]:
    d = config.attention_headdim
    rows = (config.attention_heads + 2 * config.n_kv_heads) * d
    return {
        "in_proj.weight": _linear("mixer/qkv_proj/kernel", rows, config.d_model),
        "out_proj.weight": _linear("mixer/out_proj/kernel", config.d_model, config.attention_heads * d),
    }


def _projection(config: ModelConfig, order: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Sizes of in_proj, [out, in], and the released row of each of our columns; B and C index (rank, group, n)."""
    widths = projection_widths(config)
    rows = np.arange(sum(widths.values()))
    start, width = widths["z"] + widths["x"], widths["b"] + widths["c"]
    rows[start : start + width] = rows[start : start + width].reshape(-1, config.d_state)[:, order].ravel()
    return len(rows), config.d_model, rows


def _same(path: str, *shape: int) -> _Tensor:
    return _Tensor(shape, shape, tuple(path.split("/")), lambda v: v, lambda v: v)


def _permuted(path: str, order: np.ndarray, *shape: int) -> _Tensor:
    back = np.argsort(order)
    return _Tensor(shape, shape, tuple(path.split("/")), lambda v: v[..., order], lambda v: v[..., back])


def _reshaped(path: str, released_shape: Shape, shape: Shape) -> _Tensor:
    keys = tuple(path.split("/"))
    return _Tensor(released_shape, shape, keys, lambda v: v.reshape(shape), lambda v: v.reshape(released_shape))


def _linear(path: str, outputs: int, inputs: int, rows: np.ndarray | None = None) -> _Tensor:
    keys = tuple(path.split("/"))
    if rows is None:
        return _Tensor((outputs, inputs), (inputs, outputs), keys, np.transpose, np.transpose)
    back = np.argsort(rows)
    return _Tensor((outputs, inputs), (inputs, outputs), keys, lambda v: v[rows].T, lambda v: v.T[back])
