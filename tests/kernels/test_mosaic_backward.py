"""The Mosaic GPU backward and what it is made of, in JAX's interpreter, against the sequential scan in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import Mamba3State, mamba3_scan
from m3jax.kernels.mamba3.ends import number_documents
from m3jax.kernels.mamba3.inputs import Inputs
from m3jax.kernels.mamba3.mosaic import scan
from m3jax.kernels.mamba3.mosaic.pieces import T
from m3jax.kernels.mamba3.mosaic.state_gradients import state_gradients
from tests import tolerances
from tests.kernels.cases import differentiated
from tests.kernels.mosaic_cases import CASE, arguments, documents, interpreted, split

SEQUENCE = ("x", "z", "b", "c", "dt", "a", "lam", "omega")
CASES = [
    (dataclasses.replace(CASE, b=2, l=2 * T + 9, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=5 * T), 3, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), 2, True),
    (dataclasses.replace(CASE, l=T + 1, log_dt=(1, 3), log_decay=(2, 6)), 1, False),
]
NAMES = ["groups", "segments", "documents", "strong_decay"]


def _inputs(args, state: Mamba3State, packing) -> Inputs:
    """As the scan makes them; the state's half step is left out."""
    document = None if packing is None else number_documents(jnp.asarray(packing))
    return Inputs(*split(args), state.ssm, state.angle, document)


def _rest(args, packing, start: int) -> dict:
    """Arguments of the scan from a token on, in float64."""
    wide = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in args.items()}
    wide |= {name: wide[name][:, start:] for name in SEQUENCE}
    return wide | {"segment_ids": None if packing is None else packing[:, start:]}


def _state(case, ssm, angle) -> Mamba3State:
    """One whose last token adds nothing more."""
    zeros = Mamba3State.zeros(case.b, case.h, case.p, case.n, 1, case.s, jnp.float64)
    return zeros._replace(ssm=ssm, angle=jnp.asarray(np.asarray(angle, np.float64)))


def _continues(packing, start: int) -> np.ndarray | bool:
    """Whether a token is of the same document as the one before it, [b, 1, 1, 1]."""
    return True if packing is None else (packing[:, start] == packing[:, start - 1])[:, None, None, None]


@interpreted
@pytest.mark.parametrize(("case", "segments", "packed"), CASES, ids=NAMES)
def test_states_match_reference(monkeypatch, case, segments, packed):
    """H before a chunk is the state that leaves the tokens before it, with the half step due to the last of them."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = arguments(case)
    packing = documents(case) if packed else None
    inputs = _inputs(args, state, packing)
    run = jax.jit(lambda v: scan.forward_in_segments(v, segments, True, mosaic_interpreter.INTERPRET))
    y, ssm, angle, prepared, chunk_ssm = run(inputs)
    plain = jax.jit(lambda v: scan.forward_in_segments(v, segments, interpret=mosaic_interpreter.INTERPRET))(inputs)
    jax.tree.map(np.testing.assert_array_equal, plain, (y, ssm, angle))
    assert chunk_ssm.dtype == jnp.bfloat16 and chunk_ssm.shape[2] == -(-case.l // T)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)  # B, scaled X, H before the chunk, H
    for chunk in range(chunk_ssm.shape[2]):
        start = chunk * T
        with jax.enable_x64(True):
            expected = np.asarray(state.ssm, np.float64)
            if chunk:
                before = _rest({k: v[:, :start] if k in SEQUENCE else v for k, v in args.items()}, packing, 0)
                before["segment_ids"] = None if packing is None else packing[:, :start]
                first = _state(case, jnp.asarray(expected), state.angle)
                _, left = mamba3_scan(**before, initial_state=first, implementation="reference", return_state=True)
                token = {k: np.asarray(args[k], np.float64)[:, start] for k in ("dt", "lam")}
                due = (1 - token["lam"]) * token["dt"]  # [b, h]
                half_step = np.asarray(left.x)[..., :, None] * np.asarray(left.b)[:, :, 0, None, :]
                # The decay of a document's first token, which lets nothing in, comes with that token.
                half_step = np.where(_continues(packing, start), due[..., None, None] * half_step, 0)
                expected = np.asarray(left.ssm) + half_step
                turned = np.asarray(prepared.starts[:, :, chunk], np.float64) - np.asarray(left.angle)
                expected = _turn(expected, turned)
        assert tolerances.rms_ratio(chunk_ssm[:, :, chunk], expected) <= tolerance


def _turn(v: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[b, h, p, n] by angles [b, h, s]."""
    s = angle.shape[-1]
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    real, imag = v[..., :s], v[..., s : 2 * s]
    return np.concatenate([real * cos - imag * sin, real * sin + imag * cos, v[..., 2 * s :]], axis=-1)


