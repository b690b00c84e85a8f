"""The Mamba-3 mixer: from the residual stream to the scan's coefficients and back.

One projection of the input gives, per token, z and x [h·p], B and C [r·g·n], and the raw step size, decay, trapezoid
weight [h each] and angular rates [s]; what becomes of them is `mamba3_coefficients`. Conventions follow the released
checkpoints (docs/mamba3.md), except that B and C rotate in pairs (i, s + i), which import and export account for.
Ablations leave out the columns they have no use for.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State, mamba3_coefficients, mamba3_projected_step, mamba3_step
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import EPSILON, Normed, Scale
from m3jax.models.rotary import standard_rates
from m3jax.models.scan_on_mesh import scan_on_mesh
from m3jax.models.step_size import dt_bias_init

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
        self,
        u: jax.Array | Normed,
        segment_ids: jax.Array | None = None,
        state: Mamba3State | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, Mamba3State | None]:
        """Runs over a sequence, or one decode step.

        Args:
          u: [b, l, d_model], or [b, d_model] for a step.
          segment_ids: [b, l]; the state restarts where they change. Not used by a step.
          state: the state before the first token; None = zero, and no state is returned.
          residual: of u's shape; the output is added to it.

        Returns:
          (output of u's shape, next state or None).
        """
        m = self.config
        own, weights = self._projection_weights(), self._weights()
        options = {"implementation": m.scan_implementation, "norm_eps": EPSILON}
        if u.ndim == 2 and m.rotation == "data":
            (projected,) = Linear(m, (sum(projection_widths(m).values()),), name="in_proj")(u)
            y, state = mamba3_projected_step(projected, state, **own, **weights, **options)
        elif u.ndim == 2:
            y, state = mamba3_step(**self._coefficients(u, own), state=state, **weights, **options)
        else:
            seq = self._coefficients(u, own) | {"segment_ids": segment_ids}
            y, state = scan_on_mesh(m, seq, weights, state, norm_eps=EPSILON)
        y = y.reshape(*u.shape[:-1], m.d_inner)
        (out,) = Linear(m, (m.d_model,), closing_gain(m), name="out_proj")(y, residual)
        return out, state

    def _coefficients(self, u: jax.Array | Normed, own: dict) -> dict[str, jax.Array]:
        m = self.config
        z_width, x_width, *widths = projection_widths(m).values()
        z, x, rest = Linear(m, (z_width, x_width, sum(widths)), apart=True, name="in_proj")(u)
        seq = mamba3_coefficients(z, x, rest, **own, rank=m.mimo_rank, groups=m.ngroups, norm_eps=EPSILON)
        if m.rotation == "standard":
            seq["dt"], seq["omega"] = _standard_rotation(seq["dt"], m.n_angles)
        return seq

    def _projection_weights(self) -> dict[str, jax.Array | str | float | None]:
        m = self.config
        return {
            "dt_bias": self.param("dt_bias", dt_bias_init(m), (m.n_heads,), m.param_dtype),
            "b_norm": Scale(m.param_dtype, name="b_norm")(m.d_state),
            "c_norm": Scale(m.param_dtype, name="c_norm")(m.d_state),
            "a_activation": m.a_activation,
            "a_floor": m.a_floor,
            "fixed_lambda": m.fixed_lambda,
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
    return state.stored_in(config.state_dtype, config.state_dtype)
