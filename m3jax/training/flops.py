"""Floating-point operations of a model, and what devices can do: the two sides of model FLOPs utilisation (MFU).

Counted are matrix products alone, two operations per multiply-add, the backward pass as twice the forward, whatever is
recomputed. The scan is counted in its chunked form with chunks of 64 rows (64/r positions of r ranks): per token, head
and rank, 2·64·n for the scores, 2·64·p for their product with x, 4·n·p for reading and updating the state.
"""

import jax

from m3jax.config import ModelConfig

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


def forward_flops_per_token(config: ModelConfig) -> dict[str, float]:
    """Operations of a forward pass per token, by part: projections, scan, mlp, head."""
    d, inner, heads, rank, n = config.d_model, config.d_inner, config.n_heads, config.mimo_rank, config.d_state
    projection = 2 * inner + 2 * rank * config.ngroups * n + 3 * heads + config.n_angles
    scan = heads * rank * (2 * CHUNK_ROWS * (n + config.headdim) + 4 * n * config.headdim)
    return {
        "projections": 2.0 * config.n_layers * d * (projection + inner),
        "scan": float(config.n_layers * scan),
        "mlp": 2.0 * config.n_layers * 3 * d * config.d_mlp,
        "head": 2.0 * d * config.padded_vocab_size,
    }


def flops_per_token(config: ModelConfig) -> float:
    """Operations of forward and backward per token of a training step."""
    return 3 * sum(forward_flops_per_token(config).values())


def device_peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 operations per second of a device; None when it is not known (a CPU)."""
    return next((peak for name, peak in _PEAKS.items() if name in device.device_kind), None)
