"""The Triton decode step, in Triton's interpreter, against the step that defines it, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
import triton
import triton.language as tl

from m3jax.kernels import Mamba3State, mamba3_step
from m3jax.kernels.mamba3 import api, reference, rotary
from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.triton import step as triton_step
from m3jax.kernels.mamba3.triton import step_pieces
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.cases import Case, make, make_state

SISO = Case(l=2)
MIMO = Case(l=2, r=4, g=1, norm=True, omega_per_head=True)
EPSILON = 1e-5
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).eps) / 2
IN_FLOAT32 = ("dt", "a", "lam", "omega")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


def _inputs(case: Case, x_dtype="float32", state_dtype="float32", weight_dtype="float32"):
    """Tokens with their length axis, weights and a state, as the step takes them."""
    args = make(case, "float32")
    narrow = {name: jnp.asarray(v, jnp.float32 if name in IN_FLOAT32 else x_dtype) for name, v in args.items()}
    tokens = Sequence(**{name: narrow.get(name) for name in Sequence._fields})
    weights = Weights(
        **{name: None if name not in args else jnp.asarray(args[name], weight_dtype) for name in Weights._fields}
    )
    state = jax.tree.map(jnp.asarray, make_state(case, "float32"))
    return tokens, weights, state.stored_in(state_dtype, state_dtype)._replace(x=state.x.astype(x_dtype))


def _at(tokens: Sequence, t: int) -> Sequence:
    return jax.tree.map(lambda v: v[:, t], tokens)


def _exact(token: Sequence, weights: Weights, state: Mamba3State):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (token, weights, state))
        return jax.tree.map(np.asarray, reference.step(*wide, norm_eps=EPSILON))


def _compare(case: Case, tiling=None, largest_turn: float = 1.0, **dtypes):
    """Several steps, each from the state the step before returned, so that only one step's rounding is compared."""
    tokens, weights, state = _inputs(case, **dtypes)
    for t in range(case.l):
        token = _at(tokens, t)
        y, new = triton_step.step(token, weights, state, EPSILON, tiling)
        expected_y, expected = _exact(token, weights, state)
        assert (y.dtype, new.x.dtype) == (token.x.dtype, token.x.dtype)
        assert (new.ssm.dtype, new.angle.dtype, new.b.dtype) == (state.ssm.dtype, jnp.float32, state.b.dtype)
        tolerance = tolerances.rounding("float32", case.n * case.r) * largest_turn
        tolerances.assert_close(y, expected_y, tolerance + _unit(y), f"y, step {t}")
        tolerances.assert_close(new.ssm, expected.ssm, tolerance + _unit(new.ssm), f"ssm, step {t}")
        tolerances.assert_close(new.b, expected.b, tolerance + _unit(new.b), f"b, step {t}")
        np.testing.assert_array_equal(new.x, token.x)
        phase_tolerance = tolerances.phase_walk(1) * largest_turn
        tolerances.assert_phase_close(new.angle, expected.angle, phase_tolerance, f"angle, step {t}")
        state = new


def _unit(v: jax.Array) -> float:
    return BFLOAT16 if v.dtype == jnp.bfloat16 else 0.0


@pytest.mark.parametrize("case", [
    SISO, MIMO, dataclasses.replace(SISO, s=0, l=1), dataclasses.replace(MIMO, s=6, l=1),
    dataclasses.replace(SISO, bare=True, l=1), dataclasses.replace(SISO, b=1, r=2, p=3, n=7, g=4, l=1),
    dataclasses.replace(MIMO, b=1, r=3, bare=True, l=1), dataclasses.replace(SISO, b=1, r=8, l=1),
    dataclasses.replace(SISO, b=1, p=1, n=1, s=0, l=1), Case(b=1, l=1, h=1, p=128, n=256, g=1, s=64),
    Case(b=1, l=1, h=1, p=16, n=16, g=1, s=4, norm=True),
], ids=["siso", "mimo", "no_rotation", "full_rotation", "bare", "odd_sizes", "bare_rank_3", "rank_8", "scalar",
        "largest", "smallest"])  # fmt: skip
