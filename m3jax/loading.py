"""Loads a model to use it from Python, whatever wrote it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.errors import CheckpointError
from m3jax.interop import mamba_ssm
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import load_checkpoint

_DTYPES = ("float32", "bfloat16", "float64")


def load(
    path: str | Path,
    dtype: str | None = None,
    *,
    step: int | None = None,
    ema: bool = False,
    a_activation: str = "heavy_tail",
) -> tuple[LanguageModel, dict[str, Any]]:
    """Loads a model and its parameters.

    Args:
      path: a workdir of m3jax.train or one checkpoint in it, or a directory in the released layout of
        state-spaces/mamba (config.json and model.safetensors).
      dtype: of parameters and computation: float32, bfloat16 or float64; None = the stored dtype.
      step: of a workdir, the checkpoint to take; None = the newest.
      ema: of a workdir, take the moving average of the parameters.
      a_activation: of a released model, heavy_tail or softplus; its files do not say.

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` gives logits, and `m3jax.generate(model, params, ...)`
      continues prompts.

    Raises:
      CheckpointError: nothing there, or a checkpoint that is incomplete, corrupt or of another layout.
      ValueError: an unknown dtype.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r}; expected None or one of {', '.join(_DTYPES)}.")
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if mamba_ssm.is_released_checkpoint(path):
        config, params = mamba_ssm.load(path, a_activation)
    else:
        checkpoint = load_checkpoint(path, step, ema=ema)
        config, params = checkpoint.config.model, checkpoint.params
    dtype = dtype or config.param_dtype
    state_dtype = str(jnp.promote_types(dtype, jnp.float32))
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, state_dtype=state_dtype)
    return LanguageModel(config), jax.tree.map(lambda v: jnp.asarray(v, dtype), params)
