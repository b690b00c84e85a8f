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


def test_runs_are_one_launch():
    """Under vmap over runs: every run as alone."""
    each = [{name: v[:, :11, :2] for name, v in make(seed, "float32").items()} for seed in range(2)]
    args = jax.tree.map(lambda *v: jnp.stack(v), *each)

    def results(args):
        def scan(args):
            return gated_delta_scan(**args, chunk_size=4, implementation="triton", return_state=True)

        out, pullback = jax.vjp(scan, args)
        return *out, *pullback(jax.tree.map(jnp.cos, out))

    mapped = jax.vmap(results)
    actual = jax.jit(mapped)(args)
    for i, own in enumerate(each):
        for value, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(jax.jit(results)(own)), strict=True):
            tolerances.assert_close(value[i], expected, tolerances.rounding("float32", 11 * N), f"run {i}")
    assert interpreter.launches(mapped, args) == interpreter.launches(results, each[0]) == 2
    assert "scan[" not in str(jax.make_jaxpr(mapped)(args))


@pytest.mark.parametrize(("dtype", "chunk_size", "message"), [
    ("float64", None, "v has dtype float64; the Triton kernel takes float32"),
    ("float32", 1024, "a chunk of 75 keys of width 12 takes 8192 bytes"),
])  # fmt: skip
def test_refusals_name_the_reason(monkeypatch, x64, dtype, chunk_size, message):
    monkeypatch.setattr("m3jax.kernels.gated_delta.triton_walk._MAX_TILE", 4096)
    with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {message}'):
        gated_delta_scan(**make(0, dtype), chunk_size=chunk_size, implementation="triton")
