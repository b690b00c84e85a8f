"""SIGTERM and Ctrl-C as a request that the training loop honours at its next step boundary."""

import signal
import threading
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is only noted; a second Ctrl-C raises KeyboardInterrupt at once.

    Attributes:
      signal_name: "SIGTERM" or "SIGINT" once one arrived, else None.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pending(self, ask_others: bool) -> bool:
        """Says whether to stop now.

        Several processes must stop at the same step, so with more than one the answer is theirs together, and only
        when `ask_others` is true, for which all wait.
        """
        if jax.process_count() == 1:
            return self.signal_name is not None
        return ask_others and bool(multihost_utils.process_allgather(np.array(self.signal_name is not None)).any())

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
