"""Products of one row and of several by Triton, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import few_rows_product
from m3jax.kernels.gpu import compute_capability
from tests import tolerances
from tests.gpu.exact import in_float64

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "inner", "outer", "options"), [
    ("bfloat16", 2048, 8672, {"norm": True}), ("bfloat16", 2048, 4096, {"norm": True, "gated": True}),
    ("bfloat16", 4096, 2048, {"added": True}), ("float32", 1000, 1100, {"norm": True, "added": True, "gated": True}),
    ("bfloat16", 520, 3000, {}),
])  # fmt: skip
def test_product_of_one_row(dtype, inner, outer, options):
    keys = jax.random.split(jax.random.key(0), 4)
    norm, added, gated = (options.get(name, False) for name in ("norm", "added", "gated"))
    options = {"epsilon": 1e-5, "gated": gated}
    x = jax.random.normal(keys[0], (1, inner)).astype("float32" if norm else dtype)
    weight = (jax.random.normal(keys[1], (inner, outer * (1 + gated))) / np.sqrt(inner)).astype(dtype)
    scale = jax.random.normal(keys[2], (inner,)).astype(dtype) if norm else None
    residual = jax.random.normal(keys[3], (1, outer)) if added else None
    y = few_rows_product(x, weight, scale=scale, residual=residual, implementation="triton", **options)
    with jax.enable_x64(True):
        x, weight, scale, residual = in_float64((x, weight, scale, residual))
        exact = few_rows_product(x, weight, scale=scale, residual=residual, implementation="xla", **options)
    tolerance = tolerances.rounding("float32", inner)
    if dtype != "float32":  # x, the product, and twice in the gate
        tolerance += tolerances.narrow_rms(dtype, roundings=4)
    assert tolerances.rms_ratio(y, exact) <= tolerance


def test_products_of_one_row_wait_for_each_other():
    """Many in one program, where one may start before another has ended, and one at a time: the same bits."""
    keys = jax.random.split(jax.random.key(0), 65)
    weights = [jax.random.normal(key, (1024, 1024), jnp.bfloat16) / 32 for key in keys[1:]]
    x, scale = jax.random.normal(keys[0], (1, 1024)), jnp.ones(1024)

    @jax.jit
    def products(x, weights):
        for weight in weights:
            x = few_rows_product(x, weight, scale=scale, epsilon=1e-5, residual=x, implementation="triton")
        return x

    alone = x
    for weight in weights:
        alone = jax.block_until_ready(products(alone, [weight]))
    for _ in range(5):
        np.testing.assert_array_equal(products(x, weights), alone)


@pytest.mark.parametrize("rows", [2, 32, 72, 128])
@pytest.mark.parametrize(("inner", "outer", "options"), [
    (2048, 8672, {"norm": True}), (2048, 4096, {"norm": True, "gated": True}), (4096, 2048, {"added": True}),
    (520, 3000, {}),
])  # fmt: skip
def test_product_of_several_rows(rows, inner, outer, options):
    """Against float64, the same bits twice, and the last row's whatever the others hold."""
    if compute_capability() != 90:
        pytest.skip("the Triton product of several rows is for Hopper GPUs")
    keys = jax.random.split(jax.random.key(0), 4)
    norm, added, gated = (options.get(name, False) for name in ("norm", "added", "gated"))
    options = {"epsilon": 1e-5, "gated": gated}
    x = jax.random.normal(keys[0], (rows, inner)).astype("float32" if norm else "bfloat16")
    weight = (jax.random.normal(keys[1], (inner, outer * (1 + gated))) / np.sqrt(inner)).astype("bfloat16")
    scale = jax.random.normal(keys[2], (inner,)).astype("bfloat16") if norm else None
    residual = jax.random.normal(keys[3], (rows, outer)) if added else None

    @functools.partial(jax.jit, static_argnames="implementation")
    def product(x, weight, scale, residual, implementation="triton"):
        given = {"scale": scale, "residual": residual, "implementation": implementation}
        return few_rows_product(x, weight, **given, **options)

    y = product(x, weight, scale, residual)
    np.testing.assert_array_equal(product(x, weight, scale, residual), y)
    np.testing.assert_array_equal(product(x.at[:-1].set(jnp.nan), weight, scale, residual)[-1], y[-1])
    with jax.enable_x64(True):
        exact = product(*in_float64((x, weight, scale, residual)), implementation="xla")
    assert tolerances.rms_ratio(y, exact) <= tolerances.narrow_rms("bfloat16", roundings=4)
