"""Products of few rows, as a GPU computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.models import linear


@pytest.mark.parametrize(("shape", "computed"), [((1, 6), 8), ((7, 6), 8), ((8, 6), 8), ((9, 6), 9), ((1, 2, 6), 1)])
def test_few_rows_become_enough_on_a_gpu(monkeypatch, shape, computed):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    rows = []

    def product(x):
        rows.append(x.shape[0])
        return 2 * x[..., :5]

    np.testing.assert_array_equal(jax.jit(lambda x: linear.enough_rows(product, x))(x), 2 * x[..., :5])
    assert rows == [computed]
