"""The MIMO backward in Mosaic GPU: in JAX's interpreter against the scan in float64; and that it lowers for a GPU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Inputs
from m3jax.kernels.mamba3.mosaic import mimo_backward, mimo_forward, mimo_gradients, mimo_shares
from m3jax.kernels.mamba3.mosaic.mimo_pieces import positions
from m3jax.kernels.mamba3.mosaic.pieces import COEFFICIENTS, N, P, S
from tests import tolerances
from tests.kernels.cases import Case, differentiated
from tests.kernels.mosaic_cases import documents, mimo_arguments, needs_new_jax, split, wide

T = positions(4)  # of a chunk at rank 4; at rank 2 twice as many
CASE = Case(b=1, l=T, h=2, p=P, n=N, g=1, s=S, r=4, log_dt=(-6, -2), log_decay=(-2, 1))


@needs_new_jax
@pytest.mark.parametrize(("case", "programs", "segments", "packed"), [
    (dataclasses.replace(CASE, h=1), 1, 1, False),
    (dataclasses.replace(CASE, b=2, l=4 * T + 9, g=2), 3, 2, False),
    (dataclasses.replace(CASE, l=4 * T + 8, r=2), 2, 1, True),
    (dataclasses.replace(CASE, l=T, h=3, log_decay=(2, 6)), 3, 1, False),
    # Of four chunks of a segment, what follows counts for the next in three of one head, in two of the other.
    (dataclasses.replace(CASE, l=8 * T, log_dt=(-2.25, -0.75), log_decay=(1, 2)), 3, 2, False),
    (dataclasses.replace(CASE, l=T + 9, norm=True), 1, 2, False),
    (dataclasses.replace(CASE, l=2 * T + 8, r=2, bare=True), 3, 1, True),
], ids=[
    "one_chunk", "groups", "rank_2_documents", "strong_decay", "forgotten", "norm", "bare_rank_2_documents",
])  # fmt: skip
def test_matches_reference(monkeypatch, case, programs, segments, packed):
    """Each gradient by name, of everything that a scan returns."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    monkeypatch.setattr(mimo_shares, "PROGRAMS", programs)
    args, state = mimo_arguments(case)
    options = {"segment_ids": documents(case)} if packed else {}
    run = differentiated(implementation="mosaic", **options)
    actual = run(args, state)
    jax.tree.map(np.testing.assert_array_equal, actual, run(args, state))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(wide(v)), (args, state))
        expected = differentiated(implementation="reference", **options)(*exact)
    assert actual.keys() == expected.keys()
    # B, C, weights or dS, H or G, X or g, the sums' parts, the result.
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)
    errors = {}
    for name, value in actual.items():
        given = state._asdict()[name[8:]] if name.startswith("d state.") else args.get(name[2:], value)
        assert value.dtype == given.dtype and value.shape == expected[name].shape, name
        if not name.startswith("final."):
            errors[name] = tolerances.rms_ratio(value, expected[name], tolerances.FLOAT32_UNDERFLOW)
    assert max(errors.values()) <= tolerance, errors


@needs_new_jax
def test_without_a_state_or_weights_that_may_be_absent(monkeypatch):
    """As a training step has it: no state comes in, and none is asked for."""
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, 1)
    args, _ = mimo_arguments(dataclasses.replace(CASE, l=T - 2, r=2))
    args = {name: v for name, v in args.items() if name not in ("b_bias", "d", "mimo_z")}

    def loss(args, implementation):
        y = mamba3_scan(**args, implementation=implementation)
        return jnp.sum(y * np.random.default_rng(7).normal(size=y.shape).astype(jnp.bfloat16).astype(y.dtype))

    actual = jax.jit(jax.grad(loss), static_argnums=1)(args, "mosaic")
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(wide(v)), args)
        expected = jax.jit(jax.grad(loss), static_argnums=1)(exact, "reference")
    for name, value in actual.items():
        assert tolerances.rms_ratio(value, expected[name]) <= tolerances.narrow_rms("bfloat16", roundings=6), name


@needs_new_jax
@pytest.mark.parametrize(("case", "segments"), [
    (dataclasses.replace(CASE, l=4 * T, h=4, g=2), 2), (dataclasses.replace(CASE, l=3 * T, r=2), 1),
], ids=["groups", "rank_2"])  # fmt: skip
def test_lowers_for_a_gpu(case, segments):
    """Without the Triton kernels, which run in an interpreter here."""
    b, h, span = case.b, case.h, positions(case.r)
    chunks = math.ceil(case.l / span)
    args = jax.eval_shape(lambda: mimo_arguments(case)[0])
    seq, weights = split(args)
    shape = jax.ShapeDtypeStruct
    inputs = Inputs(seq, weights, None, shape((b, h, S), "f4"), None)
    prepared = mimo_forward.Prepared(
        shape((b, h, chunks, COEFFICIENTS, span), "f4"), shape((b, chunks * span, 2 * S), "bfloat16"),
        shape((b, h, chunks, S), "f4"), shape((b, h, chunks), "f4"),
    )  # fmt: skip

    @jax.jit
    def run(inputs, prepared, dy, dssm):
        _, _, chunk_ssm = mimo_forward.forward_in_segments(inputs, prepared, segments, save=True)
        return mimo_backward.kernels(mimo_forward.operands(inputs), prepared, chunk_ssm, dy, dssm, segments=segments)

    dssm = shape((b, h, P, N), "f4")
    text = run.trace(inputs, prepared, seq.x, dssm).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2 * segments + 1  # states of segments and sequences, both ways


@pytest.mark.parametrize("registers", [mimo_gradients.REGISTERS, 2 * mimo_forward.REGISTERS], ids=["back", "forward"])
def test_warpgroups_share_the_registers_of_a_launch(registers):
    """One that asks for more than the others leave waits for ever, which no compiler and no interpreter reports."""
    of_launch = 2**16 // (128 * len(registers)) // 8 * 8  # of a thread, as the assembler counts them
    assert sum(registers) <= len(registers) * of_launch
    assert all(count % 8 == 0 for count in registers)
