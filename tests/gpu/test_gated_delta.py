"""The gated delta rule and its step by Triton, against the recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import gated_delta_scan, gated_delta_step
from tests import tolerances
from tests.gpu.exact import assert_close_to_float64, documents_of, in_float64

pytestmark = pytest.mark.gpu


def _arguments(lead: tuple[int, ...], n: int, p: int, dtype: str, beta_to: float) -> dict[str, jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    k = jax.random.normal(next(keys), (*lead, n))
    return {
        "q": (jax.random.normal(next(keys), k.shape) / n).astype(dtype),
        "k": (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype),
        "v": jax.random.normal(next(keys), (*lead, p), dtype),
        "log_decay": -jnp.exp(jax.random.uniform(next(keys), lead, minval=-6, maxval=0)),
        "beta": jax.random.uniform(next(keys), lead, maxval=beta_to),
    }


@pytest.mark.parametrize(("dtype", "n", "p", "chunk_size"), [
    ("bfloat16", 128, 256, None), ("float32", 128, 256, None), ("bfloat16", 48, 72, 32), ("bfloat16", 16, 16, 16),
])  # fmt: skip
def test_gated_delta(dtype, n, p, chunk_size):
    lead = (2, 300, 3)
    args = _arguments(lead, n, p, dtype, beta_to=1.0)
    documents = {"segment_ids": documents_of(*lead[:2])}
    kernel = functools.partial(gated_delta_scan, **documents, chunk_size=chunk_size, implementation="triton")
    exact = functools.partial(gated_delta_scan, **documents, implementation="reference")
    tolerance = tolerances.rounding("float32", 300 * n)
    if dtype == "bfloat16":
        # q and k, the inverse, both its products, S and its cotangent, and the result.
        tolerance += tolerances.narrow_rms("bfloat16", roundings=6)
    assert_close_to_float64(kernel, exact, args, tolerance)


@pytest.mark.parametrize("unit_eps", [None, 1e-6], ids=["as given", "of length 1"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "p"), [(128, 256), (64, 64), (256, 512), (48, 72), (100, 24), (16, 16), (512, 3), (1, 1)]
)
def test_gated_delta_step(n, p, unit_eps, dtype, state_dtype):
    args = _arguments((3, 5), n, p, dtype, beta_to=2.0)
    state = jax.random.normal(jax.random.key(1), (3, 5, p, n)).astype(state_dtype)
    step = jax.jit(functools.partial(gated_delta_step, unit_eps=unit_eps, implementation="triton"))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        wide = in_float64(args), in_float64(state)
        expected = gated_delta_step(**wide[0], state=wide[1], unit_eps=unit_eps, implementation="reference")
    for name, value, exact in zip(("o", "S"), actual, expected, strict=True):
        tolerance = tolerances.rounding("float32", n)
        if value.dtype == jnp.bfloat16:
            tolerance += tolerances.narrow_rms("bfloat16", roundings=1)
        assert tolerances.rms_ratio(value, exact) <= tolerance, name


def test_gated_delta_steps_equal_the_scan_under_jit_with_donation():
    """A decoding loop updates S in place, and reads none of what it has written of it."""
    args = _arguments((2, 40, 3), 128, 256, "float32", beta_to=2.0)
    with jax.enable_x64(True):
        expected = gated_delta_scan(**in_float64(args), implementation="reference", return_state=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(state, tokens):
        def body(state, token):
            o, state = gated_delta_step(**token, state=state, implementation="triton")
            return state, o

        return jax.lax.scan(body, state, tokens)

    final, o = decode(jnp.zeros((2, 3, 256, 128)), {name: jnp.moveaxis(v, 1, 0) for name, v in args.items()})
    tolerance = tolerances.rounding("float32", 128 * 40)
    assert tolerances.rms_ratio(jnp.moveaxis(o, 0, 1), expected[0]) <= tolerance
    assert tolerances.rms_ratio(final, expected[1]) <= tolerance
