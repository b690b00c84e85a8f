"""The walk of the gated delta rule in Triton's interpreter, against the one in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from m3jax.kernels import gated_delta_scan
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.test_gated_delta import DOCUMENTS, N, make, make_state

WIDER = 7  # values 70 wide: two programs, the second with more room than values


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


@pytest.mark.parametrize(("chunk_size", "length", "wider"), [(16, 75, 1), (11, 23, WIDER)])
def test_equals_the_walk_in_jax(chunk_size, length, wider):
    args = {name: v[:, :length] for name, v in make(5, "float32").items()}
    args["v"] = np.tile(args["v"], wider)
    state = np.tile(make_state("float32"), (1, 1, wider, 1))

    def results(implementation):
        def scan(args, state):
            return gated_delta_scan(
                **args, initial_state=state, segment_ids=DOCUMENTS[:, :length], chunk_size=chunk_size,
                implementation=implementation, return_state=True,
            )  # fmt: skip

        out, pullback = jax.vjp(scan, args, state)
        gradients, of_state = pullback(jax.tree.map(jnp.cos, out))
        return dict(zip(("o", "S"), out, strict=True)) | gradients | {"state": of_state}

    actual = jax.jit(results, static_argnums=0)("triton")
    for name, expected in jax.jit(results, static_argnums=0)("xla").items():
        tolerances.assert_close(actual[name], expected, tolerances.rounding("float32", length * N), name)


@pytest.mark.parametrize(("dtype", "chunk_size", "message"), [
    ("float64", None, "v has dtype float64; the Triton kernel takes float32"),
    ("float32", 1024, "a chunk of 75 keys of width 12 takes 8192 bytes"),
])  # fmt: skip
def test_refusals_name_the_reason(monkeypatch, x64, dtype, chunk_size, message):
    monkeypatch.setattr("m3jax.kernels.gated_delta.triton_walk._MAX_TILE", 4096)
    with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {message}'):
        gated_delta_scan(**make(0, dtype), chunk_size=chunk_size, implementation="triton")
