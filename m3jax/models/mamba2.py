"""The Mamba-2 mixer (arXiv 2405.21060, section 7): short convolution, scalar decay per head, norm after the gate.

Its recurrence is that of Mamba-3 with λ = 1, nothing rotated and rank 1, and runs on the same kernels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State, mamba3_step
from m3jax.models import short_conv
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import Normed, RMSNorm
from m3jax.models.scan_on_mesh import scan_on_mesh
from m3jax.models.step_size import dt_bias_init, log_decay_rate_init


class Mamba2State(NamedTuple):
    """What precedes a token."""

    conv: jax.Array  # [b, d_conv - 1, channels]
    scan: Mamba3State


class Mamba2Mixer(nn.Module):
    """Mamba-2; widths are `config.expand`, `headdim`, `d_state`, `ngroups`, `d_conv`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        u: jax.Array | Normed,
        segment_ids: jax.Array | None = None,
        state: Mamba2State | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, Mamba2State | None]:
        """Arguments and results as in mixers.py."""
        m = self.config
        heads, bc, lead = m.n_heads, m.ngroups * m.d_state, u.shape[:-1]
        accumulator = jnp.promote_types(m.dtype, jnp.float32)
        z, xbc, dt = Linear(m, (m.d_inner, m.d_inner + 2 * bc, heads), name="in_proj")(u)
        conv = short_conv.ShortConv(m, bias=True, name="conv")
        xbc, conv_state = conv(xbc, segment_ids, None if state is None else state.conv)
        x, b, c = jnp.split(xbc, [m.d_inner, m.d_inner + bc], axis=-1)

        dt_bias = self.param("dt_bias", dt_bias_init(m), (heads,), m.param_dtype)
        a_log = self.param("a_log", log_decay_rate_init(1.0, 16.0), (heads,), m.param_dtype)
        d = self.param("d", nn.initializers.ones, (heads,), m.param_dtype)
        ones = (1,) * len(lead)
        dt = jax.nn.softplus(dt.astype(accumulator) + dt_bias.astype(accumulator).reshape(*ones, heads))
        seq = {
            "x": x.reshape(*lead, heads, m.headdim),
            "dt": dt,
            "a": jnp.broadcast_to(-jnp.exp(a_log.astype(accumulator)).reshape(*ones, heads), dt.shape),
            "b": b.reshape(*lead, 1, m.ngroups, m.d_state),
            "c": c.reshape(*lead, 1, m.ngroups, m.d_state),
            "z": z.reshape(*lead, heads, m.headdim),
            "lam": jnp.ones_like(dt),
            "omega": jnp.zeros((*lead, 0), accumulator),
        }
        scan_state = None if state is None else state.scan
        if u.ndim == 2:
            y, scan_state = mamba3_step(**seq, d=d, state=scan_state, implementation=m.scan_implementation)
        else:
            y, scan_state = scan_on_mesh(m, seq | {"segment_ids": segment_ids}, {"d": d}, scan_state)
        y = RMSNorm(jnp.dtype(m.dtype), jnp.dtype(m.param_dtype), name="norm")(y.reshape(*lead, m.d_inner))
        (out,) = Linear(m, (m.d_model,), closing_gain(m), name="out_proj")(y, residual)
        return out, None if state is None else Mamba2State(conv_state, scan_state)


def initial_state(config: ModelConfig, batch: int, capacity: int) -> Mamba2State:
    """The zero state of one mixer for `batch` sequences; it needs no more room for more tokens."""
    del capacity
    scan = Mamba3State.zeros(batch, config.n_heads, config.headdim, config.d_state, 1, 0, config.dtype)
    channels = config.d_inner + 2 * config.ngroups * config.d_state
    conv = short_conv.initial_state(config, batch, channels)
    return Mamba2State(conv, scan.stored_in(config.state_dtype, config.state_dtype))
