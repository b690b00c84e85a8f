"""Synthetic tasks: state tracking and recall, drawn on the device, one family per file."""

import difflib

from m3jax.data.tasks.brackets import BRACKETS, BRACKETS_WITHOUT_TIMES, BRACKETS_WITHOUT_TIMES_UNEVEN
from m3jax.data.tasks.cycle_navigation import CYCLE_NAVIGATION
from m3jax.data.tasks.even_pairs import EVEN_PAIRS
from m3jax.data.tasks.modular_arithmetic import MODULAR_ARITHMETIC
from m3jax.data.tasks.mqar import MQAR, mqar
from m3jax.data.tasks.parity import PARITY
from m3jax.data.tasks.task import Task, TaskBatch, scaled_accuracy
from m3jax.data.tasks.word_problem import WORD_PROBLEMS, word_problem
from m3jax.errors import ConfigError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PARITY,
        MODULAR_ARITHMETIC,
        BRACKETS,
        BRACKETS_WITHOUT_TIMES,
        BRACKETS_WITHOUT_TIMES_UNEVEN,
        CYCLE_NAVIGATION,
        EVEN_PAIRS,
        *WORD_PROBLEMS,
        *MQAR,
    )
}


def get_task(name: str) -> Task:
    """Returns a task of the registry.

    Args:
      name: a key of `TASKS`.

    Returns:
      The task.

    Raises:
      ConfigError: there is none of that name; the message has the nearest one and the list.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"task '{name}': not known.{hint} There are: {', '.join(TASKS)}.")
    return TASKS[name]


__all__ = ["TASKS", "Task", "TaskBatch", "get_task", "mqar", "scaled_accuracy", "word_problem"]
