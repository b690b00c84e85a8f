"""The step of the gated delta rule in Triton's interpreter, against the equation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
import triton

from m3jax.config import ModelConfig
from m3jax.kernels import choice, gated_delta_step
from m3jax.kernels.gated_delta import triton_step
from m3jax.kernels.gated_delta.inputs import Sequence
from m3jax.models import gated_deltanet
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.test_gated_delta import naive_step

UNIT_EPS = 1e-3
STEPS = 2


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


def _inputs(p, n, dtype="float32", state_dtype="float32", batch=2, heads=3, log_decay=(-6, 1)):
    """Tokens with a leading axis, keys of length 1 or nearly so, write strengths up to 2; and a state."""
    rng = np.random.default_rng(0)
    lead = STEPS, batch, heads
    k = rng.normal(size=(*lead, n))
    tokens = Sequence(
        q=jnp.asarray(rng.normal(size=(*lead, n)) / np.sqrt(n), dtype),
        k=jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), dtype),
        v=jnp.asarray(rng.normal(size=(*lead, p)), dtype),
        log_decay=jnp.asarray(-np.exp(rng.uniform(*log_decay, size=lead)), jnp.float32),
        beta=jnp.asarray(rng.uniform(0, 2, size=lead), jnp.float32),
    )
    return tokens, jnp.asarray(rng.normal(size=(batch, heads, p, n)), state_dtype)


def _at(tokens: Sequence, t: int) -> Sequence:
    return jax.tree.map(lambda v: v[t], tokens)


def _exact(token: Sequence, state: jax.Array, unit_eps: float | None) -> tuple[np.ndarray, np.ndarray]:
    wide = {name: np.asarray(v, np.float64) for name, v in token._asdict().items()}
    if unit_eps is not None:
        for name in "qk":
            wide[name] /= np.sqrt(np.square(wide[name]).sum(-1, keepdims=True) + unit_eps)
        wide["q"] /= np.sqrt(wide["q"].shape[-1])
    return naive_step(wide, np.asarray(state, np.float64))


def _unit_of(v: jax.Array) -> float:
    return 0.0 if v.dtype == jnp.float32 else float(jnp.finfo(v.dtype).eps) / 2


def _compare(p, n, unit_eps=None, tiling=None, **options):
    """Several steps, each from the state that the step before returned: one step's rounding is compared."""
    tokens, state = _inputs(p, n, **options)
    for t in range(STEPS):
        token = _at(tokens, t)
        o, new = triton_step.step(token, state, unit_eps, tiling)
        assert (o.dtype, new.dtype) == (token.v.dtype, state.dtype)
        for name, value, expected in zip(("o", "S"), (o, new), _exact(token, state, unit_eps), strict=True):
            tolerance = tolerances.rounding("float32", n) + _unit_of(value)
            tolerances.assert_close(value, expected, tolerance, f"{name}, step {t}")
        state = new


@pytest.mark.parametrize("unit_eps", [None, UNIT_EPS], ids=["as given", "of length 1"])
@pytest.mark.parametrize(("p", "n"), [(10, 12), (1, 1), (16, 16), (70, 128), (3, 512), (260, 48)])
def test_equals_the_equation(p, n, unit_eps):
    _compare(p, n, unit_eps, batch=1 if max(p, n) > 64 else 2)


