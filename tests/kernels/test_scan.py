"""The chunked scan against the sequential one in float64, and the identities any scan must satisfy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3jax.kernels import Mamba3State, mamba3_scan, mamba3_step
from tests import tolerances
from tests.kernels.cases import Case, make, make_state, outputs_and_gradients, segments

SISO = Case()
MIMO = Case(r=4, g=1, norm=True, omega_per_head=True)


def _terms(case: Case) -> int:
    return case.n * case.r * case.l


def _compare(case: Case, dtype, with_segments: bool = False, chunk_size: int | None = 4, **reference_options):
    """xla in `dtype` against the reference in float64 on the same numbers; every output and gradient by name."""
    options = {"segment_ids": segments(case)} if with_segments else {}
    expected = outputs_and_gradients(
        make(case), make_state(case), implementation="reference", **options, **reference_options
    )
    actual = outputs_and_gradients(
        make(case, dtype), make_state(case, dtype), implementation="xla", chunk_size=chunk_size, **options
    )
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if name == "final.angle":
            tolerances.assert_phase_close(value, expected[name], tolerances.rounding(dtype, case.l), name)
        else:
            tolerances.assert_close(value, expected[name], tolerances.rounding(dtype, _terms(case)), name)


@pytest.mark.parametrize("case", [SISO, MIMO], ids=["siso", "mimo"])
@pytest.mark.parametrize("with_segments", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matches_reference(case, with_segments, dtype, x64):
    _compare(case, dtype, with_segments)


@pytest.mark.parametrize("case", [
    dataclasses.replace(SISO, s=0), dataclasses.replace(MIMO, s=6), dataclasses.replace(SISO, bare=True),
    dataclasses.replace(SISO, r=2, p=3, n=7, g=4),
], ids=["no_rotation", "full_rotation", "bare", "odd_sizes"])  # fmt: skip
def test_options_match_reference(case, x64):
    _compare(case, "float64")


@pytest.mark.parametrize(("log_dt", "log_decay"), [((-9, -7), (-12, -9)), ((1, 3), (2, 6)), ((-4, 3), (-8, 6))],
                         ids=["weak", "strong", "mixed"])  # fmt: skip
def test_decay_extremes_in_float32(log_dt, log_decay, x64):
    # Mixed: a token that wipes the state stands between tokens that hardly decay; running sums must not cancel.
    case = dataclasses.replace(SISO, l=130, h=2, g=1, log_dt=log_dt, log_decay=log_decay)
    expected = outputs_and_gradients(make(case), make_state(case), implementation="reference")
    actual = outputs_and_gradients(make(case, "float32"), make_state(case, "float32"), implementation="xla")
    for name, value in actual.items():
        # One product dt * omega is rounded relative to itself: large steps times pi leave that much phase per token.
        largest_turn = float(np.exp(log_dt[1])) * np.pi
        tolerance = tolerances.rounding("float32", _terms(case)) * max(1.0, largest_turn)
        check = tolerances.assert_phase_close if name == "final.angle" else tolerances.assert_close
        check(value, expected[name], tolerance, name)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("rank", [1, 4])
def test_lengths(length, rank, x64):
    case = Case(b=1, l=length, h=2, p=4, n=6, g=1, r=rank, s=2)
    args, state = make(case), make_state(case)
    expected, final = mamba3_scan(**args, initial_state=state, implementation="reference", return_state=True)
    actual, actual_final = jax.jit(functools.partial(mamba3_scan, implementation="xla", return_state=True))(
        **args, initial_state=state
    )
    tolerances.assert_close(actual, expected, tolerances.rounding("float64", _terms(case)), "y")
    tolerances.assert_close(actual_final.ssm, final.ssm, tolerances.rounding("float64", _terms(case)), "ssm")
    tolerances.assert_phase_close(actual_final.angle, final.angle, tolerances.rounding("float64", length), "angle")


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 20, 21, 22, 400])
def test_chunk_size_does_not_matter(chunk_size, x64):
    args = make(MIMO)
    expected = mamba3_scan(**args, implementation="reference")
    actual = mamba3_scan(**args, implementation="xla", chunk_size=chunk_size)
    tolerances.assert_close(actual, expected, tolerances.rounding("float64", _terms(MIMO)), "y")


@pytest.mark.parametrize("with_segments", [False, True], ids=["whole", "packed"])
def test_several_blocks(with_segments, x64):
    # Blocks hold at most 64 chunks: chunks of one position make three blocks.
    _compare(dataclasses.replace(MIMO, l=150, h=2), "float64", with_segments, chunk_size=1)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", [SISO, MIMO], ids=["siso", "mimo"])
def test_any_split_equals_whole(case, implementation, x64):
    args = make(case)
    per_token = {"x", "dt", "a", "b", "c", "lam", "omega", "z"}

    def piece(start, stop):
        return {name: v[:, start:stop] if name in per_token else v for name, v in args.items()}

    whole, final = mamba3_scan(**args, implementation=implementation, return_state=True)
    state, outputs = make_state(case)._replace(**Mamba3State.zeros(2, 4, 8, 12, case.r, 3, jnp.float64)._asdict()), []
    for start, stop in ((0, 1), (1, 8), (8, 9), (9, 20)):
        y, state = mamba3_scan(
            **piece(start, stop), initial_state=state, implementation=implementation, chunk_size=4, return_state=True
        )
        outputs.append(y)
    token = {name: v[:, 20] if name in per_token else v for name, v in args.items()}
    y, state = mamba3_step(**token, state=state)
    tolerance = tolerances.rounding("float64", _terms(case))
    tolerances.assert_close(np.concatenate([*outputs, y[:, None]], axis=1), whole, tolerance, "y")
    for name in ("ssm", "b", "x"):
        tolerances.assert_close(getattr(state, name), getattr(final, name), tolerance, name)
    tolerances.assert_phase_close(state.angle, final.angle, tolerance, "angle")


def test_steps_equal_scan_in_float32():
    args = make(MIMO, "float32")
    per_token = {"x", "dt", "a", "b", "c", "lam", "omega", "z"}
    whole = mamba3_scan(**args, implementation="xla")
    step = jax.jit(mamba3_step)
    state = Mamba3State.zeros(2, 4, 8, 12, 4, 3)
    for t in range(MIMO.l):
        y, state = step(**{name: v[:, t] if name in per_token else v for name, v in args.items()}, state=state)
        tolerances.assert_close(y, whole[:, t], tolerances.rounding("float32", _terms(MIMO)), f"token {t}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_documents_equal_separate_ones(implementation, x64):
    case = dataclasses.replace(MIMO, b=1)
    args, ids = make(case), segments(case)[:1]
    packed, final = mamba3_scan(**args, segment_ids=ids, implementation=implementation, chunk_size=4, return_state=True)
    per_token = {"x", "dt", "a", "b", "c", "lam", "omega", "z"}
    for document in np.unique(ids):
        where = ids[0] == document
        alone, alone_final = mamba3_scan(
            **{name: v[:, where] if name in per_token else v for name, v in args.items()},
            implementation=implementation, return_state=True,
        )  # fmt: skip
        tolerances.assert_close(packed[:, where], alone, tolerances.rounding("float64", _terms(case)), f"{document}")
    for name, value in final._asdict().items():
        tolerances.assert_close(value, alone_final._asdict()[name], tolerances.rounding("float64", _terms(case)), name)


def test_documents_do_not_leak_into_gradients(x64):
    args, ids = make(SISO), segments(SISO)

    def first_row_document(x, document):
        y = mamba3_scan(**(args | {"x": x}), segment_ids=ids, implementation="xla", chunk_size=4)
        return jnp.sum(jnp.where((ids[0] == document)[:, None, None], y[0], 0) ** 2)

    for document in np.unique(ids[0]):
        gradient = jax.grad(first_row_document)(args["x"], document)
        outside = np.asarray(gradient[0])[ids[0] != document]
        assert not outside.any() and np.asarray(gradient[0])[ids[0] == document].any()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_causality(implementation, x64):
    args = make(SISO)
    at = 9

    def output_at(inputs):
        return jnp.sum(mamba3_scan(**(args | inputs), implementation=implementation, chunk_size=4)[:, at] ** 2)

    inputs = {name: args[name] for name in ("x", "dt", "a", "b", "c", "lam", "omega", "z")}
    for name, gradient in jax.grad(output_at)(inputs).items():
        gradient = np.asarray(gradient)
        assert not gradient[:, at + 1 :].any(), name
        assert gradient[:, : at + 1].any(), name


def test_rank_one_equals_siso(x64):
    args = make(SISO)
    siso = {name: v for name, v in args.items() if not name.startswith("mimo")}
    ones = {name: np.ones_like(args[name]) for name in ("mimo_x", "mimo_z", "mimo_o")}
    np.testing.assert_array_equal(mamba3_scan(**siso), mamba3_scan(**siso, **ones))


def test_no_angle_equals_real_recurrence(x64):
    args = make(SISO)
    still = mamba3_scan(**(args | {"omega": np.zeros_like(args["omega"])}))
    real = mamba3_scan(**(args | {"omega": args["omega"][..., :0]}))
    tolerances.assert_close(still, real, tolerances.rounding("float64", 1), "y")


def test_lambda_one_is_exponential_euler(x64):
    case = dataclasses.replace(SISO, bare=True, s=0, g=4)
    args = make(case) | {"lam": np.ones((case.b, case.l, case.h))}
    state, expected = np.zeros((case.b, case.h, case.p, case.n)), []
    for t in range(case.l):  # Mamba-2's recurrence: H = e^{ΔA} H + Δ x ⊗ B
        dt, b, c = args["dt"][:, t], args["b"][:, t, 0], args["c"][:, t, 0]
        state = np.exp(dt * args["a"][:, t])[..., None, None] * state
        state = state + dt[..., None, None] * args["x"][:, t][..., None] * b[:, :, None, :]
        expected.append(np.einsum("bhpn,bhn->bhp", state, c))
    tolerances.assert_close(
        mamba3_scan(**args), np.stack(expected, axis=1), tolerances.rounding("float64", _terms(case)), "y"
    )


def test_vmap_and_remat(x64):
    args = make(SISO)
    plain = mamba3_scan(**args)
    per_token = {"x", "dt", "a", "b", "c", "lam", "omega", "z"}
    stacked = {name: v[:, None] if name in per_token else v for name, v in args.items()}
    axes = {name: 0 if name in per_token else None for name in args}
    mapped = jax.jit(jax.vmap(lambda a: mamba3_scan(**a), in_axes=(axes,)))(stacked)
    tolerances.assert_close(mapped[:, 0], plain, tolerances.rounding("float64", 1), "vmap")

    def loss(x):
        return jnp.sum(mamba3_scan(**(args | {"x": x})) ** 2)

    remat, direct = (jax.jit(jax.grad(f))(args["x"]) for f in (jax.checkpoint(loss), loss))
    tolerances.assert_close(remat, direct, tolerances.rounding("float64", 1), "remat")


def test_runs_are_bit_equal():
    args, state = make(MIMO, "float32"), make_state(MIMO, "float32")

    def loss(args, state):
        y, final = mamba3_scan(**args, initial_state=state, implementation="xla", return_state=True)
        return jnp.sum(y**2) + jnp.sum(final.ssm**2), (y, final)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    first, second = run(args, state), run(args, state)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("headdim", [16, 64, 128])
def test_head_widths(headdim, x64):
    case = Case(b=1, l=33, h=2, p=headdim, n=headdim, g=1, s=headdim // 4)
    expected = mamba3_scan(**make(case), implementation="reference")
    actual = mamba3_scan(**make(case, "float32"), implementation="xla")
    tolerances.assert_close(actual, expected, tolerances.rounding("float32", _terms(case)), "y")


def test_bfloat16_inputs(x64):
    case = dataclasses.replace(MIMO, l=40)
    rounded = {name: jnp.asarray(v, jnp.bfloat16) for name, v in make(case, "float32").items()}
    expected = mamba3_scan(**{name: np.asarray(v, np.float64) for name, v in rounded.items()})
    actual = mamba3_scan(**rounded, implementation="xla")
    assert actual.dtype == jnp.bfloat16
    # The operands are exact here: float32 sums, then one rounding of the result.
    tolerance = tolerances.rounding("float32", _terms(case)) + float(jnp.finfo(jnp.bfloat16).eps) / 2
    tolerances.assert_close(actual, expected, tolerance, "y")


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731 (three letters, used eight times)
    groups, n = draw(1, 3), draw(1, 9)
    case = Case(b=draw(1, 2), l=draw(1, 30), h=groups * draw(1, 2), p=draw(1, 5), n=n, g=groups, r=draw(1, 3),
                s=draw(0, n // 2), omega_per_head=data.draw(st.booleans()), bare=data.draw(st.booleans()))  # fmt: skip
    with jax.enable_x64(True):
        options = {"initial_state": make_state(case), "return_state": True}
        if data.draw(st.booleans()):
            options["segment_ids"] = segments(case)
        expected, final = mamba3_scan(**make(case), implementation="reference", **options)
        actual, actual_final = mamba3_scan(**make(case), implementation="xla", chunk_size=draw(1, 35), **options)
    tolerances.assert_close(actual, expected, tolerances.rounding("float64", _terms(case)), "y")
    tolerances.assert_close(actual_final.ssm, final.ssm, tolerances.rounding("float64", _terms(case)), "ssm")


def test_phase_after_a_million_steps():
    steps, angles = 1_000_000, 4
    rng = np.random.default_rng(0)
    # No period in the inputs: rounding errors would repeat with it and add up instead of averaging out.
    dt = rng.uniform(0.001, 0.1, size=steps).astype(np.float32)
    omega = (np.pi * np.tanh(rng.normal(size=(steps, angles)))).astype(np.float32)
    fixed = {name: jnp.zeros((1, 1), jnp.float32) for name in ("a", "lam")}
    fixed |= {name: jnp.zeros((1, 1, 1, 2 * angles), jnp.float32) for name in ("b", "c")}
    fixed["x"] = jnp.zeros((1, 1, 1), jnp.float32)

    def body(state, inputs):
        return mamba3_step(**fixed, dt=inputs[0].reshape(1, 1), omega=inputs[1][None], state=state)[1], None

    state = Mamba3State.zeros(1, 1, 1, 2 * angles, 1, angles)
    state, _ = jax.jit(lambda s, *inputs: jax.lax.scan(body, s, inputs))(state, dt, omega)
    expected = (dt.astype(np.float64)[:, None] * omega.astype(np.float64)).sum(axis=0)
    assert (np.asarray(state.angle) >= 0).all() and (np.asarray(state.angle) < 2 * np.pi).all()
    tolerances.assert_phase_close(state.angle[0, 0], expected, tolerances.phase_walk(steps), "phase")


def test_phase_of_a_long_prefill():
    length = 100_000
    case = Case(b=1, l=length, h=1, p=1, n=4, g=1, s=2, bare=True)
    args = make(case, "float32")
    _, state = jax.jit(functools.partial(mamba3_scan, implementation="xla", return_state=True))(**args)
    expected = (args["dt"].astype(np.float64)[..., None] * args["omega"].astype(np.float64)[:, :, None]).sum(axis=1)
    # Only the products dt * omega round (at most π/2 · 2^-24 each); their sum inside a block is exact.
    tolerances.assert_phase_close(state.angle, expected, tolerances.phase_walk(length), "phase")
