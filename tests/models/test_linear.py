"""Linear layers of several widths: one product for each, or one for all, by how many rows there are."""

import jax
import jax.numpy as jnp
import pytest

from m3jax.config import ModelConfig
from m3jax.models.linear import Linear
from tests.tolerances import assert_close, rounding

INPUTS, WIDTHS = 16, (8, 24, 4)


def layer_and_params(gated: bool, apart: bool = False) -> tuple[Linear, dict]:
    layer = Linear(ModelConfig(dtype="float32"), (8, 8) if gated else WIDTHS, gated=gated, apart=apart)
    return layer, layer.init(jax.random.key(0), jnp.zeros((INPUTS + 1, INPUTS)))


@pytest.mark.parametrize("rows", [1, INPUTS, INPUTS + 1])
@pytest.mark.parametrize(("gated", "apart"), [(False, False), (False, True), (True, False)])
def test_is_the_product_with_the_whole_weight(monkeypatch, rows, gated, apart):
    layer, params = layer_and_params(gated, apart)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jax.random.normal(jax.random.key(1), (rows, INPUTS))

    def whole(params, x):
        y = x @ params["params"]["kernel"]
        return y[:, :8] * jax.nn.silu(y[:, 8:]) if gated else y

    def joined(params, x):
        return jnp.concatenate(layer.apply(params, x), axis=-1)

    (y, pullback), (expected, expected_pullback) = (jax.vjp(f, params, x) for f in (joined, whole))
    assert_close(y, expected, rounding(jnp.float32, INPUTS), "y")
    (grads, x_grad), (expected_grads, expected_x_grad) = pullback(y), expected_pullback(y)
    kernels = (v["params"]["kernel"] for v in (grads, expected_grads))
    assert_close(*kernels, rounding(jnp.float32, rows), "gradient of the weight")
    assert_close(x_grad, expected_x_grad, rounding(jnp.float32, sum(layer.widths)), "gradient of x")


@pytest.mark.parametrize(("rows", "apart", "backend", "barrier"), [
    (INPUTS + 1, True, "gpu", True), (INPUTS, True, "gpu", False), (INPUTS + 1, False, "gpu", False),
    (INPUTS + 1, True, "cpu", False),
])  # fmt: skip
def test_products_of_many_rows_stay_apart_on_a_gpu(monkeypatch, rows, apart, backend, barrier):
    layer, params = layer_and_params(False, apart)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text = jax.jit(layer.apply).lower(params, jnp.zeros((rows, INPUTS))).as_text()
    assert ("optimization_barrier" in text) == barrier
    assert text.count("stablehlo.dot_general") == (1 if rows <= INPUTS else len(layer.widths))
