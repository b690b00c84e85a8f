"""The Mosaic GPU scan: what it refuses, its coefficients, and where JAX can interpret it, its results."""

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
from m3jax.kernels.mamba3.mosaic import backward, scan
from m3jax.kernels.mamba3.mosaic.pieces import DECAY, OTHER, OWN, STEP_HIGH, STEP_LOW, TO_END, S, T
from m3jax.kernels.mamba3.mosaic.segment_states import count_forgotten, count_remembered
from tests import tolerances
from tests.kernels import interpreter
from tests.kernels.mosaic_cases import CASE, LARGE_STEPS, arguments, documents, needs_new_jax, split


def _scan(args, state, documents=None):
    return scan.scan(None, *split(args), state, documents, 1e-5)


def test_needs_a_new_jax_or_a_hopper_gpu():
    assert "jax 0.11" in scan.unsupported(*split(arguments(CASE)[0]), None) or jax.__version_info__ >= (0, 11)
    if jax.__version_info__ >= (0, 11):
        assert "Hopper" in scan.unsupported(*split(arguments(CASE)[0]), None)


@pytest.mark.parametrize(("change", "options", "reason"), [
    ({}, {}, None),
    ({"g": 2, "l": 1}, {}, None),
    ({"p": 32}, {}, "p = 32"),
    ({"n": 256}, {}, "n = 256"),
    ({"n": 50, "s": 7}, {}, None),
    ({"s": 64}, {}, "s = 64"),
    ({"s": 0}, {}, None),
    ({"r": 2}, {"chunk_size": T // 2}, None),
    ({"r": 4}, {"chunk_size": T // 4}, None),
    ({"r": 4}, {"chunk_size": T}, "chunk_size = 64"),
    ({"r": 8}, {}, "rank 8"),
    ({}, {"mimo": True}, "MIMO weights"),
    ({"bare": True}, {}, None),
    ({"norm": True}, {}, None),
    ({"omega_per_head": True}, {}, "omega"),
    ({}, {"chunk_size": 32}, "chunk_size = 32"),
    ({}, {"chunk_size": T}, None),
    ({}, {"dtype": jnp.float32}, "x has dtype float32"),
    ({"r": 2, "norm": True}, {}, None),
    ({"r": 4, "bare": True}, {}, None),
])  # fmt: skip
def test_refusals_name_the_reason(monkeypatch, change, options, reason):
    monkeypatch.setattr(scan, "_unsupported_here", lambda: None)
    args, _ = arguments(dataclasses.replace(CASE, **change), options.get("dtype", jnp.bfloat16))
    seq, weights = split(args)
    if options.get("mimo"):
        weights = weights._replace(mimo_o=jnp.ones((CASE.h, 1, CASE.p)))
    said = scan.unsupported(seq, weights, options.get("chunk_size"))
    assert (said is None) if reason is None else (reason in said), said


SHAPES = [(8, 2048, 64), (1, 16384, 64), (1, 2048, 64), (1, 1, 1), (1, 4100, 24)]


@pytest.mark.parametrize("positions", [T, T // 2, T // 4])
@pytest.mark.parametrize(("batch", "length", "heads"), SHAPES)
def test_segments_cover_the_sequence(batch, length, heads, positions):
    chunks, segments = math.ceil(length / positions), scan.choose_segments(batch, length, heads, positions)
    longest = math.ceil(chunks / segments)
    assert (segments - 1) * longest < chunks <= segments * longest
    assert batch * heads * segments <= 1.5 * scan._PROGRAMS or segments == 1


@pytest.mark.parametrize(("chunks", "segments", "heads", "groups", "cut"), [
    (32, 4, 64, 1, (4, 8, 2, 4)), (256, 4, 64, 8, (4, 64, 8, 4)), (26, 2, 2, 1, (2, 15, 3, 2)),
    (6, 6, 9, 3, (6, 1, 1, 1)), (5, 2, 1, 1, (2, 3, 1, 1)), (1, 1, 6, 3, (1, 1, 1, 2)),
])  # fmt: skip
def test_segments_are_whole_pieces(chunks, segments, heads, groups, cut):
    assert scan.choose_cut(chunks, segments, heads, groups) == cut


@pytest.mark.parametrize("decay", [0.1, 3.0, 30.0, 300.0])
def test_what_is_forgotten_is_left_out(decay):
    """All that is remembered is looked at by the first pass, and the second reads nothing that is not there."""
    pieces, span = 3, 20

    def end_of(piece):
        return (piece + 1) * span - 1

    ends = np.cumsum(-decay * np.random.default_rng(int(decay)).random((2, pieces * span)), axis=1, dtype=np.float32)
    totals = [jnp.asarray(v) for v in ends]
    for piece in range(pieces):
        last = end_of(piece)
        count = int(count_remembered(totals, span, lambda ref, k, last=last: ref[-1] - ref[last - k], simulated=True))
        needed = int(np.sum(ends[:, -1:] - ends[:, last - span + 1 : last + 1] > -48, axis=1).max())
        assert needed <= count <= min(span, needed + 2)
        if count == 0:
            for v in totals:
                assert int(count_forgotten(v, jnp.int32(pieces), pieces, end_of, simulated=True)) > piece
    for v, exact in zip(totals, ends, strict=True):
        found = int(count_forgotten(v, jnp.int32(pieces), pieces, end_of, simulated=True))
        assert found == np.sum(exact[-1] - exact[span - 1 :: span] < -47)
    assert int(count_forgotten(totals[0], jnp.int32(0), pieces, end_of, simulated=True)) == 0


@pytest.mark.parametrize(("batch", "length", "heads", "groups", "block"), [
    (8, 2048, 64, 1, 64), (1, 2048, 64, 1, 16), (1, 16384, 64, 8, 8), (1, 1, 6, 2, 1),
])  # fmt: skip
def test_blocks_of_heads_fill_the_gpu(batch, length, heads, groups, block):
    assert backward.choose_block(batch, length, heads, groups) == block


@pytest.mark.parametrize(("case", "packed"), [
    (dataclasses.replace(CASE, b=2, l=2 * T + 7, h=9), False),
    (dataclasses.replace(CASE, l=1), False),
    (dataclasses.replace(CASE, l=T - 1), False),
    (dataclasses.replace(CASE, l=67 * T, h=1), False),
    (LARGE_STEPS, False),
    (dataclasses.replace(CASE, l=2 * T, log_dt=(-4, 3), log_decay=(-8, 6)), False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), True),
], ids=["several_blocks", "one", "short", "many_chunks", "large_steps", "mixed_decay", "documents"])  # fmt: skip
def test_prepared_numbers(monkeypatch, case, packed):
    """Against float64; among them several blocks of heads, a rest of a chunk, more chunks than a tile of their sums."""
    interpreter.use(monkeypatch)
    monkeypatch.setattr(scan, "_CHUNKS", 64)
    args, state = arguments(case)
    document = documents(case) if packed else np.zeros((case.b, case.l), np.int32)
    inputs = Inputs(*split(args), state.ssm, state.angle, jnp.asarray(document) if packed else None)
    prepared, angle = jax.jit(scan.prepare)(inputs)
    coefs, rates, starts, totals = (np.asarray(v, np.float64) for v in prepared)
    padding = -case.l % T
    dt, a, lam, omega = (np.asarray(args[name], np.float64) for name in ("dt", "a", "lam", "omega"))

    def chunked(v):  # [b, l, h] → [b, h, chunks, T]
        v = np.pad(v, ((0, 0), (0, padding), (0, 0)))
        return np.moveaxis(v.reshape(case.b, -1, T, case.h), 3, 1)

    begins = document[:, 1:, None] != document[:, :-1, None]
    decay = np.maximum(dt * a * np.log2(np.e), -152)
    decay[:, 1:] = np.where(begins, -200, decay[:, 1:])
    decay = np.cumsum(chunked(decay), axis=-1)
    gamma = lam * dt
    scale = gamma + np.pad(np.where(begins, 0, ((1 - lam) * dt)[:, 1:]), ((0, 0), (0, 1), (0, 0)))
    largest = np.abs(decay).max()
    tolerance = tolerances.rounding("float32", T)
    tolerances.assert_close(coefs[..., DECAY, :], decay, tolerance, "decay")
    tolerances.assert_close(np.exp2(decay - coefs[..., OTHER, :]), chunked(scale), tolerance * max(1, largest), "s")
    tolerances.assert_close(np.exp2(coefs[..., OWN, :]), chunked(gamma), tolerance, "gamma")
    whole = tolerances.rounding("float32", case.l)
    tolerances.assert_close(totals, np.cumsum(decay[..., -1], axis=-1), whole, "totals")
    to_end = np.exp2(decay[..., -1:] - decay) * chunked(scale)
    tolerances.assert_close(coefs[..., TO_END, :], to_end, tolerance * max(1, largest), "to_end", scale=scale.max())
    high, low = coefs[..., STEP_HIGH, :], coefs[..., STEP_LOW, :]
    np.testing.assert_array_equal(high, np.asarray(jnp.asarray(high, jnp.bfloat16), np.float64))
    np.testing.assert_array_equal(high + low, chunked(dt))
    assert np.abs(low).max() <= 2.0**-8 * np.abs(high).max()
    tolerances.assert_close(rates[:, : case.l, :S] + rates[:, : case.l, S:], omega, 2.0**-16, "rates")
    assert not rates[:, case.l :].any()

    steps = np.pad(np.moveaxis(dt[..., None] * omega[:, :, None], 2, 1), ((0, 0), (0, 0), (0, padding), (0, 0)))
    steps = steps.reshape(case.b, case.h, -1, T, S).sum(axis=3)
    ends = np.asarray(state.angle, np.float64)[:, :, None] + np.cumsum(steps, axis=2)  # [b, h, chunks, S]
    # Products Δω are rounded relative to themselves.
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    tolerance = tolerances.rounding("float32", case.l) * largest_turn
    begins = np.concatenate([np.asarray(state.angle, np.float64)[:, :, None], ends[:, :, :-1]], axis=2)
    tolerances.assert_phase_close(starts, begins, tolerance, "starts")
    tolerances.assert_phase_close(angle, ends[:, :, -1], tolerance, "angle")
    assert np.abs(starts).max() <= np.pi * (1 + 2.0**-23)
    assert np.asarray(angle).min() >= 0 and np.asarray(angle).max() < 2 * np.pi


@needs_new_jax
@pytest.mark.parametrize(("case", "segments", "packed"), [
    (CASE, 1, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8, h=4, g=2), 1, False),
    (dataclasses.replace(CASE, l=5 * T + 1), 2, False),
    (dataclasses.replace(CASE, l=5 * T + 1), 3, False),
    (dataclasses.replace(CASE, l=3 * T, h=4), 3, False),
    (dataclasses.replace(CASE, l=3 * T, h=3, g=3), 2, False),
    (dataclasses.replace(CASE, l=1), 1, False),
    (dataclasses.replace(LARGE_STEPS, l=2 * T + 2), 1, False),
    (dataclasses.replace(CASE, l=2 * T, log_dt=(1, 3), log_decay=(2, 6)), 2, False),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), 1, True),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8), 3, True),
    (dataclasses.replace(CASE, b=2, l=3 * T + 8, h=1, log_decay=(-9, -8)), 1, True),
    (dataclasses.replace(CASE, l=2 * T + 1, norm=True), 2, False),
    (dataclasses.replace(CASE, l=T + 1, h=1, bare=True), 1, False),
    (dataclasses.replace(CASE, l=T + 9, h=1, s=0), 1, True),
], ids=["one_chunk", "groups", "two_segments", "three_segments", "four_heads_together",
        "heads_alone", "one_token", "large_steps", "strong_decay",
        "documents", "documents_segments", "documents_weak_decay", "norm", "bare",
        "no_rotation_documents"])  # fmt: skip
