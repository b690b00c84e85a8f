"""Inputs of the widths that the Mosaic GPU kernels take."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.mosaic.pieces import N, P, S, T
from tests.kernels.cases import Case, make, make_state

CASE = Case(b=1, l=T, h=2, p=P, n=N, g=1, s=S, log_dt=(-6, -2), log_decay=(-2, 1))
# A step turns by up to ten turns.
LARGE_STEPS = dataclasses.replace(CASE, log_dt=(0, 3), log_decay=(-6, -4))
NARROW = ("x", "b", "c", "z")

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or int(os.environ.get("NPROC", "0")) < 16,
    reason="the interpreter needs jax 0.11, and NPROC=16 PJRT_NPROC=16 in the environment",
)


def arguments(case: Case, dtype=jnp.bfloat16):
    """(arguments by name, state) as a layer passes them."""
    args = {name: v for name, v in make(case, "float32").items() if not name.startswith("mimo")}
    args = {name: jnp.asarray(v, dtype if name in NARROW else v.dtype) for name, v in args.items()}
    state = jax.tree.map(jnp.asarray, make_state(case, "float32"))
    return args, state._replace(x=state.x.astype(dtype))


def split(args) -> tuple[Sequence, Weights]:
    return tuple(kind(**{name: args.get(name) for name in kind._fields}) for kind in (Sequence, Weights))


# Where documents begin, per row: first and last positions of chunks, several in one, documents of one token.
CUTS = [(T, T + 5, T + 6, T + 30, 2 * T - 1, 2 * T, 3 * T + 7), (1, 3 * T)]


def documents(case: Case) -> np.ndarray:
    """Numbers that go down, so that none but their changes count."""
    rows = [-np.searchsorted(CUTS[row % 2], np.arange(case.l), side="right") for row in range(case.b)]
    return np.stack(rows).astype(np.int32)
