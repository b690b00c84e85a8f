"""Checkpoints on the Hugging Face hub: their json and safetensors files, nothing else."""

import re
from pathlib import Path

import huggingface_hub

from m3jax.errors import CheckpointError
from m3jax.interop.safetensors_files import has_tensors

_PATTERNS = ["*.json", "*.safetensors"]
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository_name(name: str) -> bool:
    """Whether a repository can have this name, OWNER/NAME."""
    return _NAME.fullmatch(name) is not None


def snapshot(name: str) -> Path:
    """Downloads a repository into Hugging Face's cache, or finds it there, and returns its directory.

    Raises:
      CheckpointError: no network, no such repository, or one without safetensors files.
    """
    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name!r}: no such directory here, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{reason}). Without a network, download it elsewhere and give the directory."
        ) from error
    if not has_tensors(path):
        raise CheckpointError(
            f"{name!r} on the Hugging Face hub has no safetensors files. Pickled tensors (pytorch_model.bin) are not "
            "downloaded: reading a pickle can run any code that is in it. If the repository has them, download it "
            "where you trust it; giving its directory then says how to convert them."
        )
    return path
