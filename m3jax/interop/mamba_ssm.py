"""Reads Mamba-3 language models in the released layout (state-spaces/mamba): config.json and model.safetensors.

Two things differ from here. Linear weights are [out, in] there. And the rotated coordinates of B and C are pairs
(2i, 2i + 1) in SISO models and (i, i + n/2) in MIMO ones, where ours are (i, s + i): every axis that runs over those n
coordinates is permuted (rows of the projection, both norm weights, both biases).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from m3jax.config import ModelConfig, build_config
from m3jax.errors import CheckpointError

_WEIGHTS = "model.safetensors"
_HEAD = "lm_head.weight"


def is_released_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory in the released layout."""
    return (path / "config.json").is_file() and (path / _WEIGHTS).is_file()


def load(path: Path, a_activation: str = "heavy_tail") -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a checkpoint directory.

    Args:
      path: directory with config.json and model.safetensors.
      a_activation: heavy_tail or softplus; the released files do not say which one a model was trained with.

    Returns:
      (model config computing in the stored dtype, parameters in that dtype).

    Raises:
      CheckpointError: a file or a config field is missing, or tensors are missing, unexpected or of another shape.
    """
    try:
        released = json.loads((path / "config.json").read_text())
        with safe_open(path / _WEIGHTS, framework="flax") as file:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the checkpoint in {path}: {error}") from error
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"{path / _WEIGHTS} mixes dtypes: {', '.join(sorted(dtypes))}; expected a single one.")
    config = model_config(released, a_activation, dtypes.pop())
    return config, parameters(tensors, config)


def model_config(released: dict[str, Any], a_activation: str, dtype: str) -> ModelConfig:
    """The `ModelConfig` of a released config.json.

    Raises:
      CheckpointError: not an attention-free Mamba-3 model, or a field is missing.
    """
    mixer = released.get("ssm_cfg", {})
    wanted = {"layer": mixer.get("layer") == "Mamba3", "attn_layer_idx": not released.get("attn_layer_idx")}
    wrong = [name for name, fits in wanted.items() if not fits]
    if wrong:
        raise CheckpointError(f"config.json: unsupported {', '.join(wrong)}; only attention-free Mamba3 models load.")
    try:
        model = {
            "vocab_size": released["vocab_size"],
            "pad_vocab_multiple": released.get("pad_vocab_size_multiple", 8),
            "tie_embeddings": released.get("tie_embeddings", True),
            "d_model": released["d_model"],
            "n_layers": released["n_layer"],
            "d_intermediate": released["d_intermediate"],
        }
    except KeyError as error:
        raise CheckpointError(f"config.json has no field {error}.") from error
    model |= {
        "expand": mixer.get("expand", 2),
        "headdim": mixer.get("headdim", 64),
        "d_state": mixer.get("d_state", 128),
        "ngroups": mixer.get("ngroups", 1),
        "mimo_rank": mixer.get("mimo_rank", 4) if mixer.get("is_mimo", False) else 1,
        "rope_fraction": mixer.get("rope_fraction", 0.5),
        "a_floor": mixer.get("A_floor", 1e-4),
        "outproj_norm": mixer.get("is_outproj_norm", False),
        "a_activation": a_activation,
        "dtype": dtype,
        "param_dtype": dtype,
    }
    return build_config({"model": model}).model


def parameters(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree from tensors under their released names (or from gradients under those names).

    Raises:
      CheckpointError: lists every missing, unexpected or misshapen tensor.
    """
    if config.tie_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    expected = _released_shapes(config)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected: {name} {tensors[name].shape}" for name in tensors if name not in expected]
    problems += [
        f"shape of {name}: {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError("The tensors do not fit the config:\n  " + "\n  ".join(problems))
    layers = [_layer(tensors, f"backbone.layers.{i}.", config) for i in range(config.n_layers)]
    head = {} if config.tie_embeddings else {"head": tensors[_HEAD]}
    return head | {
        "embedding": tensors["backbone.embedding.weight"],
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        "norm": {"scale": tensors["backbone.norm_f.weight"]},
    }


def rotary_order(config: ModelConfig) -> np.ndarray:
    """Released index of each of our n coordinates: s real parts, s imaginary parts, the rest in its order."""
    n, s = config.d_state, config.n_angles
    first = np.arange(s)
    real, imag = (first, first + n // 2) if config.mimo_rank > 1 else (2 * first, 2 * first + 1)
    rest = np.setdiff1d(np.arange(n), np.concatenate([real, imag]))
    return np.concatenate([real, imag, rest])


def _layer(tensors: Mapping[str, np.ndarray], prefix: str, config: ModelConfig) -> dict[str, Any]:
    def get(name: str) -> np.ndarray:
        return tensors[prefix + name]

    order = rotary_order(config)
    mixer = {
        "in_proj": {"kernel": _permute_projection(get("mixer.in_proj.weight"), order, config).T},
        "dt_bias": get("mixer.dt_bias"),
        "b_norm": {"scale": get("mixer.B_norm.weight")[order]},
        "c_norm": {"scale": get("mixer.C_norm.weight")[order]},
        "b_bias": get("mixer.B_bias")[..., order],
        "c_bias": get("mixer.C_bias")[..., order],
        "d": get("mixer.D"),
        "out_proj": {"kernel": get("mixer.out_proj.weight").T},
    }
    if config.mimo_rank > 1:
        mixer |= {name: get(f"mixer.{name}") for name in ("mimo_x", "mimo_z", "mimo_o")}
    if config.outproj_norm:
        mixer["norm_scale"] = get("mixer.norm.weight").reshape(config.n_heads, config.headdim)
    layer = {"mixer_norm": {"scale": get("norm.weight")}, "mixer": mixer}
    if config.d_intermediate:
        layer["mlp_norm"] = {"scale": get("norm2.weight")}
        layer["mlp"] = {name: {"kernel": get(f"mlp.{name}.weight").T} for name in ("fc1", "fc2")}
    return layer


def _permute_projection(weight: np.ndarray, order: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of in_proj are z, x, B, C, ...; B and C index (rank, group, coordinate)."""
    start, n = 2 * config.d_inner, config.d_state
    groups = 2 * config.mimo_rank * config.ngroups
    bc = weight[start : start + groups * n].reshape(groups, n, -1)[:, order]
    return np.concatenate([weight[:start], bc.reshape(groups * n, -1), weight[start + groups * n :]])


def _released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, inner, heads, rank, n = config.d_model, config.d_inner, config.n_heads, config.mimo_rank, config.d_state
    projection = 2 * inner + 2 * rank * config.ngroups * n + 3 * heads + config.n_angles
    layer = {
        "norm.weight": (d,),
        "mixer.in_proj.weight": (projection, d),
        "mixer.dt_bias": (heads,),
        "mixer.B_norm.weight": (n,),
        "mixer.C_norm.weight": (n,),
        "mixer.B_bias": (heads, rank, n),
        "mixer.C_bias": (heads, rank, n),
        "mixer.D": (heads,),
        "mixer.out_proj.weight": (d, inner),
    }
    if rank > 1:
        layer |= {f"mixer.{name}": (heads, rank, config.headdim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if config.outproj_norm:
        layer["mixer.norm.weight"] = (inner,)
    if config.d_intermediate:
        layer["norm2.weight"] = (d,)
        layer |= {"mlp.fc1.weight": (2 * config.d_mlp, d), "mlp.fc2.weight": (d, config.d_mlp)}
    shapes = {"backbone.embedding.weight": (config.padded_vocab_size, d), "backbone.norm_f.weight": (d,)}
    if not config.tie_embeddings:
        shapes[_HEAD] = (config.padded_vocab_size, d)
    return shapes | {
        f"backbone.layers.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()
    }
