"""Loads a model or a whole checkpoint, whatever wrote it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.data.tokenizer import check_vocabulary, load_tokenizer
from m3jax.errors import CheckpointError, ConfigError
from m3jax.interop import hub, mamba_ssm
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpoint, load_checkpoint

_DTYPES = ("float32", "bfloat16", "float64")


def load(
    path: str | Path,
    dtype: str | None = None,
    *,
    step: int | None = None,
    ema: bool = False,
    a_activation: str | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """Loads a model and its parameters.

    Args:
      path: a workdir of m3jax.train or one checkpoint in it, a directory in the released layout of state-spaces/mamba
        (config.json and safetensors files), or the name of a Hugging Face repository that has it, OWNER/NAME.
      dtype: of parameters and computation: float32, bfloat16 or float64; None = the stored dtype.
      step: of a workdir, the checkpoint to take; None = the newest.
      ema: of a workdir, take the moving average of the parameters.
      a_activation: heavy_tail or softplus; None = what the checkpoint says, and for a released one, which does not say,
        heavy_tail.

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` gives logits, and `m3jax.generate(model, params, ...)`
      continues prompts.

    Raises:
      CheckpointError: nothing there, or a checkpoint that is incomplete, corrupt or of another layout.
      ValueError: an unknown dtype, or float64 without JAX_ENABLE_X64.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r}; expected None or one of {', '.join(_DTYPES)}.")
    path = find_checkpoint(path)
    overrides = {} if a_activation is None else {"model.a_activation": a_activation}
    if mamba_ssm.is_released_checkpoint(path):
        _check_no_run(path, step, ema)
        config, params = mamba_ssm.load(path, overrides)
    else:
        checkpoint = load_checkpoint(path, step, ema=ema, overrides=overrides)
        config, params = checkpoint.config, checkpoint.params
    dtype = dtype or config.model.param_dtype
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype = 'float64': JAX has 64-bit numbers if JAX_ENABLE_X64=1 is set.")
    state_dtype = str(jnp.promote_types(dtype, jnp.float32))
    model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype, state_dtype=state_dtype)
    return LanguageModel(model), _on_device(params, dtype)


def read_checkpoint(
    path: str | Path, step: int | None = None, *, ema: bool = False, overrides: dict[str, Any] | None = None
) -> Checkpoint:
    """Reads a checkpoint with its config and tokenizer for the programs, onto the first device.

    Args:
      path: as in `load`.
      step: of a workdir, the checkpoint to take; None = the newest.
      ema: of a workdir, take the moving average of the parameters.
      overrides: config keys to change, {"a.b": value}. The tokenizer of a checkpoint in the released layout is the
        tokenizer.json in its directory, or data.tokenizer of these.

    Raises:
      CheckpointError: as `load`.
      ConfigError: overrides that do not fit, or no tokenizer.
    """
    path, overrides = find_checkpoint(path), overrides or {}
    if not mamba_ssm.is_released_checkpoint(path):
        return load_checkpoint(path, step, ema=ema, overrides=overrides)
    _check_no_run(path, step, ema)
    tokenizer_file = mamba_ssm.tokenizer_file(path)
    if tokenizer_file is not None:
        overrides = {"data.tokenizer": str(tokenizer_file)} | overrides
    if "data.tokenizer" not in overrides:
        raise ConfigError(
            f"{path} has no tokenizer.json: give the tokenizer that the model was trained with, as "
            "--config.data.tokenizer=FILE, a name on the Hugging Face hub, or bytes."
        )
    tokenizer = load_tokenizer(overrides["data.tokenizer"])
    config, params = mamba_ssm.load(path, overrides)
    check_vocabulary(tokenizer, config)
    return Checkpoint(path, 0, config, _on_device(params, config.model.param_dtype), tokenizer)


def find_checkpoint(path: str | Path) -> Path:
    """Returns the directory that is meant: `path` itself, or that of a Hugging Face repository, downloaded.

    Raises:
      CheckpointError: there is none.
    """
    if Path(path).exists():
        return Path(path)
    if hub.is_repository_name(str(path)):
        return hub.snapshot(str(path))
    raise CheckpointError(f"{path} does not exist.")


def _check_no_run(path: Path, step: int | None, ema: bool) -> None:
    if ema or step is not None:
        raise CheckpointError(f"{path} is in the released layout, which has no steps and no moving average.")


def _on_device(tree: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same tree with arrays of jax; those that it had are dropped one by one, so that there is no second copy."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _on_device(value, dtype)
        else:  # awaited, because until then the copy holds on to what it copies
            tree[key] = jnp.asarray(value, dtype).block_until_ready()
    return tree
