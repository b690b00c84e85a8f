"""Checkpoints: saved in the background, finished by a manifest of hashes, verified on load. Only this file knows orbax.

A workdir's `checkpoints/STEP/` holds orbax' folders params/, opt_state/ and ema/ (if there is one), RUN_FILE (step,
config, tokenizer, position in the data) and the manifest. What may be read and when is in docs/training.md.
"""

import base64
import json
import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from m3jax.config import CheckpointConfig, Config, build_config, config_to_dict, override
from m3jax.data.atomic import build_new
from m3jax.data.tokenizer import Tokenizer, load_tokenizer
from m3jax.errors import CheckpointError, ConfigError
from m3jax.models.language_model import LanguageModel
from m3jax.training import manifest
from m3jax.training.step import TrainState, init_params

PyTree = Any

FOLDER = "checkpoints"
RUN_FILE = "run.json"
_FORMAT = 1
_METADATA = "_CHECKPOINT_METADATA"  # orbax' list of its folders
_TEMPORARY = "*.orbax-checkpoint-tmp*"


@dataclass(frozen=True)
class Run:
    """What a checkpoint knows besides arrays. Randomness after initialisation is in the data position alone."""

    step: int
    config: dict[str, Any]
    tokenizer: dict[str, str | None]  # name, id and json_text
    data_states: list[Any]  # the position of each process; none of a checkpoint without a run


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read for inference: no optimizer state."""

    path: Path
    step: int
    config: Config
    params: PyTree
    tokenizer: Tokenizer


class Checkpointer:
    """Writes and reads the checkpoints of a run, in all processes alike."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self.root = workdir.absolute() / FOLDER
        self._config = config
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving = 0
        self._intact: set[Path] = set()  # verified by this process: hashing once is enough
        # orbax logs the traceback of an error that it also raises, which is reported below in one line.
        absl = logging.getLogger("absl")
        absl.addFilter(_not_from_orbax)

    def latest_step(self) -> int | None:
        """Returns the newest finished step."""
        return max(manifest.finished_steps(self.root), default=None)

    def save(self, state: TrainState, config: Config, tokenizer: Tokenizer, data_state: Any) -> None:
        """Starts to write `checkpoints/{state.step}`; returns when the arrays are copied off the devices.

        A save that is still running is awaited first. A finished checkpoint of that step is left as it is.

        Raises:
          CheckpointError: this or the previous checkpoint could not be written; the finished ones are intact.
        """
        self.wait()
        step = int(state.step)
        if manifest.is_finished(self.root / str(step)):
            return
        run = _run_values(step, config, tokenizer, _gather(data_state))
        items = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
        self._saving = step
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()
            # What overwrite=True can meet is an unfinished directory only.
            response = ocp.save_checkpointables_async(
                self.root / str(step), {k: v for k, v in items.items() if v is not None}, overwrite=True
            )
        except Exception as error:
            raise self._explain(error) from error
        self._thread = threading.Thread(target=self._finish, args=(response, run), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in progress, if there is one.

        Raises:
          CheckpointError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoint")
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises the CheckpointError of a save that has failed in the background, without waiting."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self._explain(failure) from failure

    def read_run(self, step: int) -> Run:
        """Verifies a whole checkpoint and reads what it knows besides arrays.

        Raises:
          CheckpointError: a file that is missing or changed; a newer format; parameters only; or another number of
            processes.
        """
        directory = self.root / str(step)
        self._verify(directory)
        run = _read_run(directory)
        if not run.data_states:
            raise CheckpointError(
                f"{directory} was converted and has parameters only: no run continues from it. Use another --workdir, "
                "and config.train.init_from to start from these parameters."
            )
        if len(run.data_states) != jax.process_count():
            raise CheckpointError(
                f"{directory} was saved by {len(run.data_states)} processes, each with its own position in the data: "
                f"there are {jax.process_count()} now."
            )
        return run

    def check_shapes(self, step: int, abstract_params: PyTree) -> None:
        """Compares the names and shapes of a checkpoint's parameters with those that a config makes.

        Raises:
          CheckpointError: they differ; the message names the parameter and both shapes.
        """
        _check_shapes(self.root / str(step), "params", abstract_params)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Reads a training state into the shardings of `abstract_state`.

        Raises:
          CheckpointError: a file that is missing or changed, or parameters of other names or shapes.
        """
        directory = self.root / str(step)
        self._verify(directory)
        items = {"params": abstract_state.params, "opt_state": abstract_state.opt_state, "ema": abstract_state.ema}
        items = {name: tree for name, tree in items.items() if tree is not None}
        restored = _load(directory, items)
        counter = jax.device_put(jnp.asarray(step, jnp.int32), abstract_state.step.sharding)
        return TrainState(counter, restored["params"], restored["opt_state"], restored.get("ema"))

    def _finish(self, response: ocp.AsyncResponse, run: dict[str, Any]) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                directory = self.root / str(run["step"])
                manifest.write_json(directory / RUN_FILE, run)
                manifest.write_manifest(directory)
                self._remove_superseded(run["step"])
        except BaseException as error:
            self._failure = error

    def _remove_superseded(self, newest: int) -> None:
        finished = manifest.finished_steps(self.root)
        kept = steps_to_keep(finished, self._config.keep, self._config.keep_every)
        for path in self.root.iterdir():
            if path.name.isdecimal() and int(path.name) < newest and int(path.name) not in kept:
                # Without its manifest it is unfinished, so that one half deleted is never read.
                (path / manifest.NAME).unlink(missing_ok=True)
                shutil.rmtree(path)

    def _remove_temporary(self) -> None:
        if jax.process_index() == 0:
            for path in self.root.glob(_TEMPORARY):
                shutil.rmtree(path, ignore_errors=True)

    def _explain(self, error: BaseException) -> CheckpointError:
        self._remove_temporary()  # room for what may be done about it
        latest = self.latest_step()
        intact = f"the checkpoint of step {latest} is intact" if latest is not None else "there is no earlier one"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return CheckpointError(
            f"Could not write the checkpoint {self.root / str(self._saving)}: {lines[0]} Training has stopped; "
            f"{intact}. Make room or fix the folder, then run the same command again to continue."
        )

    def _verify(self, directory: Path) -> None:
        if directory in self._intact:
            return
        try:
            manifest.verify(directory)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {self._advice(directory)}") from None
        self._intact.add(directory)

    def _advice(self, corrupt: Path) -> str:
        for step in reversed(manifest.finished_steps(self.root)):
            if step >= int(corrupt.name):
                continue
            try:
                manifest.verify(self.root / str(step))
            except CheckpointError:
                continue
            return f"Step {step} is intact: to continue from it, move {corrupt} away and run the same command again."
        return "No earlier checkpoint is intact."


def steps_to_keep(finished: list[int], keep: int, keep_every: int) -> set[int]:
    """Returns the steps whose checkpoints stay: the newest `keep`, and the multiples of `keep_every` (0 = none)."""
    return set(sorted(finished)[-keep:]) | {step for step in finished if keep_every and step % keep_every == 0}


def step_directory(path: str | Path, step: int | None = None) -> Path:
    """Finds a checkpoint.

    Args:
      path: a workdir, its folder of checkpoints, or one checkpoint.
      step: which one; None = the newest finished one.

    Raises:
      CheckpointError: there is none, or not this step; the message lists those there are.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"No checkpoint directory {path}.")
    if manifest.is_finished(path) and step in (None, _step_of(path)):
        return path
    root = path / FOLDER if (path / FOLDER).is_dir() else path
    finished = manifest.finished_steps(root)
    if not finished:
        unfinished = (path / "params").is_dir() or any((folder / "params").is_dir() for folder in root.iterdir())
        what = f"unfinished checkpoints only (without {manifest.NAME})" if unfinished else "no checkpoints"
        raise CheckpointError(f"{path} has {what}: expected a workdir of m3jax.train or one of its {FOLDER}/STEP.")
    if step is not None and step not in finished:
        raise CheckpointError(f"{root} has no checkpoint of step {step}: there are {', '.join(map(str, finished))}.")
    return root / str(finished[-1] if step is None else step)


