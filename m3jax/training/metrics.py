"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when the config asks for them."""

import importlib
import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from m3jax.config import Config, config_to_dict
from m3jax.errors import ConfigError

FILE = "metrics.jsonl"
_WANDB_ID = "wandb_run_id"


def check_writers(config: Config) -> None:
    """Raises ConfigError when a writer that the config asks for is not installed."""
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.train.wandb_project = {config.train.wandb_project!r}: wandb is not installed. "
            "Run pip install -e '.[wandb]', or set it to None."
        )


class MetricsWriter:
    """Writes records of numbers, each with its step. A resumed run continues the same files, with no step twice.

    Only the first process writes.
    """

    def __init__(self, workdir: Path, config: Config, step: int):
        """Opens the writers.

        Args:
          workdir: the run's directory.
          config: train.tensorboard and train.wandb_project choose the writers; the whole is shown by wandb.
          step: where the run starts or resumes; records beyond it, of steps that are taken again, are dropped.
        """
        self._first_process = jax.process_index() == 0
        self._path = workdir / FILE
        self._file = self._tensorboard = self._wandb = None
        if not self._first_process:
            return
        self.rewind(step)
        if config.train.tensorboard:
            self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if config.train.wandb_project:
            id_file = workdir / _WANDB_ID
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12])
            self._wandb = importlib.import_module("wandb").init(
                project=config.train.wandb_project,
                name=workdir.name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(workdir),
                config=config_to_dict(config),
            )

    def write(self, step: int, record: dict[str, float]) -> None:
        """Writes one record; the JSON line is in the file when this returns."""
        if not self._first_process:
            return
        self._file.write(json.dumps({"step": step} | record) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def rewind(self, step: int) -> None:
        """Drops the JSON lines beyond `step`, and a last line that a killed process left unfinished."""
        if not self._first_process:
            return
        self._close_file()
        if self._path.exists():
            lines = [json.dumps(record) + "\n" for record in read_metrics(self._path) if record["step"] <= step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(lines))
            temporary.rename(self._path)
        self._file = self._path.open("a")

    def close(self) -> None:
        """Ends the writers."""
        self._close_file()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, without a last line that is not finished."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