def test_matches_reference(case):
    _compare(case)


@pytest.mark.parametrize("tiling", [
    triton_step.Tiling(4, 4, dots=False), triton_step.Tiling(16, 1, dots=False), triton_step.Tiling(8, 4, dots=True),
], ids=["narrow", "wide", "dots"])  # fmt: skip
def test_tilings(tiling):
    _compare(dataclasses.replace(MIMO, b=1, h=2, p=16, n=16, l=1), tiling)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dots(rank):
    _compare(Case(b=1, l=1, h=2, p=16, n=20, g=1, r=rank, s=5), triton_step.Tiling(32, 4, dots=True))


@pytest.mark.parametrize("dtypes", [
    {"x_dtype": "bfloat16", "weight_dtype": "bfloat16"}, {"state_dtype": "bfloat16"},
    {"x_dtype": "bfloat16", "state_dtype": "bfloat16"},
], ids=["x", "state", "both"])  # fmt: skip
def test_narrow_types(dtypes):
    _compare(dataclasses.replace(MIMO, b=1, h=2, p=16, n=16, s=4, l=2), **dtypes)


@pytest.mark.parametrize(("log_dt", "log_decay"), [((-9, -7), (-12, -9)), ((1, 3), (2, 6))], ids=["weak", "strong"])
def test_decay_extremes(log_dt, log_decay):
    # dt * omega is rounded relative to itself: large steps times π leave that much phase.
    largest_turn = max(1.0, float(np.exp(log_dt[1])) * np.pi)
    _compare(dataclasses.replace(SISO, b=1, l=2, log_dt=log_dt, log_decay=log_decay), largest_turn=largest_turn)


def test_default_tiling_fits_every_promised_width():
    for dtype in (jnp.float32, jnp.bfloat16):
        for width in (1, 16, 48, 64, 128, 256):
            tiling = triton_step.default_tiling(4, min(width, 128), width, dtype)
            assert triton.next_power_of_2(width) % tiling.columns == 0
            assert tiling.warps in (1, 2, 4, 8, 16)