def load_checkpoint(
    path: str | Path, step: int | None = None, *, ema: bool = False, overrides: dict[str, Any] | None = None
) -> Checkpoint:
    """Reads a checkpoint for inference, onto the first device.

    Args:
      path: a workdir, its folder of checkpoints, or one checkpoint.
      step: which one; None = the newest finished one.
      ema: take the moving average of the parameters.
      overrides: config keys to change, {"a.b": value}.

    Raises:
      CheckpointError: none there, a file missing or changed, no moving average, or shapes that are not the config's.
      ConfigError: overrides that do not fit.
    """
    directory = step_directory(path, step)
    item = "ema" if ema else "params"
    manifest.verify(directory, (RUN_FILE, _METADATA, item))
    if not (directory / item).is_dir():
        raise CheckpointError(f"{directory} has no moving average: the run had train.ema_decay = 0.")
    run = _read_run(directory)
    asked = (overrides or {}).get("data.tokenizer", run.tokenizer["name"])
    if asked != run.tokenizer["name"]:
        raise ConfigError(
            f"config.data.tokenizer = {asked!r}: {directory} has its own, {run.tokenizer['name']!r}. Leave it out."
        )
    config = build_config(override(run.config, overrides or {}))
    sharding = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_params(config, LanguageModel(config.model))),
    )
    params = _load(directory, {item: abstract})[item]
    tokenizer = load_tokenizer(run.tokenizer["name"], run.tokenizer["json_text"])
    return Checkpoint(directory, run.step, config, params, tokenizer)


