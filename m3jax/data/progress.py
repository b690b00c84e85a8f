"""Progress of long preparations on stderr: a live bar in a terminal, now and then a plain line elsewhere."""

import time

import rich.progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A context manager that shows how many bytes of some work are done; short work shows nothing that stays."""

    def __init__(self, task: str, total: int | None):
        """Names the task; total is the bytes in all, None = not known."""
        self._task, self._total = task, total
        self._console = Console(stderr=True)
        columns = [
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
        ]
        self._bar = rich.progress.Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._id = self._bar.add_task(task, total=total)
        self._done, self._next_line = 0, time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        """Counts bytes as done."""
        self._done += n_bytes
        self._bar.advance(self._id, n_bytes)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            of = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            self._console.print(f"{self._task}: {self._done / 1e6:,.0f}{of} MB", markup=False, soft_wrap=True)
