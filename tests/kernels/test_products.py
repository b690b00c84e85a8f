"""Products of the scans: exact in float32 unless the caller has chosen otherwise."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from m3jax.kernels.products import matmul


@pytest.mark.parametrize(("chosen", "exact"), [(None, True), ("float32", True), ("tensorfloat32", False)])
def test_precision_is_the_callers_choice(chosen, exact):
    v = jnp.ones((2, 2))
    with jax.default_matmul_precision(chosen) if chosen else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(lambda a, b: matmul("ij,jk->ik", a, b, jnp.dtype("float32")))(v, v)
    (product,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
    assert (product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2) is exact
