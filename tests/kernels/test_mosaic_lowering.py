"""The Mosaic GPU kernels lower for a GPU on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_triton", reason="jax-triton or the jax-cuda plugin is missing", exc_type=ImportError)

from tests.kernels.mosaic_cases import needs_new_jax


@needs_new_jax
def test_forward_and_gradient_lower():
    script = Path(__file__).with_name("lower_mosaic.py")
    environment = {name: v for name, v in os.environ.items() if name not in ("TRITON_INTERPRET", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, script], cwd=script.parents[2], text=True, capture_output=True,
        env=environment | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    calls = {name: [call.partition("_")[0] for call in made] for name, made in json.loads(done.stdout).items()}
    prepare, output = ["triton"] * 2, ["mosaic"]
    assert calls["one chunk"] == calls["documents"] == calls["vmap"] == prepare + output
    assert calls["two layers"] == calls["one chunk"]  # a program has each kernel once, however many layers call it
    assert calls["segments"] == prepare + 2 * output  # the state of every segment first
    backward = ["mosaic"] * 2  # the gradients of H, then the others
    finish = ["triton"]  # what the gradients' kernel leaves
    assert calls["gradient"] == calls["gradient under vmap"] == prepare + output + backward + finish
    # The read-out's gradient comes first; the read-out itself is not needed for it.
    assert calls["gradient with norm"] == prepare + output + ["triton"] + backward + finish
    assert calls["mimo gradient with norm"] == calls["gradient with norm"]
    assert calls["gradient of segments"] == prepare + 2 * output + ["mosaic"] + backward + finish
    # The first pass saves nothing.
    assert calls["gradient under checkpoint"] == 2 * (prepare + output) + backward + finish
    assert calls["mimo"] == prepare + 2 * output
    assert calls["mimo gradient under vmap and checkpoint"] == 2 * (prepare + output) + backward + finish
