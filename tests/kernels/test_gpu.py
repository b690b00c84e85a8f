"""The kernels on the GPU that is there, against the recurrence in float64: make test-gpu."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.kernels import (
    Mamba3State,
    cached_attention_step,
    few_rows_product,
    gated_delta_scan,
    gated_delta_step,
    mamba3_projected_step,
    mamba3_scan,
    mamba3_step,
)
from m3jax.kernels.gpu import compute_capability
from m3jax.models.attention import attend
from m3jax.models.language_model import LanguageModel
from tests import tolerances
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


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """A missing GPU is a failure: who asks for these tests means to run them."""
    if jax.default_backend() != "gpu":
        pytest.fail(f"-m gpu: the default device is a {jax.default_backend()}.")


def _documents(case: Case, packed: bool) -> np.ndarray | None:
    starts = np.random.default_rng(3).random((case.b, case.l)) < 0.01
    return np.cumsum(starts, axis=1, dtype=np.int32) if packed else None


def _rounded(name: str, v: np.ndarray) -> np.ndarray:
    """Numbers that bfloat16 holds, where a layer passes bfloat16: one reference serves both types."""
    return v if name in IN_FLOAT32 else np.asarray(jnp.asarray(v, jnp.bfloat16), v.dtype)


def _arguments(case: Case, dtype: str) -> tuple[dict[str, jax.Array], Mamba3State]:
    args = {name: _rounded(name, v) for name, v in make(case, "float32").items()}
    narrow = {name: jnp.asarray(v, dtype if name in ("x", "b", "c", "z") else v.dtype) for name, v in args.items()}
    state = make_state(case, "float32")
    state = state._replace(x=_rounded("x", state.x))
    return narrow, jax.tree.map(jnp.asarray, state._replace(x=jnp.asarray(state.x, dtype)))


def _in_float64(tree):
    return jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), tree)


@functools.cache
def _expected(case: Case, packed: bool) -> dict[str, np.ndarray]:
    # On the CPU: states of every token and head in float64, which would fill the memory that all workers share.
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        run = differentiated(implementation="reference", segment_ids=_documents(case, packed))
        return jax.tree.map(np.asarray, run(*_in_float64(_arguments(case, "float32"))))


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


@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_step(case, dtype, ssm_dtype):
    args, state = _arguments(case, dtype)
    args = {name: v[:, 0] if name in PER_TOKEN else v for name, v in args.items()}
    state = state._replace(ssm=state.ssm.astype(ssm_dtype))
    step = jax.jit(functools.partial(mamba3_step, implementation="triton"))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        y, new = mamba3_step(**_in_float64(args), state=_in_float64(state), implementation="reference")
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    exact = tolerances.rounding("float32", case.n * case.r) * largest_turn
    # y is rounded once, or read from the state as it is stored.
    narrow = {"float32": exact, "bfloat16": exact + tolerances.narrow_rms("bfloat16", roundings=2)}
    limits = {"y": narrow["bfloat16" if "bfloat16" in (dtype, ssm_dtype) else "float32"], "ssm": narrow[ssm_dtype]}
    limits |= {"b": exact, "x": 0.0}
    for name, limit in limits.items():
        value, expected = (actual[0], y) if name == "y" else (getattr(actual[1], name), getattr(new, name))
        assert tolerances.rms_ratio(value, expected) <= limit, name
    tolerances.assert_phase_close(actual[1].angle, new.angle, tolerances.phase_walk(1) * largest_turn, "angle")


@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_projected_step(case, dtype, ssm_dtype):
    options = {"fixed_lambda": 0.5 if case.bare else None, "a_activation": "softplus" if case.r > 1 else "heavy_tail"}
    args = make_projected(case, "float32", has_lambda=not case.bare)
    turn = largest_turn(args)
    args = {name: jnp.asarray(_rounded(name, v), dtype if name == "projected" else v.dtype) for name, v in args.items()}
    state = make_state(case, "float32")
    state = jax.tree.map(jnp.asarray, state._replace(x=jnp.asarray(_rounded("x", state.x), dtype)))
    state = state._replace(ssm=state.ssm.astype(ssm_dtype))
    step = jax.jit(functools.partial(mamba3_projected_step, implementation="triton", **options))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        y, new = mamba3_projected_step(
            **_in_float64(args), state=_in_float64(state), implementation="reference", **options
        )
    exact = tolerances.rounding("float32", case.n * case.r) * turn
    rounded = exact + tolerances.narrow_rms("bfloat16", roundings=3)  # B or C, the result, and its state
    limits = {"y": rounded if "bfloat16" in (dtype, ssm_dtype) else exact}
    limits |= {"ssm": rounded if "bfloat16" in (dtype, ssm_dtype) else exact}
    limits |= {"b": rounded if dtype == "bfloat16" else exact, "x": 0.0}
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


def _gradients(function, args: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The result, and the gradient of each argument of the sum of the result's cosines."""
    y, pullback = jax.vjp(lambda args: function(**args), args)
    return {"y": y} | pullback(jnp.cos(y))[0]


