"""Settings of the whole suite: eight simulated CPU devices, Triton's interpreter, no silent rank promotion.

With `-m gpu` (`make test-gpu`) instead the GPU that is there, for which Triton compiles.
"""

import glob
import importlib.metadata
import itertools
import os
import sys

if ("-m", "gpu") in itertools.pairwise(sys.argv):
    # Left for pytest-xdist's workers, whose arguments are others; they share the GPU's memory.
    here = ",".join(str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*"))))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", here)
    os.environ |= {"M3JAX_TESTS_ON": "gpu", "M3JAX_TEST_GPUS": gpus, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
if os.environ.get("M3JAX_TESTS_ON") == "gpu":
    # Each worker sees one of the GPUs.
    gpus = os.environ["M3JAX_TEST_GPUS"].split(",")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
else:
    # Level 0 halves the time to compile, which is most of what the suite does; arithmetic stays IEEE.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    if int(importlib.metadata.version("jax").split(".")[1]) >= 11:
        # Where Mosaic GPU kernels can be interpreted: their warpgroups block threads, of which there must be enough.
        os.environ |= {"NPROC": "16", "PJRT_NPROC": "16"}

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Runs the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
