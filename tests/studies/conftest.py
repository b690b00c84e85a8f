"""A study that trains in a blink."""

import copy

import pytest

from m3jax.config import override
from m3jax.studies.config import StudyConfig, build_study

_SMALL = {
    "grid": {"tasks": "parity:1", "widths": "8", "learning_rates": "3e-3,1e-2", "seeds": 2},
    "model": {"expand": 1, "headdim": 8, "d_state": 4},
    "train": {"stages": "4:6,8:6", "array_lengths": "8", "batch_size": 4, "block_steps": 3, "save_seconds": 0.0},
    "evaluation": {"lengths": "6,4-12", "sequences": 12},
}

# What makes it one of recall: three settings that take turns, two of which have arrays of the same length.
RECALL = {
    "grid__tasks": "mqar_few:1",
    "grid__models": "transformer",
    "train__stages": "8/2 16/4 16/2:6",
    "train__shortest": 0,
    "train__array_lengths": "8,16",
    "evaluation__lengths": "8/2,16/4",
}


@pytest.fixture(scope="session")
def small_study():
    """Makes the study, with {"group.key": value} changed."""

    def make(**changes) -> StudyConfig:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return build_study(override(copy.deepcopy(_SMALL), changes))

    return make
