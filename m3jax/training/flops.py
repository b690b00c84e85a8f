"""Floating-point operations of a model, and what devices can do: the two sides of model FLOPs utilisation (MFU).

Counted are matrix products alone, two operations per multiply-add, the backward pass as twice the forward, whatever is
recomputed. The scan is counted in its chunked form with chunks of 64 rows (64/r positions of r ranks): per token, head
and rank, 2·64·n for the scores, 2·64·p for their product with x, 4·n·p for reading and updating the state; the gated
delta rule likewise, with its triangular system. Attention is counted without the half that causality leaves out.
"""

import jax

from m3jax.config import ModelConfig
from m3jax.models.mamba3 import projection_widths

CHUNK_ROWS = 64

# Dense bfloat16 peaks without sparsity, from the vendors' datasheets, in operations per second.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,  # v5e, which calls itself "TPU v5 lite"
    "TPU v4": 275e12,
}


def forward_flops_per_token(config: ModelConfig, length: int) -> dict[str, float]:
    """Operations of a forward pass per token of sequences of `length`, by part: projections, mixing, mlp, head."""
    d, pattern = config.d_model, config.mixer_pattern
    widths, mixing = zip(*(_MIXERS[name](config, length) for name in pattern), strict=True)
    periods = config.n_layers // len(pattern)
    return {
        "projections": 2.0 * periods * d * sum(widths),
        "mixing": float(periods * sum(mixing)),
        "mlp": 2.0 * config.n_layers * 3 * d * config.d_mlp,
        "head": 2.0 * d * config.padded_vocab_size,
    }


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of forward and backward per token of a training step on sequences of `length`."""
    return 3 * sum(forward_flops_per_token(config, length).values())


def _mamba3(m: ModelConfig, length: int) -> tuple[int, int]:
    """Width of all projections together, and operations of the scan per token; as of the others below."""
    return sum(projection_widths(m).values()) + m.d_inner, m.n_heads * m.mimo_rank * _scan(m)


def _mamba2(m: ModelConfig, length: int) -> tuple[int, int]:
    return 3 * m.d_inner + 2 * m.ngroups * m.d_state + m.n_heads, m.n_heads * _scan(m)


def _scan(m: ModelConfig) -> int:
    return 2 * CHUNK_ROWS * (m.d_state + m.headdim) + 4 * m.d_state * m.headdim


def _gated_deltanet(m: ModelConfig, length: int) -> tuple[int, int]:
    n, p = m.gdn_headdim, m.gdn_headdim * m.gdn_expand_v
    # Both kinds of scores, the triangular system (half of a square), scores times updates; the state three times.
    mixing = CHUNK_ROWS * (2 * 2 * n + (n + p) + 2 * p) + 6 * n * p
    return m.gdn_heads * (2 * n + 3 * p + 2), m.gdn_heads * mixing


def _attention(m: ModelConfig, length: int) -> tuple[int, int]:
    heads, d = m.attention_heads, m.attention_headdim
    return 2 * (heads + m.n_kv_heads) * d, 4 * heads * d * length // 2  # a token sees half of the others


_MIXERS = {"attention": _attention, "gated_deltanet": _gated_deltanet, "mamba2": _mamba2, "mamba3": _mamba3}


def device_peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 operations per second of a device; None when it is not known (a CPU)."""
    return next((peak for name, peak in _PEAKS.items() if name in device.device_kind), None)
