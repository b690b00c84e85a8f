"""From a layer's projection of its input to the coefficients of the recurrence (Mamba-3, section 3; the released code).

A projection has, per token and in this order, z and x [h·p], B and C [r·g·n], the raw Δ, A and λ [h each] and the raw
angular rates [s]; letters as in `mamba3_scan`. Of these

    Δ = softplus(Δ_raw + dt_bias)    A = min(-act(A_raw), -a_floor)    λ = sigmoid(λ_raw)    ω = π tanh(ω_raw)

where act is `heavy_tail` or softplus, and B and C pass an RMSNorm over n, one weight for all ranks and groups.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..rms_norm import rms_norm
from .inputs import Sequence, accumulator_dtype
from .state import Mamba3State


def heavy_tail(x: jax.Array) -> jax.Array:
    """1 + x for x ≥ 0, 1/(1 - x) below: positive, with one continuous derivative and a slow left tail."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


A_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"heavy_tail": heavy_tail, "softplus": jax.nn.softplus}


class ProjectionWeights(NamedTuple):
    """Weights between projection and coefficients."""

    dt_bias: jax.Array  # [h]
    b_norm: jax.Array  # [n]
    c_norm: jax.Array  # [n]


class Rule(NamedTuple):
    """What else the coefficients depend on."""

    a_activation: str  # of A_ACTIVATIONS
    a_floor: float
    fixed_lambda: float | None  # λ of all tokens, for which the projection then has no columns


def mamba3_coefficients(
    z: jax.Array,
    x: jax.Array,
    rest: jax.Array,
    *,
    dt_bias: jax.Array,
    b_norm: jax.Array,
    c_norm: jax.Array,
    rank: int = 1,
    groups: int = 1,
    a_activation: str = "heavy_tail",
    a_floor: float = 1e-4,
    fixed_lambda: float | None = None,
    norm_eps: float = 1e-5,
) -> dict[str, jax.Array]:
    """The arguments that `mamba3_scan` and `mamba3_step` take of each token, by name, from its projection.

    Args:
      z: gate, [..., h·p].
      x: input, [..., h·p].
      rest: the columns after these, [..., 2·r·g·n + 3·h + s], or 2·h instead of 3·h where λ is fixed; s may be 0.
      dt_bias: added to the raw step size, [h].
      b_norm: weight of B's norm, [n].
      c_norm: weight of C's norm, [n].
      rank: r.
      groups: g.
      a_activation: "heavy_tail" (1 + v for v ≥ 0, 1/(1 - v) below) or "softplus".
      a_floor: least decay rate.
      fixed_lambda: the trapezoid weight of all tokens; None = the projection has it.
      norm_eps: epsilon of both norms.

    Returns:
      x, z, b and c in the dtype they come in; dt, a, lam and omega in float32, or float64 for float64.
    """
    heads, n, lead = dt_bias.shape[0], b_norm.shape[0], rest.shape[:-1]
    widths = (rank * groups * n, rank * groups * n, heads, heads, heads if fixed_lambda is None else 0)
    b, c, *raw = jnp.split(rest, list(itertools.accumulate(widths)), axis=-1)
    dt, a, lam, omega = (v.astype(accumulator_dtype(rest)) for v in raw)
    dt = jax.nn.softplus(dt + dt_bias.astype(dt.dtype).reshape((1,) * len(lead) + (-1,)))
    return {
        "x": x.reshape(*lead, heads, -1),
        "z": z.reshape(*lead, heads, -1),
        "b": rms_norm(b.reshape(*lead, rank, groups, n), b_norm, norm_eps, b.dtype),
        "c": rms_norm(c.reshape(*lead, rank, groups, n), c_norm, norm_eps, c.dtype),
        "dt": dt,
        "a": jnp.minimum(-A_ACTIVATIONS[a_activation](a), -a_floor),
        "lam": jax.nn.sigmoid(lam) if fixed_lambda is None else jnp.full_like(dt, fixed_lambda),
        "omega": math.pi * jnp.tanh(omega),
    }


def from_projection(
    projected: jax.Array, weights: ProjectionWeights, rule: Rule, state: Mamba3State, norm_eps: float
) -> Sequence:
    """A token's coefficients from its whole projection, [b, width]; sizes as in the state before it.

    Raises:
      ValueError: a shape that does not fit, or an unknown activation; names the argument.
    """
    groups = checked_groups(projected, weights, rule, state)
    inner = state.ssm.shape[1] * state.ssm.shape[2]
    z, x, rest = jnp.split(projected, [inner, 2 * inner], axis=-1)
    shared = weights._asdict() | rule._asdict() | {"rank": state.b.shape[2], "groups": groups, "norm_eps": norm_eps}
    return Sequence(**mamba3_coefficients(z, x, rest, **shared))


def checked_groups(projected: jax.Array, weights: ProjectionWeights, rule: Rule, state: Mamba3State) -> int:
    """The number of groups g that a projection [b, width] has; ValueError if shapes do not fit."""
    if projected.ndim != 2 or state.ssm.ndim != 4 or state.b.ndim != 4 or state.angle.ndim != 3:
        raise ValueError(
            "expected projected [b, width], state.angle [b, h, s], state.ssm [b, h, p, n] and state.b [b, h, r, n]; "
            f"got shapes {projected.shape}, {state.angle.shape}, {state.ssm.shape} and {state.b.shape}."
        )
    _, heads, p, n = state.ssm.shape
    for name, letter, size in (("dt_bias", "h", heads), ("b_norm", "n", n), ("c_norm", "n", n)):
        if (shape := getattr(weights, name).shape) != (size,):
            raise ValueError(f"{name} has shape {shape}; expected [{letter}] = {(size,)}.")
    if rule.a_activation not in A_ACTIVATIONS:
        raise ValueError(f"a_activation = {rule.a_activation!r}; expected one of {', '.join(A_ACTIVATIONS)}.")
    per_head, of_a_group = (3 if rule.fixed_lambda is None else 2), 2 * state.b.shape[2] * n
    least = heads * (2 * p + per_head) + state.angle.shape[-1]
    groups, left = divmod(projected.shape[-1] - least, of_a_group)
    if groups < 1 or left:
        raise ValueError(
            f"projected has shape {projected.shape}; expected [b, 2hp + {per_head}h + s + 2rgn], "
            f"which is {least} + {of_a_group}g for g groups."
        )
    return groups
