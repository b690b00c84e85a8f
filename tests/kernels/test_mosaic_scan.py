"""The Mosaic GPU scan: what it refuses, its coefficients, and where JAX can interpret it, its results."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.mosaic import scan
from m3jax.kernels.mamba3.mosaic.pieces import DECAY, OTHER, OWN, STEP_HIGH, STEP_LOW, TO_END, N, P, S, T
from m3jax.kernels.mamba3.triton import op
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.cases import Case, make, make_state

CASE = Case(b=1, l=T, h=2, p=P, n=N, g=1, s=S, log_dt=(-6, -2), log_decay=(-2, 1))
# A step turns by up to ten turns.
LARGE_STEPS = dataclasses.replace(CASE, log_dt=(0, 3), log_decay=(-6, -4))
NARROW = ("x", "b", "c", "z")

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or int(os.environ.get("NPROC", "0")) < 16,
    reason="the interpreter needs jax 0.11, and NPROC=16 PJRT_NPROC=16 in the environment",
)


def _arguments(case: Case, dtype=jnp.bfloat16):
    """(arguments by name, state) as a layer passes them."""
    args = {name: v for name, v in make(case, "float32").items() if not name.startswith("mimo")}
    args = {name: jnp.asarray(v, dtype if name in NARROW else v.dtype) for name, v in args.items()}
    state = jax.tree.map(jnp.asarray, make_state(case, "float32"))
    return args, state._replace(x=state.x.astype(dtype))


def _split(args) -> tuple[Sequence, Weights]:
    return tuple(kind(**{name: args.get(name) for name in kind._fields}) for kind in (Sequence, Weights))


def _scan(args, state):
    return scan.scan(None, *_split(args), state, None, 1e-5)


def test_needs_a_new_jax_or_a_hopper_gpu():
    assert "jax 0.11" in scan.unsupported(*_split(_arguments(CASE)[0]), None, None) or jax.__version_info__ >= (0, 11)
    if jax.__version_info__ >= (0, 11):
        assert "Hopper" in scan.unsupported(*_split(_arguments(CASE)[0]), None, None)


@pytest.mark.parametrize(("change", "options", "reason"), [
    ({}, {}, None),
    ({"g": 2, "l": 1}, {}, None),
    ({"p": 32}, {}, "p = 32"),
    ({"n": 64, "s": 16}, {}, "n = 64"),
    ({"s": 64}, {}, "s = 64"),
    ({"r": 2}, {}, "rank 1"),
    ({"bare": True}, {}, "z is absent"),
    ({"norm": True}, {}, "norm_weight"),
    ({"omega_per_head": True}, {}, "omega"),
    ({}, {"segment_ids": np.zeros((1, T), np.int32)}, "segment_ids"),
    ({}, {"chunk_size": 32}, "chunk_size = 32"),
    ({}, {"chunk_size": T}, None),
    ({}, {"dtype": jnp.float32}, "x has dtype float32"),
])  # fmt: skip
def test_refusals_name_the_reason(monkeypatch, change, options, reason):
    monkeypatch.setattr(scan, "_unsupported_here", lambda: None)
    args, _ = _arguments(dataclasses.replace(CASE, **change), options.get("dtype", jnp.bfloat16))
    seq, weights = _split(args)
    said = scan.unsupported(seq, weights, options.get("segment_ids"), options.get("chunk_size"))
    assert (said is None) if reason is None else (reason in said), said


SHAPES = [(8, 2048, 64), (1, 16384, 64), (1, 2048, 64), (1, 1, 1), (1, 4100, 24)]


@pytest.mark.parametrize(("batch", "length", "heads"), SHAPES)
def test_segments_cover_the_sequence(batch, length, heads):
    chunks, segments = math.ceil(length / T), scan.choose_segments(batch, length, heads)
    longest = math.ceil(chunks / segments)
    assert (segments - 1) * longest < chunks <= segments * longest
    assert batch * heads * segments <= 1.5 * scan._PROGRAMS or segments == 1


@pytest.mark.parametrize("case", [
    dataclasses.replace(CASE, b=2, l=2 * T + 7, h=9),
    dataclasses.replace(CASE, l=1),
    dataclasses.replace(CASE, l=T - 1),
    dataclasses.replace(CASE, l=67 * T, h=1),
    LARGE_STEPS,
    dataclasses.replace(CASE, l=2 * T, log_dt=(-4, 3), log_decay=(-8, 6)),
], ids=["several_blocks", "one", "short", "many_chunks", "large_steps", "mixed_decay"])  # fmt: skip
def test_prepared_numbers(monkeypatch, case):
    """Against float64; among them several blocks of heads, a rest of a chunk, more chunks than a tile of their sums."""
    monkeypatch.setattr(scan, "launch", interpreter.launch)
    args, state = _arguments(case)
    inputs = op.Inputs(*_split(args), state.ssm, state.angle, None)
    prepared, angle = jax.jit(scan.prepare)(inputs)
    coefs, rates, starts = (np.asarray(v, np.float64) for v in prepared)
    padding = -case.l % T
    dt, a, lam, omega = (np.asarray(args[name], np.float64) for name in ("dt", "a", "lam", "omega"))

    def chunked(v):  # [b, l, h] → [b, h, chunks, T]
        v = np.pad(v, ((0, 0), (0, padding), (0, 0)))
        return np.moveaxis(v.reshape(case.b, -1, T, case.h), 3, 1)

    decay = np.cumsum(chunked(np.maximum(dt * a * np.log2(np.e), -152)), axis=-1)
    gamma = lam * dt
    scale = gamma + np.pad(((1 - lam) * dt)[:, 1:], ((0, 0), (0, 1), (0, 0)))
    largest = np.abs(decay).max()
    tolerance = tolerances.rounding("float32", T)
    tolerances.assert_close(coefs[..., DECAY, :], decay, tolerance, "decay")
    tolerances.assert_close(np.exp2(decay - coefs[..., OTHER, :]), chunked(scale), tolerance * max(1, largest), "s")
    tolerances.assert_close(np.exp2(coefs[..., OWN, :]), chunked(gamma), tolerance, "gamma")
    to_end = np.exp2(decay[..., -1:] - decay) * chunked(scale)
    tolerances.assert_close(coefs[..., TO_END, :], to_end, tolerance * max(1, largest), "to_end", scale=scale.max())
    high, low = coefs[..., STEP_HIGH, :], coefs[..., STEP_LOW, :]
    np.testing.assert_array_equal(high, np.asarray(jnp.asarray(high, jnp.bfloat16), np.float64))
    np.testing.assert_array_equal(high + low, chunked(dt))
    assert np.abs(low).max() <= 2.0**-8 * np.abs(high).max()
    tolerances.assert_close(rates[:, : case.l, :S] + rates[:, : case.l, S:], omega, 2.0**-16, "rates")
    assert not rates[:, case.l :].any()

    steps = np.pad(np.moveaxis(dt[..., None] * omega[:, :, None], 2, 1), ((0, 0), (0, 0), (0, padding), (0, 0)))
    steps = steps.reshape(case.b, case.h, -1, T, S).sum(axis=3)
    ends = np.asarray(state.angle, np.float64)[:, :, None] + np.cumsum(steps, axis=2)  # [b, h, chunks, S]
    # Products Δω are rounded relative to themselves.
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    tolerance = tolerances.rounding("float32", case.l) * largest_turn
    begins = np.concatenate([np.asarray(state.angle, np.float64)[:, :, None], ends[:, :, :-1]], axis=2)
    tolerances.assert_phase_close(starts, begins, tolerance, "starts")
    tolerances.assert_phase_close(angle, ends[:, :, -1], tolerance, "angle")
    assert np.abs(starts).max() <= np.pi * (1 + 2.0**-23)
    assert np.asarray(angle).min() >= 0 and np.asarray(angle).max() < 2 * np.pi


def test_gradients_are_those_of_the_triton_kernels(monkeypatch):
    interpreter.use(monkeypatch)
    args, state = _arguments(dataclasses.replace(CASE, l=9, h=1))

    def loss(run):
        def projected(args, state):
            return sum(jnp.sum(v.astype(jnp.float32) ** 2) for v in jax.tree.leaves(run(args, state)))

        return jax.jit(jax.value_and_grad(projected, argnums=(0, 1)))

    def triton(args, state):
        return mamba3_scan(**args, initial_state=state, return_state=True, implementation="triton")

    actual, expected = (loss(run)(args, state) for run in (_scan, triton))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@interpreted
@pytest.mark.parametrize(("case", "segments"), [
    (CASE, 1),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8, h=4, g=2), 1),
    (dataclasses.replace(CASE, l=5 * T + 1), 2),
    (dataclasses.replace(CASE, l=5 * T + 1), 3),
    (dataclasses.replace(CASE, l=1), 1),
    (dataclasses.replace(LARGE_STEPS, l=2 * T + 2), 1),
    (dataclasses.replace(CASE, l=2 * T, log_dt=(1, 3), log_decay=(2, 6)), 2),
], ids=["one_chunk", "groups", "two_segments", "three_segments", "one_token", "large_steps",
        "strong_decay"])  # fmt: skip
def test_matches_reference(monkeypatch, case, segments):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = _arguments(case)
    run = jax.jit(_scan)
    (y, final), again = run(args, state), run(args, state)
    jax.tree.map(np.testing.assert_array_equal, (y, final), again)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, state))
        y_exact, exact = mamba3_scan(**wide[0], initial_state=wide[1], implementation="reference", return_state=True)
    assert (y.dtype, final.ssm.dtype, final.x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)  # B, C and weights, X, H, the result
    assert tolerances.rms_ratio(y, y_exact) <= tolerance
    assert tolerances.rms_ratio(final.ssm, exact.ssm) <= tolerance
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    turn = max(tolerances.rounding("float32", case.l) * largest_turn, tolerances.phase_walk(1))
    tolerances.assert_phase_close(final.angle, exact.angle, turn, "angle")
    assert tolerances.rms_ratio(final.b, exact.b) <= turn
    np.testing.assert_array_equal(final.x, args["x"][:, -1])