def _assert_close_to_float64(function, exact, args: dict[str, jax.Array], tolerance: float) -> None:
    actual = jax.jit(functools.partial(_gradients, function))(args)
    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(_gradients, exact))(_in_float64(args))
    errors = {name: tolerances.rms_ratio(value, expected[name]) for name, value in actual.items()}
    assert max(errors.values()) <= tolerance, errors


def _gated_delta_arguments(lead: tuple[int, ...], n: int, p: int, dtype: str, beta_to: float) -> dict[str, jax.Array]:
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
    args = _gated_delta_arguments(lead, n, p, dtype, beta_to=1.0)
    documents = {"segment_ids": _documents(dataclasses.replace(WIDE, b=lead[0], l=lead[1]), packed=True)}
    kernel = functools.partial(gated_delta_scan, **documents, chunk_size=chunk_size, implementation="triton")
    exact = functools.partial(gated_delta_scan, **documents, implementation="reference")
    tolerance = tolerances.rounding("float32", 300 * n)
    if dtype == "bfloat16":
        # q and k, the inverse, both its products, S and its cotangent, and the result.
        tolerance += tolerances.narrow_rms("bfloat16", roundings=6)
    _assert_close_to_float64(kernel, exact, args, tolerance)


@pytest.mark.parametrize("unit_eps", [None, 1e-6], ids=["as given", "of length 1"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "p"), [(128, 256), (64, 64), (256, 512), (48, 72), (100, 24), (16, 16), (512, 3), (1, 1)]
)
def test_gated_delta_step(n, p, unit_eps, dtype, state_dtype):
    args = _gated_delta_arguments((3, 5), n, p, dtype, beta_to=2.0)
    state = jax.random.normal(jax.random.key(1), (3, 5, p, n)).astype(state_dtype)
    step = jax.jit(functools.partial(gated_delta_step, unit_eps=unit_eps, implementation="triton"))
    actual, again = step(**args, state=state), step(**args, state=state)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
    with jax.enable_x64(True):
        wide = _in_float64(args), _in_float64(state)
        expected = gated_delta_step(**wide[0], state=wide[1], unit_eps=unit_eps, implementation="reference")
    for name, value, exact in zip(("o", "S"), actual, expected, strict=True):
        tolerance = tolerances.rounding("float32", n)
        if value.dtype == jnp.bfloat16:
            tolerance += tolerances.narrow_rms("bfloat16", roundings=1)
        assert tolerances.rms_ratio(value, exact) <= tolerance, name


def test_gated_delta_steps_equal_the_scan_under_jit_with_donation():
    """A decoding loop updates S in place, and reads none of what it has written of it."""
    args = _gated_delta_arguments((2, 40, 3), 128, 256, "float32", beta_to=2.0)
    with jax.enable_x64(True):
        expected = gated_delta_scan(**_in_float64(args), implementation="reference", return_state=True)

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


