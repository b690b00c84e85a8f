"""The Gated DeltaNet mixer (arXiv 2412.06464): short convolutions, keys of length 1, gated delta rule, gated norm."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.kernels import gated_delta_scan, gated_delta_step
from m3jax.models import short_conv
from m3jax.models.linear import Linear, closing_gain
from m3jax.models.norm import Normed, RMSNorm
from m3jax.models.own_rows import on_own_rows
from m3jax.models.step_size import dt_bias_init, log_decay_rate_init

_LEAST_SQUARE = 1e-6  # added to the squared length of a query or key before it is divided by its root


class GatedDeltaState(NamedTuple):
    """What precedes a token."""

    conv: jax.Array  # [b, d_conv - 1, channels of q, k and v]
    memory: jax.Array  # [b, h, p, n]


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet; widths are `config.gdn_*`. With gdn_negative_eigenvalues β reaches to 2 (arXiv 2411.12537)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        u: jax.Array | Normed,
        segment_ids: jax.Array | None = None,
        state: GatedDeltaState | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, GatedDeltaState | None]:
        """Arguments and results as in mixers.py."""
        m = self.config
        heads, n, p, lead = m.gdn_heads, m.gdn_headdim, m.gdn_headdim * m.gdn_expand_v, u.shape[:-1]
        accumulator = jnp.promote_types(m.dtype, jnp.float32)
        qkv, gate, beta, dt = Linear(m, (heads * (2 * n + p), heads * p, heads, heads), name="in_proj")(u)
        conv = short_conv.ShortConv(m, name="conv")
        qkv, conv_state = conv(qkv, segment_ids, None if state is None else state.conv)
        q, k, v = jnp.split(qkv, [heads * n, 2 * heads * n], axis=-1)
        q, k, v, gate = (t.reshape(*lead, heads, -1) for t in (q, k, v, gate))

        dt_bias = self.param("dt_bias", dt_bias_init(m), (heads,), m.param_dtype)
        a_log = self.param("a_log", log_decay_rate_init(1.0, 16.0), (heads,), m.param_dtype)
        dt_bias, a_log = (w.astype(accumulator).reshape((1,) * len(lead) + (heads,)) for w in (dt_bias, a_log))
        seq = {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": -jnp.exp(a_log) * jax.nn.softplus(dt.astype(accumulator) + dt_bias),
            "beta": jax.nn.sigmoid(beta.astype(accumulator)) * (2 if m.gdn_negative_eigenvalues else 1),
        }
        memory = None if state is None else state.memory
        # The kernels for GPUs are Triton's, as for a step of Mamba-3.
        implementation = "triton" if m.scan_implementation == "mosaic" else m.scan_implementation
        options = {"implementation": implementation, "unit_eps": _LEAST_SQUARE}
        if u.ndim == 2:
            o, memory = gated_delta_step(**seq, state=memory, **options)
        else:
            options |= {"chunk_size": m.chunk_size}

            def scan(rows: dict, _: None) -> jax.Array | tuple[jax.Array, jax.Array]:
                return gated_delta_scan(**rows, **options, return_state=state is not None)

            result = on_own_rows(scan, seq | {"segment_ids": segment_ids, "initial_state": memory}, None)
            o, memory = (result, None) if state is None else (result[0], result[1].astype(m.state_dtype))
        o = RMSNorm(jnp.dtype(m.dtype), jnp.dtype(m.param_dtype), name="norm")(o) * jax.nn.silu(gate)
        (out,) = Linear(m, (m.d_model,), closing_gain(m), name="out_proj")(o.reshape(*lead, heads * p), residual)
        return out, None if state is None else GatedDeltaState(conv_state, memory)


def initial_state(config: ModelConfig, batch: int, capacity: int) -> GatedDeltaState:
    """The zero state of one mixer for `batch` sequences; it needs no more room for more tokens."""
    del capacity
    heads, n, p = config.gdn_heads, config.gdn_headdim, config.gdn_headdim * config.gdn_expand_v
    conv = short_conv.initial_state(config, batch, heads * (2 * n + p))
    return GatedDeltaState(conv, jnp.zeros((batch, heads, p, n), config.state_dtype))
