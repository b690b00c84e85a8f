"""The Mosaic GPU kernel of all gradients but the state's, in JAX's interpreter, against the scan in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import Mamba3State, mamba3_scan
from m3jax.kernels.documents import number_documents
from m3jax.kernels.mamba3.inputs import Inputs, Sequence
from m3jax.kernels.mamba3.mosaic import backward, scan
from m3jax.kernels.mamba3.mosaic.forward import in_chunks
from m3jax.kernels.mamba3.mosaic.gradients import gradients
from m3jax.kernels.mamba3.mosaic.pieces import T
from tests import tolerances
from tests.kernels.mosaic_cases import CASE, arguments, chunk_states, documents, needs_new_jax, split, wide

WEIGHTS = ("b_bias", "c_bias", "d")


def exact_gradients(args, state: Mamba3State, packing, dy, dssm) -> dict[str, np.ndarray]:
    """Of the sequential scan in float64, by argument, and of the first phase."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(wide(v)), (args, state))

        @jax.jit
        def run(args, state):
            y, last = mamba3_scan(
                **args, initial_state=state, segment_ids=packing, implementation="reference", return_state=True
            )
            return y, last.ssm

        _, pullback = jax.vjp(run, *exact)
        of_args, of_state = pullback((jnp.asarray(wide(dy)), jnp.asarray(wide(dssm))))
        return jax.tree.map(np.asarray, of_args | {"phase": of_state.angle})


@needs_new_jax
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
            x, z, in_chunks(dy), b, c, prepared, b_bias, c_bias, d, chunk_ssm, chunk_grad,
            block=block, interpret=mosaic_interpreter.INTERPRET,
        )  # fmt: skip
        return backward.combine(inputs, found, first_grad, ssm, dssm, jnp.zeros_like(inputs.phase))

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