@triton.jit
def _apply(kind: tl.constexpr, v_ptr, first_ptr, second_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    v = tl.load(v_ptr + at)
    if kind == "wrap":
        tl.store(first_ptr + at, step_pieces.wrap(v))
    elif kind == "exp":
        tl.store(first_ptr + at, step_pieces.exp(v))
    else:
        cos, sin = step_pieces.cos_sin(v)
        tl.store(first_ptr + at, cos)
        tl.store(second_ptr + at, sin)


def _run(kind: str, v: np.ndarray) -> list[np.ndarray]:
    padded = np.resize(v, triton.next_power_of_2(v.size)).astype(np.float32)
    out = [np.empty_like(padded) for _ in range(2)]
    _apply[(1,)](kind, *(interpreter._Pointer(array) for array in (padded, *out)), SIZE=padded.size)
    return [array[: v.size] for array in out]


def test_phases_wrap_bit_for_bit_as_in_the_reference():
    # Where the reference's phase is after a million steps (test_scan.py), this one is too.
    rng = np.random.default_rng(0)
    inside = rng.uniform(-4 * np.pi, 6 * np.pi, size=60_000)
    # Beside a multiple of 2π the number of turns depends on how the quotient rounds; both are right.
    near = (2 * np.pi * np.arange(-1, 3)[:, None] + np.array([-1e-6, -2e-7, 0, 2e-7, 1e-6])).ravel()
    v = np.concatenate([inside, near, [1e-30, -1e-30]]).astype(np.float32)
    with jax.disable_jit():
        expected = rotary.wrap_angle(jnp.asarray(v))
    wrapped = _run("wrap", v)[0]
    np.testing.assert_array_equal(wrapped[: inside.size], expected[: inside.size])
    tolerances.assert_phase_close(wrapped, v.astype(np.float64), tolerances.phase_walk(4), "phase")
    assert (wrapped >= 0).all() and (wrapped < 2 * np.pi).all()


def test_own_functions_are_accurate():
    angle = np.linspace(0, 2 * np.pi, 50_000, endpoint=False, dtype=np.float32)
    cos, sin = _run("cos_sin", angle)
    assert np.abs(cos - np.cos(angle.astype(np.float64))).max() < 1.5e-7
    assert np.abs(sin - np.sin(angle.astype(np.float64))).max() < 1.5e-7
    v = -np.geomspace(1e-8, 80, 50_000).astype(np.float32)
    exact = np.exp(v.astype(np.float64))
    assert np.abs(_run("exp", v)[0] / exact - 1).max() < 1.5e-7
    assert not _run("exp", np.array([-1e3, -1e30, -np.inf]))[0].any()


def test_phases_over_many_steps():
    case = Case(b=1, l=25, h=1, p=1, n=256, g=1, s=128, bare=True)
    tokens, weights, state = _inputs(case)
    start = state.angle

    def body(state, token):
        return triton_step.step(token, weights, state, EPSILON)[1], None

    tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
    state, _ = jax.lax.scan(body, state, tokens)
    dt, omega = (np.asarray(v, np.float64) for v in (tokens.dt, tokens.omega))
    expected = np.asarray(start, np.float64) + (dt[..., None] * omega[:, :, None]).sum(axis=0)
    tolerances.assert_phase_close(state.angle, expected, tolerances.phase_walk(case.l), "phase")
    # No drift: the errors of 128 angles average out.
    error = np.asarray(state.angle, np.float64) - expected
    error = (error + np.pi) % (2 * np.pi) - np.pi
    assert abs(error.mean()) < tolerances.phase_walk(case.l) / np.sqrt(case.s)


def test_gradients_are_those_of_the_reference():
    tokens, weights, state = _inputs(dataclasses.replace(MIMO, b=1, h=2, l=1))

    def loss(step, inputs):
        y, new = step(*inputs, EPSILON)
        return jnp.sum(y**2) + sum(jnp.sum(jnp.sin(v)) for v in new)

    inputs = (_at(tokens, 0), weights, state)
    actual, expected = (
        jax.jit(jax.grad(lambda v, step=step: loss(step, v)))(inputs) for step in (triton_step.step, reference.step)
    )
    jax.tree.map(lambda a, e: tolerances.assert_close(a, e, tolerances.rounding("float32", 48), "d"), actual, expected)


@pytest.mark.parametrize("weights_too", [False, True], ids=["folded", "one_by_one"])
def test_vmap(weights_too):
    tokens, weights, state = _inputs(dataclasses.replace(SISO, b=1, h=2, l=2))
    tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
    if weights_too:
        weights = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), weights)

    def step(token, weights):
        return triton_step.step(token, weights, state, EPSILON)

    y, new = jax.jit(jax.vmap(step, in_axes=(0, 0 if weights_too else None)))(tokens, weights)
    for i in range(2):
        own = jax.tree.map(lambda v, i=i: v[i], weights) if weights_too else weights
        expected = step(jax.tree.map(lambda v, i=i: v[i], tokens), own)
        jax.tree.map(lambda a, e, i=i: np.testing.assert_array_equal(a[i], e), (y, new), expected)


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_public_step_runs_the_kernel(implementation, caplog, monkeypatch):
    monkeypatch.setattr(api, "partitioned", lambda: False)  # whatever the number of simulated devices
    tokens, weights, state = _inputs(dataclasses.replace(MIMO, b=1, h=2, l=1), state_dtype="bfloat16")
    token = _at(tokens, 0)
    narrow = token._replace(dt=token.dt.astype(jnp.bfloat16))  # the kernel's are float32
    token = token._replace(dt=narrow.dt.astype(jnp.float32))
    expected = jax.tree.map(np.asarray, triton_step.step(token, weights, state, EPSILON))
    api._log_choice.cache_clear()
    with caplog.at_level("INFO", logger=api.__name__):
        for _ in range(2):
            actual = mamba3_step(
                **narrow._asdict(), **weights._asdict(), state=state, norm_eps=EPSILON, implementation=implementation
            )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    choices = [record.getMessage() for record in caplog.records if record.name == api.__name__]
    assert choices == ([] if implementation else ["The Mamba-3 step runs the 'triton' implementation on cpu."])
