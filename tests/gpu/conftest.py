"""The kernels on the GPU that is there, against float64: make test-gpu."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """A missing GPU is a failure: who asks for these tests means to run them."""
    if jax.default_backend() != "gpu":
        pytest.fail(f"-m gpu: the default device is a {jax.default_backend()}.")
