"""Language models in the released layout (state-spaces/mamba): a directory with config.json and safetensors files."""

import json
from pathlib import Path
from typing import Any

from m3jax.config import Config, ModelConfig, build_config, override
from m3jax.data.atomic import build_new
from m3jax.errors import CheckpointError
from m3jax.interop.released_config import from_released, to_released
from m3jax.interop.released_tensors import EMBEDDING, HEAD, differences, parameters, released_shapes, released_tensors
from m3jax.interop.safetensors_files import SHARD_BYTES, StoredTensors, has_tensors, write_tensors

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_PICKLES = "pytorch_model*.bin"


def is_released_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory in the released layout, its tensors in safetensors files or pickled."""
    return (path / _CONFIG).is_file() and (has_tensors(path) or any(path.glob(_PICKLES)))


def load(path: Path, overrides: dict[str, Any] | None = None) -> tuple[Config, dict[str, Any]]:
    """Reads a checkpoint directory.

    Args:
      path: directory with config.json and model.safetensors, or several files and model.safetensors.index.json.
      overrides: config keys to change, {"a.b": value}. model.a_activation is heavy_tail unless this or config.json
        says softplus: the released files do not say which one a model was trained with.

    Returns:
      (config whose model computes in the stored dtype, parameters in that dtype, as numpy arrays). Where the files mix
      dtypes, it is the one that holds all of them exactly.

    Raises:
      CheckpointError: a file cannot be read, config.json lacks a field or has one with no counterpart here, tensors
        are missing, unexpected or of another shape (all of them are listed), or a tied head is not the embedding.
      ConfigError: overrides that do not fit.
    """
    tensors = _open(path)
    config = _read_config(path, tensors, overrides or {}, {})
    return config, parameters(tensors, config.model)


def read_config(path: Path, *, a_activation: str) -> Config:
    """The config that `load` gives, without reading the tensors but for a tied head that is stored.

    Args:
      path: as there.
      a_activation: of a config.json that does not say it.

    Raises:
      CheckpointError: as there.
    """
    return _read_config(path, _open(path), {}, {"a_activation": a_activation})


def _open(path: Path) -> StoredTensors:
    if not has_tensors(path):
        raise CheckpointError(_pickled(path))
    return StoredTensors(path)


def _read_config(path: Path, tensors: StoredTensors, overrides: dict[str, Any], defaults: dict[str, Any]) -> Config:
    """Reads config.json and checks that the tensors are those of its model; `defaults` are for what it does not say."""
    try:
        said = from_released(json.loads((path / _CONFIG).read_text()))
    except (OSError, AttributeError, TypeError, ValueError, RecursionError) as error:  # values of other kinds
        raise CheckpointError(f"Cannot read {path / _CONFIG}: {type(error).__name__}: {error}") from error
    dtypes = dict.fromkeys(("dtype", "param_dtype"), tensors.dtype)
    config = build_config(override({"model": defaults | said | dtypes}, overrides))
    found = tensors.shapes
    tied_head = config.model.tie_embeddings and HEAD in found  # PyTorch may save the embedding again
    if tied_head:
        found = {name: shape for name, shape in found.items() if name != HEAD}
    problems = tensors.problems + differences(found, released_shapes(config.model))
    if problems:
        raise CheckpointError(f"The tensors in {path} do not fit its config:\n  " + "\n  ".join(problems))
    if tied_head and not tensors.equal(HEAD, EMBEDDING):
        raise CheckpointError(
            f"{path / _CONFIG} ties the head to the embedding, but {HEAD} and {EMBEDDING} differ: set tie_embeddings "
            f"to false there if the model has a head of its own, else leave out {HEAD}."
        )
    return config


def tokenizer_file(path: Path) -> Path | None:
    """The tokenizer.json of a checkpoint directory, if it has one."""
    file = path / _TOKENIZER
    return file if file.is_file() else None


def write(
    directory: Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer_json: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a checkpoint directory, every number as it is; a killed process leaves nothing there.

    Args:
      directory: to be made.
      config: of the model.
      params: its parameters, jax or numpy arrays; one tensor at a time is copied.
      tokenizer_json: the contents of a tokenizer.json to put beside them.
      shard_bytes: more than this is divided over several files.

    Raises:
      ConfigError: the released code has no such model; the message names the key.
      CheckpointError: parameters that are not the config's (all of them are listed).
      FileExistsError: the directory is there.
    """
    text = json.dumps(to_released(config), indent=2) + "\n"
    tensors = released_tensors(params, config)

    def fill(partial: Path) -> None:
        write_tensors(partial, tensors, shard_bytes)
        if tokenizer_json is not None:
            (partial / _TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (partial / _CONFIG).write_text(text)

    build_new(directory, fill)


def _pickled(path: Path) -> str:
    files = ", ".join(sorted(file.name for file in path.glob(_PICKLES)))
    return (
        f"{path} has its tensors in {files}, a pickle: reading one can run any code that it holds, and m3jax reads "
        "none. Where you trust it and have PyTorch, convert it, once:\n"
        '  python -c "import torch, safetensors.torch as s; '
        "t = torch.load('pytorch_model.bin', weights_only=True); "
        "s.save_file({k: v.clone() for k, v in t.items()}, 'model.safetensors')\""
    )
