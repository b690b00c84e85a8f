"""The MIMO scan in Mosaic GPU: where JAX can interpret it, its results; that it lowers for a GPU."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels import mamba3_scan
from m3jax.kernels.mamba3.inputs import Inputs, Sequence, Weights
from m3jax.kernels.mamba3.mosaic import mimo_forward
from m3jax.kernels.mamba3.mosaic.mimo_output import LATE
from m3jax.kernels.mamba3.mosaic.mimo_pieces import positions
from m3jax.kernels.mamba3.mosaic.pieces import COEFFICIENTS, N, P, S
from tests import tolerances
from tests.kernels.cases import Case
from tests.kernels.mosaic_cases import documents, mimo_arguments, needs_new_jax

T = positions(4)  # of a chunk at rank 4; at rank 2 twice as many
CASE = Case(b=1, l=T, h=2, p=P, n=N, g=1, s=S, r=4, log_dt=(-6, -2), log_decay=(-2, 1))


@needs_new_jax
@pytest.mark.parametrize(("case", "segments", "packed"), [
    (CASE, 1, False),
    (dataclasses.replace(CASE, b=2, l=2 * T + 8, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=5 * T + 1), 2, False),
    (dataclasses.replace(CASE, l=5 * T + 1, h=1), 3, False),
    (dataclasses.replace(CASE, l=1), 1, False),
    (dataclasses.replace(CASE, r=2, l=2 * T + 3), 2, False),
    (dataclasses.replace(CASE, l=2 * T + 2, log_dt=(0, 3), log_decay=(-6, -4)), 1, False),
    (dataclasses.replace(CASE, l=2 * T, log_dt=(1, 3), log_decay=(2, 6)), 2, False),
    (dataclasses.replace(CASE, b=2, l=4 * T + 8, h=1), 2, True),
    (dataclasses.replace(CASE, l=3 * T, h=1, r=2), 1, True),
    (dataclasses.replace(CASE, l=2 * T + 8, norm=True), 2, False),
    (dataclasses.replace(CASE, l=2 * T, h=1, r=2, bare=True), 1, False),
], ids=["one_chunk", "groups", "two_segments", "three_segments", "one_token", "rank_2", "large_steps", "strong_decay",
        "documents", "documents_rank_2", "norm", "bare_rank_2"])  # fmt: skip
def test_matches_reference(monkeypatch, case, segments, packed):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    args, state = mimo_arguments(case)
    options = {"segment_ids": documents(case) if packed else None, "return_state": True}

    @jax.jit
    def run(args, state):
        return mamba3_scan(**args, initial_state=state, implementation="mosaic", **options)

    (y, final), again = run(args, state), run(args, state)
    jax.tree.map(np.testing.assert_array_equal, (y, final), again)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, state))
        y_exact, exact = mamba3_scan(**wide[0], initial_state=wide[1], implementation="reference", **options)
    assert (y.dtype, final.ssm.dtype, final.x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)  # B, C and weights, X, H, the result
    assert tolerances.rms_ratio(y, y_exact) <= tolerance
    assert tolerances.rms_ratio(final.ssm, exact.ssm) <= tolerance
    turn = tolerances.rounding("float32", case.l) * max(1.0, math.exp(case.log_dt[1]) * math.pi)
    turn = max(turn, tolerances.phase_walk(1))
    tolerances.assert_phase_close(final.angle, exact.angle, turn, "angle")
    assert tolerances.rms_ratio(final.b, exact.b) <= turn
    np.testing.assert_array_equal(final.x, args["x"][:, -1])


@needs_new_jax
def test_without_a_state_or_weights_that_may_be_absent(monkeypatch):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, 2)
    args, _ = mimo_arguments(dataclasses.replace(CASE, l=T + 9, h=1, r=2))
    args = {name: args[name] for name in (*Sequence._fields, "mimo_x")}
    y = mamba3_scan(**args, implementation="mosaic")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), args)
        expected = mamba3_scan(**wide, implementation="reference")
    assert tolerances.rms_ratio(y, expected) <= tolerances.narrow_rms("bfloat16", roundings=6)


@needs_new_jax
@pytest.mark.parametrize("case", [
    dataclasses.replace(CASE, l=4 * T, h=4, g=2),
    dataclasses.replace(CASE, l=3 * T, r=2),
    dataclasses.replace(CASE, l=T + 1),
], ids=["groups", "rank_2", "rest"])  # fmt: skip
@pytest.mark.parametrize("segments", [1, 2])
def test_lowers_for_a_gpu(case, segments):
    """Without the Triton kernels, which run in an interpreter here."""
    b, h, span = case.b, case.h, positions(case.r)
    chunks = math.ceil(case.l / span)
    args = jax.eval_shape(lambda: mimo_arguments(case)[0])
    seq, weights = (kind(**{name: args[name] for name in kind._fields if name in args} | missing)
                    for kind, missing in ((Sequence, {}), (Weights, {"norm_weight": None})))  # fmt: skip
    shape = jax.ShapeDtypeStruct
    inputs = Inputs(seq, weights, shape((b, h, P, N), "f4"), shape((b, h, S), "f4"), None)
    prepared = mimo_forward.Prepared(
        shape((b, h, chunks, COEFFICIENTS, span), "f4"), shape((b, chunks * span, 2 * S), "bfloat16"),
        shape((b, h, chunks, S), "f4"), shape((b, h, chunks), "f4"),
    )  # fmt: skip
    run = jax.jit(functools.partial(mimo_forward.forward_in_segments, segments=segments))
    text = run.trace(inputs, prepared).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == segments  # the states of segments first, if there are several


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rows", [LATE, COEFFICIENTS])
def test_slots_of_copies_begin_at_multiples_of_128_bytes(ranks, rows):
    """Where coefficients of the next chunk arrive; the GPU stops at others, the interpreter takes any."""
    assert 4 * rows * positions(ranks) % 128 == 0
