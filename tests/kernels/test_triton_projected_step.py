"""The Triton decode step from a projection, in Triton's interpreter, against the reference in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
import triton
import triton.language as tl

from m3jax.config import ModelConfig
from m3jax.kernels import mamba3_projected_step
from m3jax.kernels.mamba3.triton import projection_pieces
from m3jax.models.mamba3 import Mamba3Mixer, initial_state
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.cases import Case, largest_turn, make_projected, make_state

SISO = Case(b=2)
MIMO = Case(b=2, r=4, norm=True)
DOTS = Case(b=1, h=2, p=16, n=16, g=1, r=2, s=4)
MIXER = ModelConfig(d_model=32, headdim=16, d_state=16, mimo_rank=2, n_layers=1, d_intermediate=0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


def _inputs(case: Case, options: dict):
    args = make_projected(case, "float32", has_lambda=options.get("fixed_lambda") is None)
    return jax.tree.map(jnp.asarray, (args, make_state(case, "float32")))


@pytest.mark.parametrize(("case", "options"), [
    (SISO, {}), (MIMO, {"a_activation": "softplus"}), (dataclasses.replace(SISO, s=0), {"fixed_lambda": 0.5}),
    (dataclasses.replace(MIMO, b=1, bare=True), {"fixed_lambda": 0.0}),
    (dataclasses.replace(SISO, p=3, n=7, g=4), {"a_floor": 0.7}), (DOTS, {}), (dataclasses.replace(DOTS, s=8), {}),
], ids=["siso", "mimo", "no_rotation", "bare", "odd_sizes", "dots", "dots, full_rotation"])  # fmt: skip
def test_matches_reference(case, options):
    args, state = _inputs(case, options)
    y, new = mamba3_projected_step(**args, state=state, implementation="triton", **options)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (args, state))
        exact = mamba3_projected_step(**wide[0], state=wide[1], implementation="reference", **options)
        exact_y, exact = jax.tree.map(np.asarray, exact)
    turn = largest_turn(args)
    tolerance = tolerances.rounding("float32", case.n * case.r) * turn
    tolerances.assert_close(y, exact_y, tolerance, "y")
    tolerances.assert_close(new.ssm, exact.ssm, tolerance, "ssm")
    tolerances.assert_close(new.b, exact.b, tolerance, "b")
    tolerances.assert_phase_close(new.angle, exact.angle, tolerances.phase_walk(1) * turn, "angle")
    np.testing.assert_array_equal(new.x, exact.x)


def test_gradients_and_vmap_are_those_of_the_reference():
    args, state = _inputs(dataclasses.replace(MIMO, b=1, h=2), {})

    def outputs(implementation, several):
        def step(args, state):
            return mamba3_projected_step(**args, state=state, implementation=implementation)

        def loss(args, state):
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(step(args, state)))

        def runs(args):
            one = {name: (0 if name == "projected" else None) for name in args}
            return jax.vmap(step, in_axes=(one, None))(args, state)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(args, state), jax.jit(runs)(args | several)

    several = {"projected": jnp.stack([args["projected"], -args["projected"]])}
    actual, expected = (outputs(implementation, several) for implementation in ("triton", "reference"))
    tolerance = tolerances.rounding("float32", 48) * largest_turn(args)
    jax.tree.map(lambda a, e: tolerances.assert_close(a, e, tolerance, "outputs"), actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixer_decodes_with_one_kernel_as_it_reads_a_sequence(dtype):
    config = dataclasses.replace(MIXER, dtype=dtype, scan_implementation="triton")
    mixer, whole = Mamba3Mixer(config), Mamba3Mixer(dataclasses.replace(config, scan_implementation="xla"))
    u = np.random.default_rng(0).normal(size=(2, 4, config.d_model)).astype(np.float32)
    params = whole.init(jax.random.key(0), u)["params"]
    expected, _ = whole.apply({"params": params}, u)
    state = initial_state(config, 2, 0)
    step = jax.jit(lambda u, state: mixer.apply({"params": params}, u, None, state))
    assert interpreter.launches(step, u[:, 0], state) == 1
    ys = []
    for t in range(u.shape[1]):
        y, state = step(u[:, t], state)
        ys.append(y)
    tolerance = tolerances.rounding("float32", config.d_model * u.shape[1])
    if dtype == "bfloat16":
        tolerance += tolerances.narrow_rms("bfloat16", roundings=6)  # projection, B or C, scores, H, y, the output
    assert tolerances.rms_ratio(jnp.stack(ys, 1), expected) <= tolerance


@triton.jit
def _apply(kind: tl.constexpr, v_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    v = tl.load(v_ptr + at)
    if kind == "softplus":
        tl.store(out_ptr + at, projection_pieces.softplus(v))
    elif kind == "logistic":
        tl.store(out_ptr + at, projection_pieces.logistic(v))
    elif kind == "heavy_tail":
        tl.store(out_ptr + at, projection_pieces.heavy_tail(v))
    else:
        tl.store(out_ptr + at, projection_pieces.tanh(v))


@pytest.mark.parametrize(("kind", "exact"), [
    ("softplus", lambda v: np.logaddexp(v, 0)), ("logistic", lambda v: 1 / (1 + np.exp(-v))), ("tanh", np.tanh),
    ("heavy_tail", lambda v: np.where(v > 0, 1 + v, 1 / (1 - np.minimum(v, 0)))),
], ids=["softplus", "logistic", "tanh", "heavy_tail"])  # fmt: skip
def test_own_functions_are_accurate(kind, exact):
    size = np.geomspace(1e-6, 80, 2**15)
    v = np.concatenate([size, -size]).astype(np.float32)
    out = np.empty_like(v)
    _apply[(1,)](kind, interpreter._Pointer(v), interpreter._Pointer(out), SIZE=v.size)
    exact = exact(v.astype(np.float64))
    errors = np.abs(out / exact - 1)
    assert errors.max() < tolerances.FLOAT32_FUNCTION and errors.mean() < tolerances.FLOAT32_FUNCTION / 4
