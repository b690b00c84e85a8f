"""The Mosaic GPU backward and what it is made of, in JAX's interpreter, against the sequential scan in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Inputs
from m3jax.kernels.mamba3.mosaic import scan
from m3jax.kernels.mamba3.mosaic.forward import in_chunks
from m3jax.kernels.mamba3.mosaic.pieces import T
from m3jax.kernels.mamba3.mosaic.state_gradients import state_gradients
from tests import tolerances
from tests.kernels.cases import Case, differentiated
from tests.kernels.mosaic_cases import CASE, arguments, chunk_states, documents, needs_new_jax, split, wide

CASES = [
    (dataclasses.replace(CASE, b=2, l=2 * T + 9, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=5 * T), 3, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), 2, True),
    (dataclasses.replace(CASE, l=T + 1, log_dt=(1, 3), log_decay=(2, 6)), 1, False),
    # Of three chunks of a segment, two count for the next.
    (dataclasses.replace(CASE, l=6 * T, log_dt=(-3, -1), log_decay=(0, 1)), 2, False),
]
NAMES = ["groups", "segments", "documents", "strong_decay", "forgotten"]


def _setup(monkeypatch, case: Case, segments: int, packed: bool):
    """(arguments by name, state, documents, the scan's inputs without the state's half step, seeded gradients)."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = arguments(case)
    packing = documents(case) if packed else None
    inputs = Inputs(*split(args), state.ssm, state.angle, None if packing is None else jnp.asarray(packing))
    rng = np.random.default_rng(5)
    dy = jnp.asarray(rng.normal(size=args["x"].shape), jnp.bfloat16)
    dssm = jnp.asarray(rng.normal(size=state.ssm.shape), jnp.float32)
    return args, state, packing, inputs, (dy, dssm)


@pytest.mark.parametrize("packed", [False, True])
def test_states_by_hand_are_those_of_the_reference(packed):
    """What the next two tests and those of the main kernel compare with."""
    case = dataclasses.replace(CASE, b=2, l=2 * T + 9, h=2)
    args, state = arguments(case, jnp.float32)
    # The reference starts phases anew and folds a half step into a state; here neither is to count.
    state = state._replace(x=jnp.zeros_like(state.x), b=jnp.zeros_like(state.b))
    packing = documents(case) if packed else None
    rng = np.random.default_rng(5)
    dy, dssm = rng.normal(size=args["x"].shape), rng.normal(size=state.ssm.shape) * (not packed)
    before, _, last, first_grad = chunk_states(args, state, packing, dy, dssm)
    with jax.enable_x64(True):
        exact, start = jax.tree.map(lambda v: jnp.asarray(wide(v)), (args, state))

        def ends(length: int, ssm):
            rows = {k: v[:, :length] if v.shape[:2] == (case.b, case.l) else v for k, v in exact.items()}
            ids = None if packing is None else packing[:, :length]
            return mamba3_scan(
                **rows, initial_state=start._replace(ssm=ssm), segment_ids=ids, implementation="reference",
                return_state=True,
            )  # fmt: skip

        def loss(ssm):
            y, final = ends(case.l, ssm)
            return jnp.sum(y * dy) + jnp.sum(final.ssm * dssm)

        tolerance = tolerances.rounding("float64", case.l * case.n)
        tolerances.assert_close(first_grad, jax.jit(jax.grad(loss))(start.ssm), tolerance, "G before the first token")
        tolerances.assert_close(before[:, :, 0], start.ssm, 0, "H before the first token")
        if not packed:
            _, final = ends(case.l, start.ssm)
            tolerances.assert_close(last, final.ssm, tolerance, "H after the last token")


@needs_new_jax
@pytest.mark.parametrize(("case", "segments", "packed"), CASES, ids=NAMES)
def test_states_match_those_by_hand(monkeypatch, case, segments, packed):
    """H before every chunk, saved; saving changes nothing else."""
    args, state, packing, inputs, (dy, dssm) = _setup(monkeypatch, case, segments, packed)
    y, ssm, angle, _, chunk_ssm = jax.jit(scan.forward_saving)(inputs)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(scan.forward)(inputs), (y, ssm, angle))
    assert chunk_ssm.dtype == jnp.bfloat16 and chunk_ssm.shape[2] == -(-case.l // T)
    expected, *_ = chunk_states(args, state, packing, dy, dssm)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)  # B, scaled X, H before the chunk, H
    for chunk in range(chunk_ssm.shape[2]):
        assert tolerances.rms_ratio(chunk_ssm[:, :, chunk], expected[:, :, chunk]) <= tolerance, chunk


