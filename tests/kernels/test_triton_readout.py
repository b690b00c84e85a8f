"""The Triton read-out, in Triton's interpreter, against the one that defines it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)

from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.readout import readout
from m3jax.kernels.mamba3.triton.readout import read_rows
from tests import tolerances
from tests.kernels import interpreter

EPSILON = 1e-5
LEAD, P = (2, 37, 3), 12  # b, l, h: no length a multiple of a tile or a chunk
OPTIONAL = ("z", "norm_weight", "mimo_z", "mimo_o")


def _arguments(rank: int, present: tuple[str, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    heads = LEAD[2]
    shapes = {"y": (*LEAD, rank, P), "z": (*LEAD, P), "norm_weight": (heads, P)}
    shapes |= {name: (heads, rank, P) for name in ("mimo_z", "mimo_o")}
    args = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: v for name, v in args.items() if name == "y" or name in present}


def _in_rows(y: jax.Array, span: int) -> jax.Array:
    """Row by row, as mosaic/mimo_pieces.py says; the last chunk's rest is not to be looked at."""
    batch, length, heads, rank, p = y.shape
    chunks = -(-length // span)
    rows = jnp.full((batch, heads, chunks, span * rank, p), jnp.nan)
    places = []
    for position in range(length):
        v, i = divmod(position % span, 8)
        for r in range(rank):
            pair, k = divmod(r, 2)
            places.append((position // span, pair * 2 * span + 16 * v + 8 * k + i, position, r))
    chunk, row, position, r = np.array(places).T
    return rows.at[:, :, chunk, row].set(jnp.moveaxis(y[:, position, :, r], 0, 2))


def _exact(y, z=None, norm_weight=None, mimo_z=None, mimo_o=None) -> jax.Array:
    def expanded(w):
        return None if w is None else w[None, None]

    norm = None if norm_weight is None else norm_weight[None, None, :, None]
    return readout(y, y, z, None, expanded(mimo_z), expanded(mimo_o), norm, EPSILON)


@pytest.mark.parametrize(("rank", "present", "span"), [
    (1, ("z", "norm_weight"), 0),
    (1, ("norm_weight",), 0),
    (4, OPTIONAL, 0),
    (4, OPTIONAL, 16),
    (2, ("mimo_o",), 32),
    (2, ("z", "norm_weight"), 32),
], ids=["siso", "no_gate", "mimo", "rows", "rank_2_bare", "rank_2_rows"])  # fmt: skip
def test_matches_the_definition(monkeypatch, rank, present, span):
    interpreter.use(monkeypatch)
    args = _arguments(rank, present)
    cotangent = np.random.default_rng(1).normal(size=(*LEAD, P)).astype(np.float32)

    def read(args):
        seq = Sequence(jnp.zeros((*LEAD, P)), None, None, None, None, None, None, args.get("z"))
        weights = Weights(**{name: args.get(name) for name in Weights._fields})
        return read_rows(_in_rows(args["y"], span) if span else args["y"], seq, weights, EPSILON, span)

    out, pullback = jax.vjp(read, jax.tree.map(jnp.asarray, args))
    actual = {"out": out} | pullback(jnp.asarray(cotangent))[0]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), args)
        out, pullback = jax.vjp(lambda args: _exact(**args), wide)
        expected = {"out": out} | pullback(jnp.asarray(cotangent, jnp.float64))[0]
    tolerance = tolerances.rounding("float32", LEAD[0] * LEAD[1] * P)
    for name, value in actual.items():
        tolerances.assert_close(value, expected[name], tolerance, name)
