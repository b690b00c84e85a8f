"""The Mamba-3 scan and its step, by Triton and Mosaic GPU, against the recurrence in float64."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import Mamba3State, gpu, mamba3_projected_step, mamba3_scan, mamba3_step
from tests import tolerances
from tests.gpu.exact import documents_of, in_float64
from tests.kernels.cases import Case, differentiated, largest_turn, make, make_projected, make_state

pytestmark = pytest.mark.gpu

IN_FLOAT32 = ("dt", "a", "lam", "omega")
PER_TOKEN = (*IN_FLOAT32, "x", "b", "c", "z")
WIDE = Case(b=2, l=300, h=4, p=64, n=128, g=1, s=32)
CASES = {
    "siso": dataclasses.replace(WIDE, l=1000),
    "mimo": dataclasses.replace(WIDE, l=1000, r=4),
    "rank 2, groups": dataclasses.replace(WIDE, r=2, g=2, n=64, s=16, omega_per_head=True),
    "rank 8": dataclasses.replace(WIDE, l=100, h=2, r=8),
    "norm": dataclasses.replace(WIDE, l=130, r=4, p=32, n=64, s=16, norm=True),
    "bare": dataclasses.replace(WIDE, l=130, bare=True),
    "no rotation": dataclasses.replace(WIDE, l=130, s=0),
    "full rotation": dataclasses.replace(WIDE, l=130, s=64),
    "smallest": Case(b=2, l=63, h=4, p=16, n=16, g=2, s=4),
    "largest": Case(b=1, l=200, h=2, p=128, n=256, g=1, s=64),
    "largest mimo": Case(b=1, l=70, h=2, p=128, n=256, g=1, r=4, s=64),
    "many small states": Case(b=64, l=40, h=32, p=16, n=32, g=1, s=16),
    "odd sizes": Case(b=3, l=65, h=3, p=24, n=100, g=1, s=25),
    "one token": dataclasses.replace(WIDE, l=1),
    "two tokens": dataclasses.replace(WIDE, l=2, r=4),
    "strong decay": dataclasses.replace(WIDE, log_dt=(1, 3), log_decay=(2, 6)),
    "weak decay": dataclasses.replace(WIDE, log_dt=(-9, -7), log_decay=(-12, -9)),
    "mixed decay": dataclasses.replace(WIDE, log_dt=(-4, 3), log_decay=(-8, 6)),
}
# Many heads leave programs with several chunks of few segments; else every chunk is a segment.
MANY_HEADS = dataclasses.replace(WIDE, b=3, l=150, h=64, g=2)
MOSAIC_CASES = {
    "siso": (dataclasses.replace(WIDE, l=1000, mimo=False), True),
    "siso, many heads": (dataclasses.replace(MANY_HEADS, mimo=False), False),
    "mimo": (dataclasses.replace(WIDE, l=1000, r=4), True),
    "mimo, one head a program": (dataclasses.replace(WIDE, l=130, r=4), False),
    "rank 2, one head a program": (dataclasses.replace(WIDE, r=2), True),
    "rank 2, many heads": (dataclasses.replace(MANY_HEADS, r=2), True),
    "no rotation": (dataclasses.replace(WIDE, s=0, mimo=False), True),
    "norm": (dataclasses.replace(WIDE, norm=True, mimo=False), False),
    "norm, many heads, mimo": (dataclasses.replace(MANY_HEADS, norm=True, r=4), False),
    "bare": (dataclasses.replace(WIDE, bare=True), True),
    "bare, rank 2": (dataclasses.replace(WIDE, r=2, bare=True), True),
    "bare, rank 4": (dataclasses.replace(WIDE, r=4, bare=True), False),
    "narrow state": (dataclasses.replace(WIDE, n=64, s=16, mimo=False), True),
}
PACKED = ("siso", "mimo")
IN_BOTH_TYPES = ("siso", "mimo", "norm", "largest", "one token", "strong decay", "mixed decay")


def _documents(case: Case, packed: bool) -> np.ndarray | None:
    return documents_of(case.b, case.l) if packed else None


def _rounded(name: str, v: np.ndarray) -> np.ndarray:
    """Numbers that bfloat16 holds, where a layer passes bfloat16: one reference serves both types."""
    return v if name in IN_FLOAT32 else np.asarray(jnp.asarray(v, jnp.bfloat16), v.dtype)


def _arguments(case: Case, dtype: str) -> tuple[dict[str, jax.Array], Mamba3State]:
    args = {name: _rounded(name, v) for name, v in make(case, "float32").items()}
    narrow = {name: jnp.asarray(v, dtype if name in ("x", "b", "c", "z") else v.dtype) for name, v in args.items()}
    state = make_state(case, "float32")
    state = state._replace(x=_rounded("x", state.x))
    return narrow, jax.tree.map(jnp.asarray, state._replace(x=jnp.asarray(state.x, dtype)))


@functools.cache
def _expected(case: Case, packed: bool) -> dict[str, np.ndarray]:
    # On the CPU: states of every token and head in float64, which would fill the memory that all workers share.
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        run = differentiated(implementation="reference", segment_ids=_documents(case, packed))
        return jax.tree.map(np.asarray, run(*in_float64(_arguments(case, "float32"))))


def _scales(case: Case, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Sizes of the terms of gradients that may be much smaller than these; RMS, for random cotangents."""
    args = make(case)
    scales = {}
    if "d" in args and not case.norm:  # terms as they are without the norm
        mimo_x, mimo_z, mimo_o = (args.get(name, 1.0) for name in ("mimo_x", "mimo_z", "mimo_o"))
        gate = args["z"][:, :, :, None] * mimo_z
        terms = args["x"][:, :, :, None] * mimo_x * gate / (1 + np.exp(-gate)) * mimo_o
        scales["d d"] = np.sqrt((terms**2).sum() / case.h)
    if case.log_dt[1] > 0:
        # Gradients of log decay are differences of sums of y times its cotangent, summed over a chunk (backward.py).
        term = np.sqrt(64 * case.p * np.mean(expected["y"] ** 2))
        scales |= {"d a": term * np.sqrt(np.mean(args["dt"] ** 2)), "d dt": term * np.sqrt(np.mean(args["a"] ** 2))}
    return scales