@pytest.mark.parametrize("mean_length", [100, 10])
def test_attention_of_documents(mean_length):
    """Few enough documents for cuDNN to take one by one, and more."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = {"q": 4, "k": 2, "v": 2}
    args = {
        name: jax.random.normal(key, (2, 384, n, 64), jnp.bfloat16)
        for key, (name, n) in zip(keys, heads.items(), strict=True)
    }
    starts = np.random.default_rng(0).random((2, 384)) < 1 / mean_length
    documents = jnp.asarray(np.cumsum(starts, axis=1, dtype=np.int32))

    def exact(q, k, v):
        k, v = (jnp.repeat(t, 2, axis=2) for t in (k, v))
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k, precision="highest") / 8
        seen = jnp.tri(384, dtype=bool)[None] & (documents[:, :, None] == documents[:, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhlm,bmhd->blhd", weights, v, precision="highest")

    # The weights, the result, its cotangent and the gradient.
    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)
    _assert_close_to_float64(functools.partial(attend, segment_ids=documents), exact, args, tolerance)


@pytest.mark.parametrize(("dtype", "kv", "group", "width", "room"), [
    ("bfloat16", 8, 4, 64, 4096), ("bfloat16", 2, 2, 256, 1000), ("float16", 1, 17, 16, 300),
    ("float32", 2, 1, 128, 700),
])  # fmt: skip
def test_cached_attention_steps_under_jit_with_donation(dtype, kv, group, width, room):
    """From nothing to beyond the room, later documents; a decoding loop puts its tokens into the cache in place."""
    length, start = jnp.asarray([0, 1, room // 2, room - 2, room + 5]), jnp.asarray([0, 0, room // 3, 0, 7])
    keys = iter(jax.random.split(jax.random.key(0), 5))
    cache = tuple(jax.random.normal(next(keys), (5, kv, room, width)).astype(dtype) for _ in range(2))
    tokens = [jax.random.normal(next(keys), (3, 5, n, width)).astype(dtype) for n in (kv * group, kv, kv)]

    def decode(implementation, cache, tokens):
        def body(carry, token):
            *cache, length = carry
            y, *cache = cached_attention_step(*token, *cache, length, start, implementation=implementation)
            return (*cache, length + 1), y

        return jax.lax.scan(body, (*cache, length), tokens)

    with jax.enable_x64(True):
        (*expected_cache, _), expected = decode("xla", *_in_float64((cache, tokens)))
    (*cache, _), y = jax.jit(decode, static_argnums=0, donate_argnums=1)("triton", cache, tokens)
    for actual, exact in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float64), exact)
    tolerance = tolerances.rounding("float32", width + room)
    if dtype != "float32":  # the weights and the result
        tolerance += tolerances.narrow_rms(dtype, roundings=2)
    assert tolerances.rms_ratio(y, expected) <= tolerance


@pytest.mark.parametrize(("dtype", "inner", "outer", "options"), [
    ("bfloat16", 2048, 8672, {"norm": True}), ("bfloat16", 2048, 4096, {"norm": True, "gated": True}),
    ("bfloat16", 4096, 2048, {"added": True}), ("float32", 1000, 1100, {"norm": True, "added": True, "gated": True}),
    ("bfloat16", 520, 3000, {}),
])  # fmt: skip
def test_product_of_one_row(dtype, inner, outer, options):
    keys = jax.random.split(jax.random.key(0), 4)
    norm, added, gated = (options.get(name, False) for name in ("norm", "added", "gated"))
    options = {"epsilon": 1e-5, "gated": gated}
    x = jax.random.normal(keys[0], (1, inner)).astype("float32" if norm else dtype)
    weight = (jax.random.normal(keys[1], (inner, outer * (1 + gated))) / np.sqrt(inner)).astype(dtype)
    scale = jax.random.normal(keys[2], (inner,)).astype(dtype) if norm else None
    residual = jax.random.normal(keys[3], (1, outer)) if added else None
    y = few_rows_product(x, weight, scale=scale, residual=residual, implementation="triton", **options)
    with jax.enable_x64(True):
        x, weight, scale, residual = _in_float64((x, weight, scale, residual))
        exact = few_rows_product(x, weight, scale=scale, residual=residual, implementation="xla", **options)
    tolerance = tolerances.rounding("float32", inner)
    if dtype != "float32":  # x, the product, and twice in the gate
        tolerance += tolerances.narrow_rms(dtype, roundings=4)
    assert tolerances.rms_ratio(y, exact) <= tolerance


def test_products_of_one_row_wait_for_each_other():
    """Many in one program, where one may start before another has ended, and one at a time: the same bits."""
    keys = jax.random.split(jax.random.key(0), 65)
    weights = [jax.random.normal(key, (1024, 1024), jnp.bfloat16) / 32 for key in keys[1:]]
    x, scale = jax.random.normal(keys[0], (1, 1024)), jnp.ones(1024)

    @jax.jit
    def products(x, weights):
        for weight in weights:
            x = few_rows_product(x, weight, scale=scale, epsilon=1e-5, residual=x, implementation="triton")
        return x

    alone = x
    for weight in weights:
        alone = jax.block_until_ready(products(alone, [weight]))
    for _ in range(5):
        np.testing.assert_array_equal(products(x, weights), alone)


@pytest.mark.parametrize("rows", [2, 32, 72, 128])
@pytest.mark.parametrize(("inner", "outer", "options"), [
    (2048, 8672, {"norm": True}), (2048, 4096, {"norm": True, "gated": True}), (4096, 2048, {"added": True}),
    (520, 3000, {}),
])  # fmt: skip
def test_product_of_several_rows(rows, inner, outer, options):
    """Against float64, the same bits twice, and the last row's whatever the others hold."""
    if compute_capability() != 90:
        pytest.skip("the Triton product of several rows is for Hopper GPUs")
    keys = jax.random.split(jax.random.key(0), 4)
    norm, added, gated = (options.get(name, False) for name in ("norm", "added", "gated"))
    options = {"epsilon": 1e-5, "gated": gated}
    x = jax.random.normal(keys[0], (rows, inner)).astype("float32" if norm else "bfloat16")
    weight = (jax.random.normal(keys[1], (inner, outer * (1 + gated))) / np.sqrt(inner)).astype("bfloat16")
    scale = jax.random.normal(keys[2], (inner,)).astype("bfloat16") if norm else None
    residual = jax.random.normal(keys[3], (rows, outer)) if added else None

    @functools.partial(jax.jit, static_argnames="implementation")
    def product(x, weight, scale, residual, implementation="triton"):
        given = {"scale": scale, "residual": residual, "implementation": implementation}
        return few_rows_product(x, weight, **given, **options)

    y = product(x, weight, scale, residual)
    np.testing.assert_array_equal(product(x, weight, scale, residual), y)
    np.testing.assert_array_equal(product(x.at[:-1].set(jnp.nan), weight, scale, residual)[-1], y[-1])
    with jax.enable_x64(True):
        exact = product(*_in_float64((x, weight, scale, residual)), implementation="xla")
    assert tolerances.rms_ratio(y, exact) <= tolerances.narrow_rms("bfloat16", roundings=4)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_row_of_a_step_is_bit_for_bit_that_row_among_others(rank):
    config = ModelConfig(vocab_size=512, d_model=256, n_layers=2, d_intermediate=512, mimo_rank=rank, dtype="bfloat16")
    model, rows = LanguageModel(config), 24
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    step = jax.jit(lambda token, state: model.apply({"params": params}, token, state, method="step"))
    token, zero = jnp.arange(rows), model.initial_state(rows, 1)
    _, state = step(token, zero)
    logits, after = step(token, state)
    others = jax.tree.map(lambda v: v.at[1:].set(3), state)
    other_logits, other_after = step(token.at[1:].add(7), others)
    assert (logits[1:] != other_logits[1:]).any()
    for v, other in zip(jax.tree.leaves((logits, after)), jax.tree.leaves((other_logits, other_after)), strict=True):
        np.testing.assert_array_equal(np.asarray(v[0], np.float32), np.asarray(other[0], np.float32))


def test_kernels_on_a_mesh():
    """Training on two GPUs, each with its rows, gives what one gives, and by kernels."""
    gpus = os.environ["M3JAX_TEST_GPUS"].split(",")
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    one, two = (_train_on(gpus[:count]) for count in (1, 2))
    hopper = compute_capability() == 90
    for name, run in two.items():
        assert "triton_kernel_call" in run["kernels"] and ("mosaic_gpu" in run["kernels"] or not hopper)
        assert run["kernels"] == one[name]["kernels"]
        exact = tolerances.rounding("float32", 4 * 160)
        tolerances.assert_close(run["loss"][0], one[name]["loss"][0], exact, f"{name}: loss")
        # The weights' gradients are rounded on each GPU before they are added.
        rounded = tolerances.narrow_rms("bfloat16", 2)
        tolerances.assert_close(run["grad_norm"], one[name]["grad_norm"], rounded, f"{name}: grad_norm")


def _train_on(gpus: list[str]) -> dict[str, dict]:
    script = Path(__file__).with_name("train_on_gpus.py")
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    done = subprocess.run(
        [sys.executable, script], cwd=script.parents[2], env=os.environ | environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
