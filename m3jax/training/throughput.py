"""How fast a run goes: tokens per second, model FLOPs utilisation, seconds per step, memory."""

import resource
import sys
import time

import jax


class Throughput:
    """Measures from the last restart on; restart it after a pause that is not training."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        """Starts at once.

        Args:
          tokens_per_step: over all devices.
          flops_per_token: of forward and backward.
          peak_flops: of all devices together, per second; None = unknown, there is no MFU.
        """
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self.restart()

    def restart(self) -> None:
        """Forgets everything before now."""
        self._start, self._steps = time.perf_counter(), 0

    def count_step(self) -> None:
        """Notes that a step has finished."""
        self._steps += 1

    def seconds_per_step(self) -> float | None:
        """Returns the mean since the restart, None before the first step."""
        return (time.perf_counter() - self._start) / self._steps if self._steps else None

    def report(self) -> dict[str, float]:
        """Returns tokens_per_second and mfu (a share of 1), as far as they are known."""
        seconds = self.seconds_per_step()
        if seconds is None:
            return {}
        rate = self._tokens_per_step / seconds
        mfu = {"mfu": rate * self._flops_per_token / self._peak_flops} if self._peak_flops else {}
        return {"tokens_per_second": rate} | mfu


def peak_memory_bytes() -> int:
    """Returns the most memory used so far: of the first local device, or of this process where devices do not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
