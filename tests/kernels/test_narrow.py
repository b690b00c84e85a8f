"""The chunked scan with bfloat16 operands, as accelerators run it.

XLA's CPU backend lacks products of bfloat16 with float32 results; these tests replace them by float32 products of the
same rounded numbers, which differ from them in the order of sums alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import mamba3_scan, products
from m3jax.kernels.mamba3 import xla
from tests import tolerances
from tests.kernels.cases import Case, make, segments

# Long beside what a token is remembered for, so that errors that add up along the sequence show.
SISO = Case(b=1, l=512, h=2, p=16, n=16, g=1, s=4, log_dt=(-4.0, -2.0), log_decay=(-1.0, 1.0))
MIMO = dataclasses.replace(SISO, r=4, norm=True, omega_per_head=True)
# In a row: B, C, x and H or the mixed scores as operands, then the cotangents of y and of the scores or H.
ROUNDINGS = 6


@pytest.fixture
def narrow_operands(monkeypatch):
    """Operands in the inputs' dtype, whatever the backend."""

    def product(spec, left, right):
        assert left.dtype == right.dtype == jnp.bfloat16
        # Rounded again, because XLA may drop the cast to bfloat16 and back.
        left, right = (jax.lax.reduce_precision(v.astype(jnp.float32), 8, 7) for v in (left, right))
        return jnp.einsum(spec, left, right, precision=jax.lax.Precision.HIGHEST)

    monkeypatch.setattr(xla, "operand_dtype", lambda dtype: dtype)
    monkeypatch.setattr(products, "_product", product)
    xla.scan.clear_cache()
    yield
    xla.scan.clear_cache()


def _inputs(case: Case) -> dict[str, jax.Array]:
    """Of the dtypes that the model passes."""
    return {
        name: jnp.asarray(v, jnp.bfloat16 if name in ("x", "z", "b", "c") else jnp.float32)
        for name, v in make(case, "float32").items()
    }


def _gradients(args: dict, case: Case, **options) -> dict[str, jax.Array]:
    cotangent = np.random.default_rng(2).normal(size=(case.b, case.l, case.h, case.p))

    def projection(args):
        return jnp.sum(mamba3_scan(**args, **options) * cotangent.astype(args["dt"].dtype))

    return jax.jit(jax.grad(projection))(args)


@pytest.mark.parametrize("case", [SISO, MIMO], ids=["siso", "mimo"])
@pytest.mark.parametrize("with_segments", [False, True], ids=["whole", "packed"])
def test_gradients(case, with_segments, narrow_operands):
    options = {"segment_ids": segments(case)} if with_segments else {}
    args = _inputs(case)
    actual = _gradients(args, case, implementation="xla", **options)
    with jax.enable_x64(True):
        wide = {name: np.asarray(v, np.float64) for name, v in args.items()}
        expected = _gradients(wide, case, implementation="reference", **options)
    for name, value in actual.items():
        error = np.asarray(value, np.float64) - np.asarray(expected[name])
        rms = np.sqrt(np.mean(error**2) / np.mean(np.asarray(expected[name]) ** 2))
        assert rms <= tolerances.narrow_rms("bfloat16", ROUNDINGS), f"{name}: RMS ratio {rms:.2e}"


@pytest.mark.parametrize("case", [SISO, MIMO], ids=["siso", "mimo"])
def test_common_phase_has_no_gradient(case, narrow_operands):
    # The first token's angle turns its whole document: narrow operands or not, that changes nothing.
    ids = segments(case)
    gradient = np.asarray(_gradients(_inputs(case), case, implementation="xla", segment_ids=ids)["omega"])
    starts = np.flatnonzero(np.diff(ids[0], prepend=-1))
    largest = np.abs(gradient[:, starts]).max() / np.abs(gradient).max()
    assert largest <= tolerances.rounding("float32", case.n * case.r * case.l), f"{largest:.2e}"


def test_matmul_differentiates_like_einsum(narrow_operands):
    rng = np.random.default_rng(0)

    def integers(*shape):
        return rng.integers(-9, 10, size=shape).astype(np.float32)  # rounding changes none

    left, right, weights = integers(2, 3, 2, 5, 4), integers(2, 3, 2, 5, 6), integers(2, 3, 2, 4, 6)
    spec = "bhmkp,bhmkn->bhmpn"
    gradients = [
        jax.grad(lambda operands, f=f: jnp.sum(weights * f(*operands)))((left, right))
        for f in (lambda *v: products.matmul(spec, *v, jnp.bfloat16), lambda *v: jnp.einsum(spec, *v))
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)


def test_accelerator_path_traces(monkeypatch):
    # The products themselves, which cannot run here.
    monkeypatch.setattr(xla, "operand_dtype", lambda dtype: dtype)
    args = _inputs(dataclasses.replace(MIMO, l=23))
    gradients = jax.eval_shape(jax.grad(lambda a: mamba3_scan(**a, implementation="xla").astype("float32").sum()), args)
    assert all(v.dtype == args[name].dtype and v.shape == args[name].shape for name, v in gradients.items())
