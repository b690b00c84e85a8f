"""The gated delta rule: scan over a sequence, step for decoding."""

from .api import gated_delta_scan, gated_delta_step

__all__ = ["gated_delta_scan", "gated_delta_step"]
