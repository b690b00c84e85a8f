"""The parameters of another checkpoint as those that a run starts from: `config.train.init_from`.

What is compared are the keys of the model that decide what the parameters mean, and the tokenizer; the optimizer, the
schedule and the data are the new run's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from m3jax.config import INITIALISATION_KEYS, Config, ModelConfig, build_config
from m3jax.data import Tokenizer, load_tokenizer
from m3jax.errors import CheckpointError
from m3jax.interop import mamba_ssm
from m3jax.loading import find_checkpoint
from m3jax.training.checkpoint import open_parameters, read_parameters, step_directory
from m3jax.training.workdir import FREE_MODEL_KEYS

PyTree = Any

_ANY_VALUE = (*FREE_MODEL_KEYS, *INITIALISATION_KEYS, "param_dtype")


@dataclass(frozen=True)
class InitialParameters:
    """Parameters that fit a run, not yet read.

    Attributes:
      path: of the checkpoint.
      read: gives them in the shapes, dtypes and shardings of its argument.
    """

    path: Path
    read: Callable[[PyTree], PyTree]


def find_initial(config: Config, tokenizer: Tokenizer) -> InitialParameters | None:
    """Finds what config.train.init_from names and compares it with the run; None if it names nothing.

    A released checkpoint that does not say which activation A has is taken to have the config's.

    Raises:
      CheckpointError: nothing there, a checkpoint that cannot be used, one of another model (the keys are listed), or
        of another tokenizer.
    """
    if config.train.init_from is None:
        return None
    path = find_checkpoint(config.train.init_from)
    if mamba_ssm.is_released_checkpoint(path):
        stored = mamba_ssm.read_config(path, a_activation=config.model.a_activation).model
        file = mamba_ssm.tokenizer_file(path)
        tokenizer_id = None if file is None else load_tokenizer(str(file)).id

        def read(abstract: PyTree) -> PyTree:
            dtype = {"model.param_dtype": config.model.param_dtype, "model.a_activation": config.model.a_activation}
            return jax.tree.map(_place, mamba_ssm.load(path, dtype)[1], abstract)
    else:
        path = step_directory(path)
        run = open_parameters(path)
        stored, tokenizer_id = build_config(run.config).model, run.tokenizer["id"]

        def read(abstract: PyTree) -> PyTree:
            return read_parameters(path, abstract)

    _check_model(path, stored, config.model)
    if tokenizer_id not in (None, tokenizer.id):
        raise CheckpointError(
            f"config.data.tokenizer = {tokenizer.name!r}: the model in {path}, which config.train.init_from names, was "
            "trained with another tokenizer, so that its embedding means other tokens."
        )
    return InitialParameters(path, read)


def _check_model(path: Path, stored: ModelConfig, model: ModelConfig) -> None:
    differ = {
        key: (value, getattr(stored, key))
        for key, value in vars(model).items()
        if key not in (*_ANY_VALUE, "mixers") and value != getattr(stored, key)
    }
    if model.mixer_pattern != stored.mixer_pattern:
        differ["mixers"] = model.mixers, stored.mixers
    if differ:
        ours = ", ".join(f"config.model.{key} = {value!r}" for key, (value, _) in differ.items())
        theirs = ", ".join(f"--config.model.{key}={value}" for key, (_, value) in differ.items())
        raise CheckpointError(
            f"{ours}: the model in {path}, which config.train.init_from names, has other values. Set {theirs}."
        )


def _place(array: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of the host on the devices of `abstract`, of which each process has its own."""
    return jax.make_array_from_callback(array.shape, abstract.sharding, lambda index: array[index])
