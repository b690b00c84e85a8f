"""A scan whose sequence is divided over devices, against the whole one in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from m3jax.kernels import mamba3_scan
from tests import tolerances
from tests.kernels.cases import Case, differentiated, make, make_state

SISO = Case(l=24)
MIMO = Case(l=24, r=4, g=1, norm=True, omega_per_head=True)
IN_PIECES = ("x", "dt", "a", "b", "c", "lam", "omega", "z", "segment_ids")


def _on_devices(count: int):
    """mamba3_scan by so many devices."""
    mesh = jax.make_mesh((count,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:count])

    def scan(initial_state, **args):
        options = {name: args.pop(name) for name in ("implementation", "chunk_size", "return_state") if name in args}
        pieces = {name: P(None, "sequence") if name in IN_PIECES else P() for name in args}

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(pieces, P()), out_specs=(P(None, "sequence"), P()), check_vma=False
        )
        def on_one(args, state):
            return mamba3_scan(**args, **options, initial_state=state, sequence_axis="sequence")

        return on_one(args, initial_state)

    return scan


def _compare(case: Case, dtype: str, segment_ids=None, implementation: str = "xla", devices: int = 4):
    given = {} if segment_ids is None else {"segment_ids": segment_ids}
    expected = differentiated(implementation="reference", **given)(make(case), make_state(case))
    actual = differentiated(_on_devices(devices), implementation=implementation, **given)(
        make(case, dtype), make_state(case, dtype)
    )
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if name == "final.angle":
            tolerances.assert_phase_close(value, expected[name], tolerances.rounding(dtype, case.l), name)
        else:
            tolerances.assert_close(value, expected[name], tolerances.rounding(dtype, case.n * case.r * case.l), name)


@pytest.mark.parametrize("case", [SISO, MIMO, dataclasses.replace(SISO, bare=True)], ids=["siso", "mimo", "bare"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matches_the_whole_scan(case, dtype, x64):
    _compare(case, dtype)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_documents(implementation, x64):
    """In pieces of 6: one that ends with a piece, two in one piece, one over three pieces, an id that comes again."""
    ids = np.array([[5] * 6 + [6] * 2 + [7] * 2 + [8] * 14, [3] * 4 + [4] * 14 + [3] * 6])
    _compare(SISO, "float64", jnp.asarray(ids), implementation)


def test_axis_that_is_not_there():
    with pytest.raises(ValueError, match=r"sequence_axis = 'sequence'; expected a mesh axis of the jax\.shard_map"):
        mamba3_scan(**make(SISO, "float32"), sequence_axis="sequence")


def test_pieces_of_one_token(x64):
    _compare(dataclasses.replace(MIMO, l=8), "float64", devices=8)