def _scan_cases():
    """(case, packed, dtype, implementation)."""
    for name, case in CASES.items():
        for packed in (False, True) if name in PACKED else (False,):
            for dtype in ("float32", "bfloat16") if name in IN_BOTH_TYPES else ("bfloat16",):
                label = f"{name}{', packed' if packed else ''}, {dtype}"
                yield pytest.param(case, packed, dtype, "triton", id=label)
    for name, (case, packed) in MOSAIC_CASES.items():
        label = f"mosaic, {name}{', packed' if packed else ''}"
        yield pytest.param(case, packed, "bfloat16", "mosaic", id=label)


def _skip_without_hopper() -> None:
    # Old versions of jax lack it. If it is there, our own modules must import.
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    reason = importlib.import_module("m3jax.kernels.mamba3.mosaic.scan")._unsupported_here()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("case", "packed", "dtype", "implementation"), list(_scan_cases()))
def test_scan(case, packed, dtype, implementation):
    if implementation == "mosaic":
        _skip_without_hopper()
    run = differentiated(implementation=implementation, segment_ids=_documents(case, packed))
    args, state = _arguments(case, dtype)
    actual, again = run(args, state), run(args, state)
    expected = _expected(case, packed)
    assert actual.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    _assert_close(case, dtype, actual, expected)


@pytest.mark.parametrize(("case", "packed"), list(MOSAIC_CASES.values()), ids=list(MOSAIC_CASES))
def test_mosaic_forward(case, packed):
    """Without gradients, for which the kernel that saves H runs."""
    _skip_without_hopper()
    options = {"segment_ids": _documents(case, packed), "implementation": "mosaic", "return_state": True}
    args, state = _arguments(case, "bfloat16")
    y, final = jax.jit(lambda args, state: mamba3_scan(**args, initial_state=state, **options))(args, state)
    actual = {"y": y} | {f"final.{name}": v for name, v in final._asdict().items()}
    _assert_close(case, "bfloat16", actual, _expected(case, packed))


