"""Every Triton kernel compiles for the GPUs it is meant for, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_triton", reason="jax-triton or the jax-cuda plugin is missing", exc_type=ImportError)

KERNELS = {
    "prepare", "forward", "state_gradients", "flows", "value_gradients", "key_gradients", "step_kernel", "_walk",
    "_delta_step", "_attend", "_put_together", "_add_up",
}  # fmt: skip
# Bytes that one program can have: A100, H100, B200 (CUDA C++ programming guide, compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits(capability):
    script = Path(__file__).with_name("lower_triton.py")
    environment = {name: v for name, v in os.environ.items() if name not in ("TRITON_INTERPRET", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", script, str(capability)], cwd=script.parents[2], text=True,
        capture_output=True, env=environment | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    taken = json.loads(done.stdout)
    assert taken.keys() >= KERNELS
    assert max(taken.values()) <= SHARED_MEMORY[capability], taken