@pytest.mark.parametrize(("dtype", "state_dtype"), [
    ("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"),
])  # fmt: skip
def test_narrow_types(dtype, state_dtype):
    _compare(24, 96, UNIT_EPS, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.parametrize("log_decay", [(-30, -20), (5, 8)], ids=["weak", "strong"])
def test_decay_extremes(log_decay):
    _compare(10, 12, log_decay=log_decay)


@pytest.mark.parametrize("tiling", [
    triton_step.Tiling(4, 4, 1), triton_step.Tiling(16, 16, 8), triton_step.Tiling(32, 8, 2),
], ids=["narrow", "more threads than numbers", "too many rows"])  # fmt: skip
def test_tilings(tiling):
    _compare(10, 12, UNIT_EPS, tiling)


def test_default_tiling_fits_every_promised_width():
    for p, n in ((1, 1), (1, 512), (48, 64), (256, 128), (512, 256), (2048, 512), (4096, 1)):
        tiling = triton_step.default_tiling(p, n)
        assert triton.next_power_of_2(n) % tiling.columns == 0
        assert tiling.warps in (1, 2, 4)


@pytest.mark.parametrize("unit_eps", [None, UNIT_EPS])
def test_gradients_are_those_of_the_reference(unit_eps):
    tokens, state = _inputs(10, 12)

    def gradients(implementation):
        def step(token, state):
            return gated_delta_step(*token, state, unit_eps=unit_eps, implementation=implementation)

        out, pullback = jax.vjp(step, _at(tokens, 0), state)
        token, of_state = pullback(jax.tree.map(jnp.cos, out))
        return token._asdict() | {"state": of_state}

    actual = jax.jit(gradients, static_argnums=0)("triton")
    for name, expected in jax.jit(gradients, static_argnums=0)("reference").items():
        tolerances.assert_close(actual[name], expected, tolerances.rounding("float32", 10 * 12), f"d {name}")


def test_runs_are_one_launch():
    """Under vmap over runs, of a state that all share: every run as alone, bit by bit."""
    tokens, state = _inputs(10, 12)

    def step(token, state):
        return triton_step.step(token, state, UNIT_EPS)

    mapped = jax.vmap(step, in_axes=(0, None))
    results = jax.jit(mapped)(tokens, state)
    for t in range(STEPS):
        own = step(_at(tokens, t), state)
        jax.tree.map(lambda a, e, t=t: np.testing.assert_array_equal(a[t], e), results, own)
    assert interpreter.launches(mapped, tokens, state) == 1
    assert "scan[" not in str(jax.make_jaxpr(mapped)(tokens, state))


@pytest.mark.parametrize(("implementation", "devices", "launches"), [
    (None, 1, 1), (None, 8, 0), ("triton", 8, 1), ("xla", 1, 0), ("reference", 1, 0),
])  # fmt: skip
def test_public_step_runs_what_is_asked_for(implementation, devices, launches, monkeypatch):
    monkeypatch.setattr(choice, "partitioned", lambda: devices > 1)
    tokens, state = _inputs(10, 12)

    def step(token, state):
        return gated_delta_step(*token, state, implementation=implementation)

    assert interpreter.launches(step, _at(tokens, 0), state) == launches


def test_what_the_kernel_cannot_take_is_left_to_xla(monkeypatch, x64):
    monkeypatch.setattr(choice, "partitioned", lambda: False)
    tokens, start = _inputs(2, 513)
    for name, dtype, reason in (
        ("wide keys", "float32", "keys are 513 wide; the Triton step takes up to 512"),
        ("float64", "float64", "q has dtype float64"),
    ):
        token, state = jax.tree.map(lambda v, dtype=dtype: v.astype(dtype), (_at(tokens, 0), start))
        assert interpreter.launches(gated_delta_step, *token, state) == 0, name
        with pytest.raises(ValueError, match=f'implementation = "triton" cannot run here: {reason}'):
            gated_delta_step(*token, state, implementation="triton")


@pytest.mark.parametrize("scan_implementation", ["triton", "mosaic", "xla"])
def test_layer_steps_in_one_kernel(scan_implementation):
    config = ModelConfig(
        d_model=16, gdn_heads=2, gdn_headdim=8, mixers="gated_deltanet", scan_implementation=scan_implementation
    )
    layer, state = gated_deltanet.GatedDeltaNet(config), gated_deltanet.initial_state(config, 3, 0)
    assert interpreter.launches_of_step(layer, state) == (scan_implementation != "xla")