def _assert_close(case: Case, dtype: str, actual: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    # Large steps turn by many radians, each rounded relative to itself.
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    tolerance = tolerances.rounding("float32", case.n * case.r * case.l) * largest_turn
    if dtype == "bfloat16":
        tolerance += tolerances.narrow_rms("bfloat16", roundings=6)  # B, C, scores, H, cotangents and the result
    scales = _scales(case, expected)
    errors = {}
    for name, value in actual.items():
        if name == "final.angle":
            turn = tolerances.rounding("float32", case.l) * largest_turn
            tolerances.assert_phase_close(value, expected[name], max(turn, tolerances.phase_walk(1)), name)
        else:
            errors[name] = tolerances.rms_ratio(value, expected[name], scales.get(name, 0.0))
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"RMS ratios over {tolerance:.1e}: {wrong}; all: { {k: f'{v:.1e}' for k, v in errors.items()} }"


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_step(case, dtype, state_dtype):
    args, state = _arguments(case, dtype)
    args = {name: v[:, 0] if name in PER_TOKEN else v for name, v in args.items()}
    state = state.stored_in(state_dtype, state_dtype)
    step = jax.jit(functools.partial(mamba3_step, implementation="triton"))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        y, new = mamba3_step(**in_float64(args), state=in_float64(state), implementation="reference")
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    exact = tolerances.rounding("float32", case.n * case.r) * largest_turn
    # y is rounded once, or read from the state as it is stored.
    narrow = {"float32": exact, "bfloat16": exact + tolerances.narrow_rms("bfloat16", roundings=2)}
    limits = {"y": narrow["bfloat16" if "bfloat16" in (dtype, state_dtype) else "float32"], "ssm": narrow[state_dtype]}
    limits |= {"b": narrow[state_dtype], "x": 0.0}
    for name, limit in limits.items():
        value, expected = (actual[0], y) if name == "y" else (getattr(actual[1], name), getattr(new, name))
        assert tolerances.rms_ratio(value, expected) <= limit, name
    tolerances.assert_phase_close(actual[1].angle, new.angle, tolerances.phase_walk(1) * largest_turn, "angle")


@pytest.mark.parametrize(("rank", "state_dtype"), [(1, "float32"), (4, "bfloat16")])
def test_to_call_later_states_into_the_cache_changes_no_bit(rank, state_dtype):
    """As a step of so many rows that programs do, and steps of a few of these rows."""
    heads_ahead = importlib.import_module("m3jax.kernels.mamba3.triton.step").heads_ahead
    case = dataclasses.replace(WIDE, b=72, h=64, l=1, r=rank)
    args, state = _arguments(case, "bfloat16")
    args = {name: v[:, 0] if name in PER_TOKEN else v for name, v in args.items()}
    state = state.stored_in(state_dtype, state_dtype)
    step = jax.jit(functools.partial(mamba3_step, implementation="triton"))
    together = step(**args, state=state)
    for rows in (slice(0, 8), slice(-8, None)):
        own = {name: v[rows] if name in PER_TOKEN else v for name, v in args.items()}
        few = jax.tree.map(lambda v, rows=rows: v[rows], state)
        assert heads_ahead(few.ssm) == 0
        expected = jax.tree.map(lambda v, rows=rows: v[rows], together)
        jax.tree.map(np.testing.assert_array_equal, step(**own, state=few), expected)
    if gpu.compute_capability() >= 90:
        assert heads_ahead(state.ssm) > 0


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_projected_step(case, dtype, state_dtype):
    options = {"fixed_lambda": 0.5 if case.bare else None, "a_activation": "softplus" if case.r > 1 else "heavy_tail"}
    args = make_projected(case, "float32", has_lambda=not case.bare)
    turn = largest_turn(args)
    args = {name: jnp.asarray(_rounded(name, v), dtype if name == "projected" else v.dtype) for name, v in args.items()}
    state = make_state(case, "float32")
    state = jax.tree.map(jnp.asarray, state._replace(x=jnp.asarray(_rounded("x", state.x), dtype)))
    state = state.stored_in(state_dtype, state_dtype)
    step = jax.jit(functools.partial(mamba3_projected_step, implementation="triton", **options))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        y, new = mamba3_projected_step(
            **in_float64(args), state=in_float64(state), implementation="reference", **options
        )
    exact = tolerances.rounding("float32", case.n * case.r) * turn
    rounded = exact + tolerances.narrow_rms("bfloat16", roundings=3)  # B or C, the result, and its state
    limits = {"y": rounded if "bfloat16" in (dtype, state_dtype) else exact}
    limits |= {"ssm": rounded if "bfloat16" in (dtype, state_dtype) else exact}
    limits |= {"b": rounded if "bfloat16" in (dtype, state_dtype) else exact, "x": 0.0}
    for name, limit in limits.items():
        value, expected = (actual[0], y) if name == "y" else (getattr(actual[1], name), getattr(new, name))
        assert tolerances.rms_ratio(value, expected) <= limit, name
    tolerances.assert_phase_close(actual[1].angle, new.angle, tolerances.phase_walk(1) * turn, "angle")


def test_steps_equal_the_scan_under_jit_with_donation():
    """A decoding loop updates the state in place."""
    case = dataclasses.replace(WIDE, r=4, l=40)
    args, state = _arguments(case, "float32")
    expected = _expected(case, packed=False)
    tokens = {name: jnp.moveaxis(v, 1, 0) for name, v in args.items() if name in PER_TOKEN}
    weights = {name: v for name, v in args.items() if name not in PER_TOKEN}

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(state, tokens):
        def body(state, token):
            y, state = mamba3_step(**token, **weights, state=state, implementation="triton")
            return state, y

        return jax.lax.scan(body, state, tokens)

    final, y = decode(state, tokens)
    tolerance = tolerances.rounding("float32", case.n * case.r * case.l)
    assert tolerances.rms_ratio(jnp.moveaxis(y, 0, 1), expected["y"]) <= tolerance
    assert tolerances.rms_ratio(final.ssm, expected["final.ssm"]) <= tolerance