def open_parameters(directory: Path) -> Run:
    """Verifies the parameters of one checkpoint and reads what it knows besides arrays.

    Raises:
      CheckpointError: a file that is missing or changed, or a newer format.
    """
    manifest.verify(directory, (RUN_FILE, _METADATA, "params"))
    return _read_run(directory)


def read_parameters(directory: Path, abstract: PyTree) -> PyTree:
    """Reads the parameters of one checkpoint into the dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: they have other names or shapes.
    """
    return _load(directory, {"params": abstract})["params"]


def save_parameters(workdir: Path, checkpoint: Checkpoint) -> None:
    """Makes a workdir with one checkpoint that has parameters only: to load, generate and evaluate, not to train on.

    A killed process leaves nothing there.

    Args:
      workdir: to be made.
      checkpoint: what it shall hold; its path is not used.

    Raises:
      FileExistsError: the directory is there.
    """

    def fill(partial: Path) -> None:
        directory = partial.absolute() / FOLDER / str(checkpoint.step)
        directory.parent.mkdir()
        ocp.save_checkpointables(directory, {"params": checkpoint.params})
        values = _run_values(checkpoint.step, checkpoint.config, checkpoint.tokenizer, [])
        manifest.write_json(directory / RUN_FILE, values)
        manifest.write_manifest(directory)

    build_new(workdir, fill)


def _run_values(step: int, config: Config, tokenizer: Tokenizer, data_states: list[str]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "step": step,
        "config": config_to_dict(config),
        "tokenizer": {"name": config.data.tokenizer, "id": tokenizer.id, "json_text": tokenizer.json_text},
        "data_states": data_states,
        "jax_version": jax.__version__,
    }


def _load(directory: Path, items: dict[str, PyTree]) -> dict[str, PyTree]:
    for item, abstract in items.items():
        _check_shapes(directory, item, abstract)
    return ocp.load_checkpointables(directory, items)


def _check_shapes(directory: Path, item: str, abstract: PyTree) -> None:
    """Compares names and shapes before orbax does, which reports a difference less clearly."""
    if not (directory / item).is_dir():
        raise CheckpointError(f"{directory} has no {item}.")
    stored, expected = _shapes(ocp.metadata(directory, item).metadata), _shapes(abstract)
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            has, wants = (f"has shape {tree[name]}" if name in tree else "is missing" for tree in (stored, expected))
            raise CheckpointError(
                f"{directory}: {name} of {item} {has} in the checkpoint and {wants} in the config. Use the config "
                "it was saved with, or another directory."
            )


def _shapes(tree: PyTree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    # A named tuple comes back from the metadata as a dict of its fields.
    return {"/".join(_key_name(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _key_name(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def _read_run(directory: Path) -> Run:
    values = json.loads((directory / RUN_FILE).read_text())
    if values["format"] != _FORMAT:
        raise CheckpointError(
            f"{directory / RUN_FILE} has format {values['format']}, this m3jax reads {_FORMAT}: update m3jax."
        )
    return Run(values["step"], values["config"], values["tokenizer"], [_decode(text) for text in values["data_states"]])


def _step_of(directory: Path) -> int:
    return json.loads((directory / RUN_FILE).read_text())["step"]


def _gather(data_state: Any) -> list[str]:
    """Returns the data position of every process, as text."""
    if isinstance(data_state, bytes):
        text = "base64:" + base64.b64encode(data_state).decode()
    else:
        text = "json:" + json.dumps(data_state)
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.process_allgather(np.array(mine.size)).max())
    rows = multihost_utils.process_allgather(np.pad(mine, (0, length - mine.size)))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def _decode(text: str) -> Any:
    kind, _, body = text.partition(":")
    return base64.b64decode(body) if kind == "base64" else json.loads(body)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