def test_matches_reference(monkeypatch, case, segments, packed):
    from tests.kernels import mosaic_interpreter  # noqa: PLC0415 (only where its jax is)

    mosaic_interpreter.use(monkeypatch, segments)
    monkeypatch.setattr(scan, "_LEAST", 1)  # pieces of one chunk
    args, state = arguments(case)
    packing = documents(case) if packed else None
    run = jax.jit(_scan)
    (y, final), again = run(args, state, packing), run(args, state, packing)
    jax.tree.map(np.testing.assert_array_equal, (y, final), again)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, state))
        y_exact, exact = mamba3_scan(
            **wide[0], initial_state=wide[1], segment_ids=packing, implementation="reference", return_state=True
        )
    assert (y.dtype, final.ssm.dtype, final.x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    tolerance = tolerances.narrow_rms("bfloat16", roundings=6)  # B, C and weights, X, H, the result
    assert tolerances.rms_ratio(y, y_exact) <= tolerance
    assert tolerances.rms_ratio(final.ssm, exact.ssm) <= tolerance
    largest_turn = max(1.0, float(np.exp(case.log_dt[1])) * np.pi)
    turn = max(tolerances.rounding("float32", case.l) * largest_turn, tolerances.phase_walk(1))
    tolerances.assert_phase_close(final.angle, exact.angle, turn, "angle")
    assert tolerances.rms_ratio(final.b, exact.b) <= turn
    np.testing.assert_array_equal(final.x, args["x"][:, -1])