@needs_new_jax
@pytest.mark.parametrize(("case", "segments", "packed"), CASES, ids=NAMES)
def test_state_gradients_match_those_by_hand(monkeypatch, case, segments, packed):
    args, state, packing, inputs, (dy, dssm) = _setup(monkeypatch, case, segments, packed)
    from tests.kernels.mosaic_interpreter import INTERPRET  # noqa: PLC0415 (only where its jax is)

    @jax.jit
    def run(inputs, dy):
        prepared, _ = scan.prepare(inputs)
        given = scan.operands(inputs)
        return state_gradients(
            in_chunks(dy), given.z, given.c, prepared, given.c_bias, dssm, segments=segments, interpret=INTERPRET
        )

    chunk_grad, first_grad = run(inputs, dy)
    jax.tree.map(np.testing.assert_array_equal, (chunk_grad, first_grad), run(inputs, dy))
    assert (chunk_grad.dtype, first_grad.dtype) == (jnp.bfloat16, jnp.float32)
    assert chunk_grad.shape[2] == -(-case.l // T)
    _, expected, _, expected_first = chunk_states(args, state, packing, dy, dssm)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)  # z's half and g, C, the result
    least = tolerances.FLOAT32_UNDERFLOW
    for chunk in range(chunk_grad.shape[2]):
        assert tolerances.rms_ratio(chunk_grad[:, :, chunk], expected[:, :, chunk], least) <= tolerance, chunk
    assert tolerances.rms_ratio(first_grad, expected_first, least) <= tolerance


@needs_new_jax
@pytest.mark.parametrize(("case", "segments", "packed"), [
    (dataclasses.replace(CASE, l=T + 9, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=3 * T, h=1), 3, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8, h=1), 2, True),
    (dataclasses.replace(CASE, l=1), 1, False),
    CASES[3],
    (dataclasses.replace(CASE, l=T + 9, norm=True), 2, False),
    (dataclasses.replace(CASE, l=T + 9, h=1, bare=True), 1, True),
    (dataclasses.replace(CASE, l=T + 9, h=1, n=50, s=7), 1, True),
], ids=["groups", "segments", "documents", "one_token", "strong_decay", "norm", "bare_documents",
        "narrow_documents"])  # fmt: skip
def test_gradients_match_reference(monkeypatch, case, segments, packed):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = arguments(case)
    options = {"segment_ids": documents(case)} if packed else {}
    actual = differentiated(implementation="mosaic", **options)(args, state)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(wide(v)), (args, state))
        expected = differentiated(implementation="reference", **options)(*exact)
    assert actual.keys() == expected.keys()
    # B, C, their products with x or g, H and G, sums of the rows of B's and C's gradients, the result
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)
    for name, value in actual.items():
        given = state._asdict()[name[8:]] if name.startswith("d state.") else args.get(name[2:], value)
        assert value.dtype == given.dtype and value.shape == expected[name].shape, name
        if not name.startswith("final."):
            # A decay whose terms float32 cannot tell from nothing counts as nothing.
            term = case.p * np.exp(case.log_dt[1]) * np.finfo(np.float32).eps
            least = term if name == "d a" else tolerances.FLOAT32_UNDERFLOW
            assert tolerances.rms_ratio(value, expected[name], least) <= tolerance, name


@needs_new_jax
def test_gradients_without_a_state(monkeypatch):
    """As a training step has it: no state comes in, and none is asked for."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, 2)
    case = dataclasses.replace(CASE, l=T + 9)
    args, _ = arguments(case)
    del args["b_bias"], args["d"]
    packing = documents(case)

    def loss(args, implementation):
        y = mamba3_scan(**args, segment_ids=packing, implementation=implementation)
        return jnp.sum(y * np.random.default_rng(7).normal(size=y.shape).astype(jnp.bfloat16).astype(y.dtype))

    actual = jax.jit(jax.grad(loss), static_argnums=1)(args, "mosaic")
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(wide(v)), args)
        expected = jax.jit(jax.grad(loss), static_argnums=1)(exact, "reference")
    for name, value in actual.items():
        assert tolerances.rms_ratio(value, expected[name]) <= tolerances.narrow_rms("bfloat16", roundings=6), name