@interpreted
@pytest.mark.parametrize(("case", "segments", "packed"), CASES, ids=NAMES)
def test_state_gradients_match_reference(monkeypatch, case, segments, packed):
    """G after a chunk is the gradient of the rest of the sequence with respect to the state before it."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = arguments(case)
    packing = documents(case) if packed else None
    inputs = _inputs(args, state, packing)
    rng = np.random.default_rng(5)
    dy = jnp.asarray(rng.normal(size=args["x"].shape), jnp.bfloat16)
    dssm = jnp.asarray(rng.normal(size=state.ssm.shape), jnp.float32)
    prepared, _ = jax.jit(scan.prepare)(inputs)
    given = scan.operands(inputs)

    @jax.jit
    def run(dy):
        return state_gradients(
            scan.in_chunks(dy), given.z, given.c, prepared, given.c_bias, dssm, segments=segments,
            interpret=mosaic_interpreter.INTERPRET,
        )  # fmt: skip

    chunk_grad, first_grad = run(dy)
    jax.tree.map(np.testing.assert_array_equal, (chunk_grad, first_grad), run(dy))
    assert (chunk_grad.dtype, first_grad.dtype) == (jnp.bfloat16, jnp.float32)
    assert chunk_grad.shape[2] == -(-case.l // T)

    def exact(start: int) -> np.ndarray:
        if start >= case.l:
            return np.asarray(dssm, np.float64)
        angle = state.angle if start == 0 else prepared.starts[:, :, start // T]
        with jax.enable_x64(True):
            weight, last = (jnp.asarray(np.asarray(v, np.float64)) for v in (dy[:, start:], dssm))
            rest = _rest(args, packing, start)

            def loss(ssm):
                y, final = mamba3_scan(
                    **rest, initial_state=_state(case, ssm, angle), implementation="reference", return_state=True
                )
                return jnp.sum(y * weight) + jnp.sum(final.ssm * last)

            grad = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros(dssm.shape)))
        return grad if start == 0 else np.where(_continues(packing, start), grad, 0)

    tolerance = tolerances.narrow_rms("bfloat16", roundings=4)  # z's half and g, C, the result
    least = tolerances.FLOAT32_UNDERFLOW
    for chunk in range(chunk_grad.shape[2]):
        assert tolerances.rms_ratio(chunk_grad[:, :, chunk], exact((chunk + 1) * T), least) <= tolerance, chunk
    assert tolerances.rms_ratio(first_grad, exact(0), least) <= tolerance


@interpreted
@pytest.mark.parametrize(("case", "segments", "packed"), [
    (dataclasses.replace(CASE, l=T + 9, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=3 * T, h=1), 3, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8, h=1), 2, True),
    (dataclasses.replace(CASE, l=1), 1, False),
    CASES[-1],
], ids=["groups", "segments", "documents", "one_token", "strong_decay"])  # fmt: skip
def test_gradients_match_reference(monkeypatch, case, segments, packed):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = arguments(case)
    options = {"segment_ids": documents(case)} if packed else {}
    actual = differentiated(implementation="mosaic", **options)(args, state)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, state))
        expected = differentiated(implementation="reference", **options)(*wide)
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


@interpreted
def test_gradients_without_a_state(monkeypatch):
    """As a training step has it: no state comes in, and none is asked for."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, 2)
    case = dataclasses.replace(CASE, l=T + 9, h=1)
    args, _ = arguments(case)
    del args["b_bias"], args["d"]
    packing = documents(case)

    def loss(args, implementation):
        y = mamba3_scan(**args, segment_ids=packing, implementation=implementation)
        return jnp.sum(y * np.random.default_rng(7).normal(size=y.shape).astype(jnp.bfloat16).astype(y.dtype))

    actual = jax.jit(jax.grad(loss), static_argnums=1)(args, "mosaic")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), args)
        expected = jax.jit(jax.grad(loss), static_argnums=1)(wide, "reference")
    for name, value in actual.items():
        assert tolerances.rms_ratio(value, expected[name]) <= tolerances.narrow_rms("bfloat16", roundings=6), name
