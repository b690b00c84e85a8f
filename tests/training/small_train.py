"""Runs `m3jax.train` with SmallModel, for tests that start and kill many processes."""

import pytest

from m3jax.cli import run_main
from m3jax.train import main
from tests.training.conftest import use_small_model

if __name__ == "__main__":
    use_small_model(pytest.MonkeyPatch())
    run_main(main)
