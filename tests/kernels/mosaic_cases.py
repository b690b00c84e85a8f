"""Inputs of the widths that the Mosaic GPU kernels take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.kernels import Mamba3State
from m3jax.kernels.mamba3.inputs import Sequence, Weights
from m3jax.kernels.mamba3.mosaic.pieces import N, P, S, T
from tests.kernels.cases import Case, make, make_state

CASE = Case(b=1, l=T, h=2, p=P, n=N, g=1, s=S, log_dt=(-6, -2), log_decay=(-2, 1))
# A step turns by up to ten turns.
LARGE_STEPS = dataclasses.replace(CASE, log_dt=(0, 3), log_decay=(-6, -4))
NARROW = ("x", "b", "c", "z")

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need jax 0.11: make test-mosaic"
)


def mimo_arguments(case: Case, dtype=jnp.bfloat16):
    """(arguments by name, state) as a layer passes them."""
    args = {name: jnp.asarray(v, dtype if name in NARROW else v.dtype) for name, v in make(case, "float32").items()}
    state = jax.tree.map(jnp.asarray, make_state(case, "float32"))
    return args, state._replace(x=state.x.astype(dtype))


def arguments(case: Case, dtype=jnp.bfloat16):
    """The same at rank 1, which has no weights of ranks."""
    args, state = mimo_arguments(case, dtype)
    return {name: v for name, v in args.items() if not name.startswith("mimo")}, state


def split(args) -> tuple[Sequence, Weights]:
    return tuple(kind(**{name: args.get(name) for name in kind._fields}) for kind in (Sequence, Weights))


# Where documents begin, per row: first and last positions of chunks, several in one, documents of one token.
CUTS = [(T, T + 5, T + 6, T + 30, 2 * T - 1, 2 * T, 3 * T + 7), (1, 3 * T)]


def documents(case: Case) -> np.ndarray:
    """Numbers that go down, so that none but their changes count."""
    rows = [-np.searchsorted(CUTS[row % 2], np.arange(case.l), side="right") for row in range(case.b)]
    return np.stack(rows).astype(np.int32)


def wide(v) -> np.ndarray:
    return np.asarray(v, np.float64)


def _rotated(v: np.ndarray, angle: np.ndarray) -> np.ndarray:
    real, imag, rest = v[..., :S], v[..., S : 2 * S], v[..., 2 * S :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([real * cos - imag * sin, real * sin + imag * cos, rest], axis=-1)


def chunk_states(args, state: Mamba3State, packing, dy, dssm) -> tuple[np.ndarray, ...]:
    """H before every chunk, its gradient G after every chunk, H after the last and G before the first; token by token.

    In float64, from `state.ssm` as it is, the phase running on through documents as in the kernels.
    """
    x, z, dt, a, lam, omega = (wide(args[name]) for name in ("x", "z", "dt", "a", "lam", "omega"))
    length, heads = x.shape[1:3]
    angle = wide(state.angle)[:, None] + np.cumsum(dt[..., None] * omega[:, :, None], axis=1)
    b, c = (
        _rotated(np.repeat(v, heads // v.shape[2], axis=2) + wide(args[f"{name}_bias"])[:, 0], angle)
        for name, v in ((name, wide(args[name])[:, :, 0]) for name in "bc")
    )
    alpha, half_step = np.exp(dt * a), np.pad(((1 - lam) * dt)[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if packing is not None:
        begins = np.pad(packing[:, 1:] != packing[:, :-1], ((0, 0), (1, 0)))
        alpha = np.where(begins[..., None], 0, alpha)
        half_step = np.where(np.pad(begins[:, 1:], ((0, 0), (0, 1)))[..., None], 0, half_step)
    scale = lam * dt + half_step
    g = wide(dy) * z / (1 + np.exp(-z))
    ssm, grad = wide(state.ssm), wide(dssm)
    before, after = [], []
    for t in range(length):
        before += [ssm] if t % T == 0 else []
        ssm = alpha[:, t, :, None, None] * ssm + (scale[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
    for t in reversed(range(length)):
        after += [grad] if t == length - 1 or t % T == T - 1 else []
        grad = alpha[:, t, :, None, None] * (grad + g[:, t, ..., None] * c[:, t, :, None])
    return np.stack(before, axis=2), np.stack(after[::-1], axis=2), ssm, grad
