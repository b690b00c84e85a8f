"""Attention of a new token to a cache: XLA's and the kernel in Triton's interpreter, against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from m3jax.config import ModelConfig
from m3jax.kernels import cached_attention_step, choice
from m3jax.kernels.cached_attention import triton_step
from m3jax.kernels.cached_attention.triton_step import Tiling
from m3jax.models import attention
from tests import tolerances
from tests.kernels import interpreter

ROOM, WIDTH = 75, 16
# Nothing before the token; little; the middle, of a later document; all but a slot; the last before the room is full;
# beyond the room, which the token does not enter.
LENGTH = np.array([0, 1, 40, 74, 75, 90])
START = np.array([0, 0, 33, 0, 70, 3])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


def _inputs(kv, group, dtype="float32", width=WIDTH, rows=6):
    rng = np.random.default_rng(0)
    shapes = {"q": (kv * group, width), "k": (kv, width), "v": (kv, width)}
    shapes |= {"keys": (kv, ROOM, width), "values": (kv, ROOM, width)}
    arrays = {name: jnp.asarray(rng.normal(size=(rows, *shape)), dtype) for name, shape in shapes.items()}
    # What is not filled, or is of another document, must not matter; it is finite, as in a cache that is used again.
    unseen = (np.arange(ROOM) >= LENGTH[:rows, None]) | (np.arange(ROOM) < START[:rows, None])
    for name in ("keys", "values"):
        arrays[name] = jnp.where(unseen[:, None, :, None], jnp.asarray(1e3, dtype), arrays[name])
    return arrays | {"length": jnp.asarray(LENGTH[:rows]), "start": jnp.asarray(START[:rows])}


def _exact(q, k, v, keys, values, length, start):
    """One query after another."""
    q, k, v, keys, values = (np.array(t, np.float64) for t in (q, k, v, keys, values))
    y, group = np.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        if length[b] < ROOM:
            keys[b, h // group, length[b]], values[b, h // group, length[b]] = k[b, h // group], v[b, h // group]
        seen = slice(int(start[b]), int(length[b]) + 1)
        scores = keys[b, h // group, seen] @ q[b, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        y[b, h] = weights @ values[b, h // group, seen] / weights.sum()
    return y, keys, values


def _assert_exact(actual, inputs):
    y, *caches = actual
    expected, *expected_caches = _exact(**inputs)
    assert y.dtype == inputs["q"].dtype
    tolerance = tolerances.rounding("float32", ROOM)
    if y.dtype != jnp.float32:  # the weights, and the result
        tolerance += 2 * float(jnp.finfo(y.dtype).eps) / 2
    tolerances.assert_close(y, expected, tolerance, "y")
    for cache, exact in zip(caches, expected_caches, strict=True):
        np.testing.assert_array_equal(np.asarray(cache, np.float64), exact)


@pytest.mark.parametrize("tiling", [Tiling(1, 16, 1, 1), Tiling(3, 16, 2, 3), Tiling(64, 16, 4, 2), None])
@pytest.mark.parametrize(("kv", "group"), [(2, 1), (1, 4), (1, 17)])
def test_equals_a_loop(kv, group, tiling):
    inputs = _inputs(kv, group)
    _assert_exact(triton_step.step(**inputs, tiling=tiling), inputs)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types(dtype, implementation):
    inputs = _inputs(2, 2, dtype, width=32)
    _assert_exact(cached_attention_step(**inputs, implementation=implementation), inputs)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_not_filled_is_not_read(parts):
    inputs = _inputs(1, 2, rows=4)
    inputs |= {name: jnp.where(inputs[name] == 1e3, jnp.nan, inputs[name]) for name in ("keys", "values")}
    y, *_ = triton_step.step(**inputs, tiling=Tiling(parts, 32, 1, 1))
    assert np.isfinite(y).all()


def test_default_tiling_fits_every_promised_shape():
    for rows, room, width, itemsize in ((1, 1, 16, 2), (8, 4096, 64, 2), (1024, 4096, 256, 4), (1, 2**20, 128, 2)):
        tiling = triton_step.default_tiling(rows, room, width, itemsize)
        assert 1 <= tiling.parts <= 64 and tiling.block in (16, 32, 64, 128)


def test_gradients_are_those_of_xla():
    inputs = _inputs(1, 2, rows=4)
    floats = {name: v for name, v in inputs.items() if v.dtype == jnp.float32}

    def gradients(implementation):
        def step(floats):
            return cached_attention_step(**inputs | floats, implementation=implementation)

        out, pullback = jax.vjp(step, floats)
        return pullback(jax.tree.map(jnp.cos, out))[0]

    actual = jax.jit(gradients, static_argnums=0)("triton")
    for name, expected in jax.jit(gradients, static_argnums=0)("xla").items():
        tolerances.assert_close(actual[name], expected, tolerances.rounding("float32", ROOM), f"d {name}")


def test_runs_are_one_launch():
    """Under vmap over runs that begin with one cache: every run as alone, bit by bit."""
    inputs = _inputs(2, 2)
    q = jnp.stack([inputs.pop("q"), jnp.ones((len(LENGTH), 4, WIDTH))])

    def step(q):
        return triton_step.step(q, **inputs, tiling=Tiling(2, 16, 1, 1))

    results = jax.jit(jax.vmap(step))(q)
    for run in range(2):
        jax.tree.map(lambda a, e, run=run: np.testing.assert_array_equal(a[run], e), results, step(q[run]))
    assert interpreter.launches(jax.vmap(step), q) == interpreter.launches(step, q[0]) == 2
    assert "scan[" not in str(jax.make_jaxpr(jax.vmap(step))(q))


@pytest.mark.parametrize(("implementation", "devices", "launches"), [
    (None, 1, 1), (None, 8, 0), ("triton", 8, 1), ("xla", 1, 0),
])  # fmt: skip
def test_public_step_runs_what_is_asked_for(implementation, devices, launches, monkeypatch):
    monkeypatch.setattr(choice, "partitioned", lambda: devices > 1)

    def step(inputs):
        return cached_attention_step(**inputs, implementation=implementation)

    assert interpreter.launches(step, _inputs(1, 2)) == launches


def test_what_the_kernel_cannot_take_is_left_to_xla(monkeypatch, x64):
    monkeypatch.setattr(choice, "partitioned", lambda: False)
    mixed = _inputs(1, 2)
    for inputs, reason in (
        (_inputs(1, 2, width=24), "heads are 24 wide; the Triton step takes powers of two from 16 to 256"),
        (_inputs(1, 2, width=512), "heads are 512 wide"),
        (_inputs(1, 33, width=256), "the queries of a key head take 65536 bytes; the Triton step 32768"),
        (_inputs(1, 2, dtype="float64"), "q has dtype float64"),
        (mixed | {"keys": mixed["keys"].astype("bfloat16")}, "keys has dtype bfloat16"),
    ):
        assert interpreter.launches(lambda inputs: cached_attention_step(**inputs), inputs) == 0, reason
        with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {reason}'):
            cached_attention_step(**inputs, implementation="triton")


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("keys", np.zeros((6, 3, ROOM, WIDTH), np.float32), r"keys has shape \(6, 3, 75, 16\); expected \[b, kv heads"),
    ("k", np.zeros((6, 1, WIDTH), np.float32), r"k has shape \(6, 1, 16\); expected \(6, 2, 16\)"),
    ("start", np.zeros(5, np.int32), r"start has shape \(5,\); expected \[b\] = \(6,\)"),
    ("length", np.zeros(6, np.float32), "length has dtype float32; expected integers"),
    ("q", np.zeros((6, 4, WIDTH), np.int32), "q has dtype int32; expected a floating point"),
    ("implementation", "cuda", "implementation = 'cuda'; expected None or one of triton, xla"),
])  # fmt: skip
def test_bad_arguments_are_named(name, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cached_attention_step(**_inputs(2, 2) | {name: wrong})


@pytest.mark.parametrize("scan_implementation", [None, "triton", "xla"])
def test_layer_steps_in_one_kernel(monkeypatch, scan_implementation):
    monkeypatch.setattr(choice, "partitioned", lambda: False)
    config = ModelConfig(
        d_model=16, attention_heads=4, attention_kv_heads=2, attention_headdim=16, dtype="float32", mixers="attention",
        scan_implementation=scan_implementation,
    )  # fmt: skip
    layer, state = attention.Attention(config), attention.initial_state(config, 3, 20)
    assert interpreter.launches_of_step(layer, state) == (scan_implementation != "xla")
