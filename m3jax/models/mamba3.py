"""The Mamba-3 mixer: from the residual stream to the scan's coefficients and back.

One projection of the input gives, per token, z and x [h·p], B and C [r·g·n], and the raw step size, decay, trapezoid
weight [h each] and angular rates [s]. Conventions follow the released checkpoints (docs/mamba3.md), except that B and C
rotate in pairs (i, s + i), which import and export account for. Ablations leave out the columns they have no use for.
"""

import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State, mamba3_scan, mamba3_step
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import EPSILON, RMSNorm
from m3jax.models.own_rows import on_own_rows
from m3jax.models.rotary import standard_rates
from m3jax.models.step_size import dt_bias_init


def heavy_tail(x: jax.Array) -> jax.Array:
    """1 + x for x ≥ 0, 1/(1 - x) below: positive, with one continuous derivative and a slow left tail."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


A_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"heavy_tail": heavy_tail, "softplus": jax.nn.softplus}


_ROPE_BASE = 10_000.0
_LEAST_DT = 1e-15  # of which the inverse square is still a float32


def projection_widths(config: ModelConfig) -> dict[str, int]:
    """Columns of the projection into the mixer, by what they become, in their order."""
    m = config
    bc = m.mimo_rank * m.ngroups * m.d_state
    widths = {"z": m.d_inner, "x": m.d_inner, "b": bc, "c": bc, "dt": m.n_heads, "a": m.n_heads}
    widths["lam"] = m.n_heads if m.fixed_lambda is None else 0
    widths["omega"] = m.n_angles if m.rotation == "data" else 0
    return widths


class Mamba3Mixer(nn.Module):
    """Mamba-3 (arXiv 2603.15569, section 3), SISO for mimo_rank 1, else MIMO."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, u: jax.Array, segment_ids: jax.Array | None = None, state: Mamba3State | None = None
    ) -> tuple[jax.Array, Mamba3State | None]:
        """Runs over a sequence, or one decode step.

        Args:
          u: [b, l, d_model], or [b, d_model] for a step.
          segment_ids: [b, l]; the state restarts where they change. Not used by a step.
          state: the state before the first token; None = zero, and no state is returned.

        Returns:
          (output of u's shape, next state or None).
        """
        m = self.config
        seq, weights = self._coefficients(u), self._weights()
        options = {"implementation": m.scan_implementation, "norm_eps": EPSILON}
        if u.ndim == 2:
            y, state = mamba3_step(**seq, state=state, **weights, **options)
        else:
            options |= {"chunk_size": m.chunk_size, "return_state": state is not None}

            def scan(rows: dict, shared: dict) -> jax.Array | tuple[jax.Array, Mamba3State]:
                return mamba3_scan(**rows, **shared, **options)

            result = on_own_rows(scan, seq | {"segment_ids": segment_ids, "initial_state": state}, weights)
            if state is None:
                y = result
            else:
                y, state = result
                state = state._replace(ssm=state.ssm.astype(m.state_dtype))
        y = y.reshape(*u.shape[:-1], m.d_inner)
        (out,) = Linear(m, (m.d_model,), closing_gain(m), name="out_proj")(y)
        return out, state

    def _coefficients(self, u: jax.Array) -> dict[str, jax.Array]:
        m = self.config
        z_width, x_width, *widths = projection_widths(m).values()
        z, x, rest = Linear(m, (z_width, x_width, sum(widths)), name="in_proj")(u)
        b, c, *raw = jnp.split(rest, list(itertools.accumulate(widths))[:-1], axis=-1)

        heads, lead = m.n_heads, u.shape[:-1]
        accumulator = jnp.promote_types(m.dtype, jnp.float32)
        dt, a, lam, omega = (v.astype(accumulator) for v in raw)
        dt_bias = self.param("dt_bias", dt_bias_init(m), (heads,), m.param_dtype).astype(accumulator)
        dt = jax.nn.softplus(dt + dt_bias.reshape((1,) * len(lead) + (-1,)))
        if m.rotation == "standard":
            dt, omega = _standard_rotation(dt, m.n_angles)
        else:
            omega = math.pi * jnp.tanh(omega)
        norm = {"dtype": m.dtype, "param_dtype": m.param_dtype}
        return {
            "x": x.reshape(*lead, heads, m.headdim),
            "z": z.reshape(*lead, heads, m.headdim),
            "b": RMSNorm(**norm, name="b_norm")(b.reshape(*lead, m.mimo_rank, m.ngroups, m.d_state)),
            "c": RMSNorm(**norm, name="c_norm")(c.reshape(*lead, m.mimo_rank, m.ngroups, m.d_state)),
            "dt": dt,
            "a": jnp.minimum(-A_ACTIVATIONS[m.a_activation](a), -m.a_floor),
            "lam": jax.nn.sigmoid(lam) if m.fixed_lambda is None else jnp.full_like(dt, m.fixed_lambda),
            "omega": omega,
        }

    def _weights(self) -> dict[str, jax.Array]:
        m = self.config
        per_head = {"b_bias": (m.d_state, 1.0), "c_bias": (m.d_state, 1.0)} if m.bc_bias else {}
        if m.mimo_rank > 1:
            per_head |= {"mimo_x": (m.headdim, 1 / m.mimo_rank), "mimo_z": (m.headdim, 1.0)}
            per_head |= {"mimo_o": (m.headdim, 1 / m.mimo_rank)}
        weights = {
            name: self.param(name, nn.initializers.constant(value), (m.n_heads, m.mimo_rank, width), m.param_dtype)
            for name, (width, value) in per_head.items()
        }
        weights["d"] = self.param("d", nn.initializers.ones, (m.n_heads,), m.param_dtype)
        if m.outproj_norm:
            shape = (m.n_heads, m.headdim)
            weights["norm_weight"] = self.param("norm_scale", nn.initializers.ones, shape, m.param_dtype)
        return weights


def _standard_rotation(dt: jax.Array, angles: int) -> tuple[jax.Array, jax.Array]:
    """Δ [..., h] and ω [..., h, s] of which every product, the step of a phase, is the fixed rate of its angle.

    The derivatives that Δ gets from that product and from ω cancel, so that a phase says nothing to Δ.
    """
    dt = jnp.maximum(dt, _LEAST_DT)
    rates = standard_rates(angles, _ROPE_BASE).astype(dt.dtype).reshape((1,) * dt.ndim + (-1,))
    return dt, rates / dt[..., None]


def initial_state(config: ModelConfig, batch: int, capacity: int) -> Mamba3State:
    """The zero state of one mixer for `batch` sequences; it needs no more room for more tokens."""
    del capacity
    state = Mamba3State.zeros(
        batch, config.n_heads, config.headdim, config.d_state, config.mimo_rank, config.n_angles, config.dtype
    )
    return state._replace(ssm=state.ssm.astype(config.state_dtype))
