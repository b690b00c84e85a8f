"""The Mosaic GPU kernel of all gradients but the state's, in JAX's interpreter, against the scan in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import Mamba3State, mamba3_scan
from m3jax.kernels.mamba3.cotangents import combine
from m3jax.kernels.mamba3.ends import number_documents
from m3jax.kernels.mamba3.inputs import Inputs, Sequence
from m3jax.kernels.mamba3.mosaic import backward, scan
from m3jax.kernels.mamba3.mosaic.gradients import gradients
from m3jax.kernels.mamba3.mosaic.pieces import S, T
from tests import tolerances
from tests.kernels.mosaic_cases import CASE, arguments, documents, interpreted, split

WEIGHTS = ("b_bias", "c_bias", "d")


def _wide(v) -> np.ndarray:
    return np.asarray(v, np.float64)


def _rotated(v: np.ndarray, angle: np.ndarray) -> np.ndarray:
    real, imag, rest = v[..., :S], v[..., S : 2 * S], v[..., 2 * S :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([real * cos - imag * sin, real * sin + imag * cos, rest], axis=-1)


def chunk_states(args, state: Mamba3State, packing, dy, dssm) -> tuple[np.ndarray, ...]:
    """H before every chunk, its gradient after every chunk, both at the end they do not include; token by token."""
    x, z, dt, a, lam, omega = (_wide(args[name]) for name in ("x", "z", "dt", "a", "lam", "omega"))
    length, heads = x.shape[1:3]
    angle = _wide(state.angle)[:, None] + np.cumsum(dt[..., None] * omega[:, :, None], axis=1)
    b, c = (
        _rotated(np.repeat(v, heads // v.shape[2], axis=2) + _wide(args[f"{name}_bias"])[:, 0], angle)
        for name, v in ((name, _wide(args[name])[:, :, 0]) for name in "bc")
    )
    alpha, half_step = np.exp(dt * a), np.pad(((1 - lam) * dt)[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if packing is not None:
        begins = np.pad(packing[:, 1:] != packing[:, :-1], ((0, 0), (1, 0)))
        alpha = np.where(begins[..., None], 0, alpha)
        half_step = np.where(np.pad(begins[:, 1:], ((0, 0), (0, 1)))[..., None], 0, half_step)
    scale = lam * dt + half_step
    g = _wide(dy) * z / (1 + np.exp(-z))
    ssm, grad = _wide(state.ssm), _wide(dssm)
    before, after = [], []
    for t in range(length):
        before += [ssm] if t % T == 0 else []
        ssm = alpha[:, t, :, None, None] * ssm + (scale[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
    for t in reversed(range(length)):
        after += [grad] if t == length - 1 or t % T == T - 1 else []
        grad = alpha[:, t, :, None, None] * (grad + g[:, t, ..., None] * c[:, t, :, None])
    return np.stack(before, axis=2), np.stack(after[::-1], axis=2), ssm, grad


def exact_gradients(args, state: Mamba3State, packing, dy, dssm) -> dict[str, np.ndarray]:
    """Of the sequential scan in float64, by argument, and of the first phase."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(_wide(v)), (args, state))

        @jax.jit
        def run(args, state):
            y, last = mamba3_scan(
                **args, initial_state=state, segment_ids=packing, implementation="reference", return_state=True
            )
            return y, last.ssm

        _, pullback = jax.vjp(run, *wide)
        of_args, of_state = pullback((jnp.asarray(_wide(dy)), jnp.asarray(_wide(dssm))))
        return jax.tree.map(np.asarray, of_args | {"phase": of_state.angle})


@interpreted
@pytest.mark.parametrize(("case", "block", "packed"), [
    (dataclasses.replace(CASE, h=1), 1, False),
    (dataclasses.replace(CASE, b=2, l=2 * T + 9, h=4, g=2), 2, False),
    (dataclasses.replace(CASE, l=3 * T, h=4), 4, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), 2, True),
    (dataclasses.replace(CASE, l=2 * T, log_decay=(2, 6)), 1, False),
], ids=["one_chunk", "groups", "four_heads", "documents", "strong_decay"])  # fmt: skip
def test_matches_reference(monkeypatch, case, block, packed):
    """With H and its gradient from float64; each gradient by name."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, 1)
    args, state = arguments(case)
    state = state._replace(b=jnp.zeros_like(state.b), x=jnp.zeros_like(state.x))
    packing = documents(case) if packed else None
    rng = np.random.default_rng(5)
    dy = jnp.asarray(rng.normal(size=args["x"].shape), jnp.bfloat16)
    # The phases of a document after the first count from elsewhere, and so does its last state.
    dssm = jnp.asarray(rng.normal(size=state.ssm.shape) * (not packed), jnp.float32)
    before, after, last, first_grad = chunk_states(args, state, packing, dy, dssm)
    document = None if packing is None else number_documents(jnp.asarray(packing))
    inputs = Inputs(*split(args), state.ssm, state.angle, document)
    narrow = [jnp.asarray(v, jnp.bfloat16) for v in (before, after)]

    @jax.jit
    def run(inputs, dy, chunk_ssm, chunk_grad, first_grad, ssm, dssm):
        prepared, _ = scan.prepare(inputs)
        x, z, b, c, b_bias, c_bias, d = scan.operands(inputs)
        found = gradients(
            x, z, scan.in_chunks(dy), b, c, prepared, b_bias, c_bias, d, chunk_ssm, chunk_grad,
            block=block, interpret=mosaic_interpreter.INTERPRET,
        )  # fmt: skip
        return combine(inputs, backward.parts(inputs, prepared, found, first_grad, ssm, dssm), T, None)

    given = (inputs, dy, *narrow, *(jnp.asarray(v, jnp.float32) for v in (first_grad, last)), dssm)
    actual = run(*given)
    again = run(*given)
    expected = exact_gradients(args, state, packing, dy, dssm)
    # B, C, weights or dS, H or G, the sums' parts, the result.
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)
    names = [(actual.seq, again.seq, name) for name in Sequence._fields]
    names += [(actual.weights, again.weights, name) for name in WEIGHTS] + [(actual, again, "phase")]
    for result, same, name in names:
        value = getattr(result, name)
        np.testing.assert_array_equal(value, getattr(same, name), name)
        assert tolerances.rms_ratio(value, expected[name]) <= tolerance, name
