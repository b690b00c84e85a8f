"""The Triton scan, in Triton's interpreter, against the sequential one in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from m3jax.kernels import SCAN_RESIDUALS, mamba3_scan, triton_launch
from m3jax.kernels.mamba3.inputs import Sequence
from m3jax.kernels.mamba3.triton import plans
from m3jax.kernels.mamba3.triton import scan as triton_scan
from m3jax.kernels.mamba3.triton.op import Plan
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.cases import Case, differentiated, make, make_state, outputs_and_gradients, segments

# Chunks of 16 rows are the smallest; the interpreter takes a second or so for ten of them, forward and backward.
SISO = Case(b=1, h=2, g=1)
MIMO = Case(b=1, h=2, g=1, r=4, norm=True, omega_per_head=True)
PER_TOKEN = ("x", "dt", "a", "b", "c", "lam", "omega", "z")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpreter.use(monkeypatch)


def _one_segment(monkeypatch) -> None:
    """One program walks a whole sequence; by default these sizes have a segment per chunk."""
    monkeypatch.setattr(triton_scan, "choose_plan", lambda *inputs: plans.choose_plan(*inputs)._replace(segments=1))


def _compare(case: Case, chunk_size: int | None, with_segments: bool = False, with_state: bool = True):
    """Every output and gradient by name, float32 in the kernels."""
    ids = {"segment_ids": segments(case)} if with_segments else {}
    with jax.enable_x64(True):
        state = make_state(case) if with_state else None
        expected = outputs_and_gradients(make(case), state, implementation="reference", **ids)
    state = make_state(case, "float32") if with_state else None
    actual = outputs_and_gradients(make(case, "float32"), state, implementation="triton", chunk_size=chunk_size, **ids)
    assert actual.keys() == expected.keys()
    # One product dt * omega is rounded relative to itself: large steps times π leave that much phase per token.
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    tolerance = tolerances.rounding("float32", case.n * case.r * case.l) * largest_turn
    # The gradient of log decay is a difference of sums over a row of y times its cotangent (backward.py).
    term = case.p * np.abs(expected["y"]).max()
    scale = {"d a": term * np.exp(case.log_dt[1]), "d dt": term * np.exp(case.log_decay[1])}
    for name, value in actual.items():
        if name == "final.angle":
            tolerances.assert_phase_close(value, expected[name], tolerance, name)
        else:
            tolerances.assert_close(value, expected[name], tolerance, name, scale.get(name, 0.0))


@pytest.mark.parametrize(("case", "chunk_size"), [
    (dataclasses.replace(SISO, b=2), 16),
    (dataclasses.replace(MIMO, l=11), 4),
    (dataclasses.replace(MIMO, r=2, p=3, n=7, omega_per_head=False), 8),
    (dataclasses.replace(SISO, r=8, h=1, l=5), 2),
    (dataclasses.replace(SISO, h=4, g=2, norm=True, l=17), 16),
    (dataclasses.replace(SISO, s=0, l=17), 16),
    (dataclasses.replace(MIMO, s=6, l=7), 4),
    (dataclasses.replace(SISO, p=1, n=1, s=0, h=1, l=17), 16),
    (dataclasses.replace(SISO, p=16, n=32, s=8, h=1, l=17), 16),
], ids=["siso", "mimo", "rank_2_odd_sizes", "rank_8", "groups_norm", "no_rotation", "full_rotation", "scalar",
        "unpadded"])  # fmt: skip
def test_matches_reference(case, chunk_size):
    _compare(case, chunk_size)


@pytest.mark.parametrize(("case", "chunk_size"), [
    (dataclasses.replace(SISO, h=1), 16), (dataclasses.replace(MIMO, h=1), 8),
], ids=["siso", "mimo"])  # fmt: skip
def test_documents(case, chunk_size):
    _compare(case, chunk_size, with_segments=True)


def test_bare_from_the_zero_state():
    _compare(dataclasses.replace(SISO, h=1, bare=True), 16, with_state=False)


@pytest.mark.parametrize("with_segments", [False, True], ids=["whole", "packed"])
def test_one_program_for_all_chunks(with_segments, monkeypatch):
    _one_segment(monkeypatch)
    _compare(dataclasses.replace(SISO, l=40, h=1), 16, with_segments)


def test_several_chunks_in_each_of_several_segments(monkeypatch):
    monkeypatch.setattr(triton_scan, "choose_plan", lambda *inputs: plans.choose_plan(*inputs)._replace(segments=2))
    _compare(dataclasses.replace(SISO, l=70, h=1), 16)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_lengths(length):
    _compare(dataclasses.replace(SISO, l=length, h=1, p=4, n=6, s=2), 32)


@pytest.mark.parametrize(("rank", "chunk_size"), [(1, None), (1, 128), (4, None)])
def test_chunk_sizes(rank, chunk_size):
    _compare(dataclasses.replace(SISO, l=35, h=1, r=rank, p=4, n=6, s=2), chunk_size)


@pytest.mark.parametrize(("log_dt", "log_decay"), [((-9, -7), (-12, -9)), ((1, 3), (2, 6)), ((-4, 3), (-8, 6))],
                         ids=["weak", "strong", "mixed"])  # fmt: skip
def test_decay_extremes(log_dt, log_decay):
    # Mixed: a token that wipes the state stands between tokens that hardly decay; running sums must not cancel.
    _compare(dataclasses.replace(SISO, l=70, h=1, log_dt=log_dt, log_decay=log_decay), 64)


def test_bfloat16_keeps_dtypes():
    # The interpreter computes it in float32, so that little more than the types can be seen here.
    wide = make(MIMO, "float32")
    args = {name: jnp.asarray(v, jnp.bfloat16) for name, v in wide.items()}
    state = make_state(MIMO, "float32")

    def loss(args, state):
        y, final = mamba3_scan(**args, initial_state=state, implementation="triton", chunk_size=4, return_state=True)
        return jnp.sum(y.astype(jnp.float32) ** 2), (y, final)

    gradients, (y, final) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(args, state)
    assert (y.dtype, final.ssm.dtype, final.x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients[0].values())
    rounded = {name: np.asarray(v, np.float32) for name, v in args.items()}
    expected = mamba3_scan(**rounded, initial_state=state, implementation="reference")
    # The kernels' y of every rank is rounded once, and the output once more.
    tolerances.assert_close(y, expected, 4 * float(jnp.finfo(jnp.bfloat16).eps), "y")


def test_vmap_and_remat():
    case = dataclasses.replace(SISO, h=1, l=17)
    args = make(case, "float32")
    x, rest = np.stack([args.pop("x"), args["z"]]), args

    def loss(x, rest):
        return jnp.sum(mamba3_scan(x, **rest, implementation="triton", chunk_size=16) ** 2)

    alone = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), in_axes=(0, None)))(x, rest)
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)))(x[0], rest)
    tolerance = tolerances.rounding("float32", 1)
    for i in range(2):
        expected = alone(x[i], rest)
        jax.tree.map(lambda a, e, i=i: tolerances.assert_close(a[i], e, tolerance, "vmap"), mapped, expected)
    jax.tree.map(lambda a, e: tolerances.assert_close(a, e, tolerance, "remat"), remat, alone(x[0], rest))


def test_a_policy_can_spare_the_second_forward():
    args = make(dataclasses.replace(SISO, h=1, l=17), "float32")
    keep = jax.checkpoint_policies.save_only_these_names(SCAN_RESIDUALS)

    def loss(args):
        return jnp.sum(mamba3_scan(**args, implementation="triton", chunk_size=16) ** 2)

    def launches(f):
        return interpreter.launches(jax.grad(f), args)

    assert launches(jax.checkpoint(loss, policy=keep)) == launches(loss) < launches(jax.checkpoint(loss))


def test_runs_are_bit_equal():
    case = dataclasses.replace(MIMO, h=1, l=9)
    args, state = make(case, "float32"), make_state(case, "float32")

    def loss(args, state):
        y, final = mamba3_scan(**args, initial_state=state, implementation="triton", chunk_size=4, return_state=True)
        return jnp.sum(y**2) + jnp.sum(final.ssm**2), (y, final)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    jax.tree.map(np.testing.assert_array_equal, run(args, state), run(args, state))


def _assert_only(inside: np.ndarray, gradients: dict[str, jax.Array]) -> None:
    """Gradients are 0 outside; those found as differences of sums are so up to rounding of the largest."""
    gradients = {name: np.abs(np.asarray(v, np.float64)) for name, v in gradients.items()}
    largest = max(gradient.max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient[0, inside].any(), name
        rounding = tolerances.rounding("float32", len(inside)) if name in ("dt", "a", "lam", "omega") else 0.0
        assert gradient[0, ~inside].max(initial=0) <= rounding * largest, name


def test_causality():
    args, at = make(dataclasses.replace(SISO, h=1, l=40), "float32"), 19

    @jax.jit
    def gradients(inputs):
        def output_at(inputs):
            y = mamba3_scan(**(args | inputs), implementation="triton", chunk_size=16)
            return jnp.sum(y[:, at] ** 2)

        return jax.grad(output_at)(inputs)

    _assert_only(np.arange(40) <= at, gradients({name: args[name] for name in PER_TOKEN}))


def test_documents_do_not_leak_into_gradients():
    case = dataclasses.replace(SISO, h=1)
    args, ids = make(case, "float32"), segments(case)

    @jax.jit
    def gradients(inputs, inside):
        def output_inside(inputs):
            y = mamba3_scan(**(args | inputs), segment_ids=ids, implementation="triton", chunk_size=16)
            return jnp.sum(jnp.where(inside[None, :, None, None], y, 0) ** 2)

        return jax.grad(output_inside)(inputs)

    for document in (2, 4):
        inside = ids[0] == document
        _assert_only(inside, gradients({name: args[name] for name in PER_TOKEN}, inside))


def test_runs_are_one_launch():
    """Under vmap over runs: every run as alone, in the launches that one run takes. Some arguments are not mapped."""
    case = dataclasses.replace(MIMO, b=2, l=5, norm=False, omega_per_head=False)
    each = [(make(case, "float32", seed), make_state(case, "float32", seed)) for seed in range(2)]
    args, state = jax.tree.map(lambda *v: np.stack(v), *each)
    shared = {name: each[0][0][name] for name in ("b_bias", "a")}
    args = {name: v for name, v in args.items() if name not in shared}
    run = differentiated(implementation="triton", chunk_size=4, segment_ids=segments(case))

    @jax.jit
    def over_runs(args, shared, state):
        return jax.vmap(lambda args, state: run(args | shared, state))(args, state)

    actual = over_runs(args, shared, state)
    for i, (own, own_state) in enumerate(each):
        for name, expected in run(own | shared, own_state).items():
            tolerances.assert_close(actual[name][i], expected, tolerances.rounding("float32", case.l * case.n), name)
    assert interpreter.launches(over_runs, args, shared, state) == interpreter.launches(run, *each[0])
    assert "scan[" not in str(jax.make_jaxpr(over_runs)(args, shared, state))


def test_runs_too_many_for_one_launch_follow_one_another(monkeypatch):
    case = dataclasses.replace(SISO, h=1, l=3, p=4, n=4, s=1)
    args = jax.tree.map(lambda *v: np.stack(v), *(make(case, "float32", seed) for seed in range(2)))

    def scan(args):
        return mamba3_scan(**args, implementation="triton", chunk_size=16)

    def loops(args):
        return str(jax.make_jaxpr(jax.vmap(scan))(args)).count("scan[")

    assert loops(args) == 0
    monkeypatch.setattr(triton_launch, "MAX_ELEMENTS", 1)
    assert loops(args) > 0
    y = jax.jit(jax.vmap(scan))(args)
    expected = scan(jax.tree.map(lambda v: v[1], args))
    tolerances.assert_close(y[1], expected, tolerances.rounding("float32", case.l * case.n), "y")


def test_tensorfloat32_rounds_operands():
    """Where the caller asks for it, and only there; tf32 has the significand of float16."""
    args, state = make(dataclasses.replace(SISO, h=1), "float32"), make_state(dataclasses.replace(SISO, h=1), "float32")
    exact = outputs_and_gradients(args, state, implementation="triton", chunk_size=16)
    with jax.default_matmul_precision("tensorfloat32"):
        rounded = outputs_and_gradients(args, state, implementation="triton", chunk_size=16)
    # B or C, a score or H, and a gradient: at most six roundings of a term in a row.
    for name, expected in exact.items():
        assert tolerances.rms_ratio(rounded[name], expected) <= tolerances.narrow_rms("float16", 6), name
    assert tolerances.rms_ratio(rounded["y"], exact["y"]) > tolerances.rounding("float32", SISO.n)


def test_chunks_are_short_where_many_states_are_small():
    def plan(chunk_size: int | None = None, **sizes: int):
        args = make(Case(b=64, l=1, h=32, g=1, s=8, **sizes), "float32")
        return plans.rules(Sequence(**{name: args.get(name) for name in Sequence._fields}), chunk_size)

    assert plan(p=16, n=32) == Plan(16, segments=1, warps=1, stages=1, value_warps=1, key_heads=1, key_warps=1)
    assert (plan(p=16, n=64).positions, plan(p=16, n=32, r=2).positions) == (64, 32)
    assert plan(chunk_size=64, p=16, n=32).warps == 4
