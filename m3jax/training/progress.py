"""What a training run shows: a table of what it is about to do, then one live line, or plain lines in a log."""

import importlib.metadata
import math
import platform
import time
from typing import Any, Self

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

PyTree = Any

_SECONDS_BETWEEN_LINES = 0.1  # on a terminal, which is slower than a small model


class LiveLine:
    """The output of a program that runs for long. On a terminal its last line stays in place and is renewed.

    Only the first process shows anything.
    """

    def __init__(self):
        self._console = Console(highlight=False, soft_wrap=True, markup=False, quiet=jax.process_index() != 0)
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._shown = -math.inf

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def message(self, text: str) -> None:
        """Shows lines that stay."""
        self._console.print(text)

    def show(self, line: str, *, last: bool, logged: bool) -> None:
        """Renews the line.

        Args:
          line: its text.
          last: whether no other follows soon; those that follow too fast are left out.
          logged: whether this line is one for a log too.
        """
        if self._live is not None:
            now = time.monotonic()
            due = now - self._shown >= _SECONDS_BETWEEN_LINES or last
            self._shown = now if due else self._shown
            self._live.update(Text(line), refresh=due)
        elif logged:
            self._console.print(line)


class Progress(LiveLine):
    """The output of a training run: its line says where the run is."""

    def __init__(self, last_step: int):
        super().__init__()
        self._last_step = last_step

    def step(
        self, step: int, numbers: dict[str, float], memory: int, seconds_per_step: float | None, logged: bool
    ) -> None:
        """Shows where the run is.

        Args:
          step: the step that the numbers are of.
          numbers: loss, and tokens_per_second and mfu where known.
          memory: peak, in bytes.
          seconds_per_step: for the time left; None = unknown.
          logged: whether this step's line is one for a log too.
        """
        left = None if seconds_per_step is None else (self._last_step - step) * seconds_per_step
        line = format_line(step, self._last_step, numbers, memory, left)
        self.show(line, last=step == self._last_step, logged=logged)


def format_line(step: int, last_step: int, numbers: dict[str, float], memory: int, seconds_left: float | None) -> str:
    """Formats the line of numbers, as in `step 120/2000  loss 2.3456  15.2k tokens/s  MFU 31.0%  ...`."""
    parts = [f"step {step}/{last_step}", f"loss {numbers['loss']:.4f}"]
    if "tokens_per_second" in numbers:
        parts.append(f"{_short(numbers['tokens_per_second'])} tokens/s")
    if "mfu" in numbers:
        parts.append(f"MFU {numbers['mfu']:.1%}")
    parts.append(f"memory {memory / 2**30:.2f} GiB")
    if seconds_left is not None:
        parts.append(f"{format_seconds(seconds_left)} left")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """Formats a duration as 1:02:03, or 2:03 under an hour."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parameter_table(params: PyTree) -> str:
    """Formats name, shape, type and size of every parameter, and the total."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = [
        ("/".join(key.key for key in path), str(tuple(leaf.shape)), str(leaf.dtype), f"{leaf.size:,}")
        for path, leaf in leaves
    ]
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    rows = [("parameter", "shape", "type", "size"), *rows, ("total", "", "", f"{total:,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {kind:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, kind, size in rows
    )


def environment_lines() -> str:
    """Says which devices and versions a run uses."""
    devices = jax.devices()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint")]
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform}){hosts}\n"
        f"versions  Python {platform.python_version()}, {', '.join(versions)}"
    )


def _short(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"
