"""The training loop: opens everything, resumes where the workdir stands, steps, logs, evaluates, saves.

The metrics of a step are read after the next step has been dispatched, so the devices never wait for the host. What
that means for a non-finite step is in `make_train_step`; what the run then does is `_Trainer._handle_nonfinite`.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import Config, build_config, config_to_dict
from m3jax.data import Tokenizer, load_tokenizer, open_train, open_validation
from m3jax.errors import CheckpointError, TrainingError
from m3jax.models.language_model import LanguageModel
from m3jax.training.checkpoint import Checkpointer, Run
from m3jax.training.evaluation import Evaluation, evaluate
from m3jax.training.flops import device_peak_flops, flops_per_token
from m3jax.training.initial import find_initial
from m3jax.training.interrupt import StopRequest
from m3jax.training.loss_curve import plot_loss_curve
from m3jax.training.manifest import write_json
from m3jax.training.metrics import FILE, MetricsWriter, check_writers, read_metrics
from m3jax.training.progress import Progress, environment_lines, format_seconds, parameter_table
from m3jax.training.sharding import make_mesh, shard_batch, state_shardings, with_shardings
from m3jax.training.step import first_state, init_state, make_eval_step, make_train_step
from m3jax.training.throughput import Throughput, peak_memory_bytes
from m3jax.training.workdir import changed_keys, check_resumable, locked

_MAX_SKIPPED_IN_A_ROW = 20
_MAX_ROLLBACKS = 5  # to one checkpoint


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: the last step taken.
      stopped_by: the signal that ended it early, None = it reached its last step.
      evaluation: on held-out data at the end; None when it was stopped, or had nothing left to do.
    """

    step: int
    stopped_by: str | None
    evaluation: Evaluation | None


@dataclass(frozen=True)
class _Step:
    """A step that has been dispatched: its metrics, on the device, and the position in the data after its batch."""

    number: int
    metrics: dict[str, jax.Array]
    data_state: Any


def train(config: Config, workdir: str | Path) -> TrainResult:
    """Trains, or continues the run that `workdir` holds, until train.stop_at, train.steps or a signal.

    Args:
      config: the whole run.
      workdir: its directory; created when all of the input has been checked.

    Raises:
      M3jaxError: data, checkpoint or config that cannot be used, found before anything is written; or, later, a
        non-finite step that train.nonfinite does not forgive, or a checkpoint that could not be written.
    """
    workdir = Path(workdir)
    trainer = _Trainer(config, workdir)
    try:
        with locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
            return trainer.run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"Out of device memory: {str(error).splitlines()[0]} Raise train.grad_accumulation or mesh.fsdp, lower "
            "data.batch_size or train.loss_chunk, or set model.remat=full."
        ) from error


class _Trainer:
    """One run in one process."""

    def __init__(self, config: Config, workdir: Path):
        """Opens and checks everything that can be wrong; writes and compiles nothing."""
        self.config, self.workdir = config, workdir
        check_writers(config)
        self.last_step = min(config.train.steps, config.train.stop_at or config.train.steps)
        self.mesh = make_mesh(config)
        self.model = LanguageModel(config.model)
        abstract = jax.eval_shape(lambda: init_state(config, self.model))
        self.shardings = state_shardings(abstract, self.mesh)
        self.abstract_state = with_shardings(abstract, self.shardings)
        self.checkpointer = Checkpointer(workdir, config.checkpoint)
        self.start = self.checkpointer.latest_step()
        saved = None if self.start is None else self.checkpointer.read_run(self.start)
        self.changed = {} if saved is None else self._check_resumable(build_config(saved.config))
        self.tokenizer = self._open_tokenizer(saved)
        self.initial = find_initial(config, self.tokenizer) if saved is None else None
        self.data = open_train(config, self.tokenizer, jax.process_index(), jax.process_count())
        self.validation = open_validation(config, self.tokenizer)
        if saved is not None:
            self.data.set_state(saved.data_states[jax.process_index()])
        self.train_step = make_train_step(config, self.model, self.mesh)
        self.eval_step = make_eval_step(config, self.model, self.mesh)
        self.progress = Progress(self.last_step)
        self.throughput = Throughput(
            config.data.batch_size * config.data.sequence_length,
            flops_per_token(config.model, config.data.sequence_length),
            self._peak_flops(),
        )

    def run(self) -> TrainResult:
        """Trains from where the workdir stands to the last step or a signal."""
        self.step = self.start or 0
        if self.start is not None and self.start >= self.last_step and not self._evaluation_is_missing():
            self.progress.message(
                f"{self.workdir} is finished: its checkpoint of step {self.start} reaches the last step, "
                f"{self.last_step}."
            )
            return TrainResult(self.step, None, None)
        self._announce()
        self.state = self._first_state()
        if jax.process_index() == 0:
            write_json(self.workdir / "config.json", config_to_dict(self.config))
        self.metrics = MetricsWriter(self.workdir, self.config, self.step)
        self.go = jax.device_put(jnp.asarray(True), NamedSharding(self.mesh, P()))
        self._reset(self.data.get_state())
        self.skipped_in_a_row, self.rollbacks = 0, (None, 0)
        began = time.perf_counter()
        with self.progress, StopRequest() as stop:
            try:
                evaluation = self._loop(stop)
            except Exception:
                with contextlib.suppress(CheckpointError):  # the first error is the one to report
                    self.checkpointer.wait()
                raise
            finally:
                self.metrics.close()
                self.data.close()
            self.checkpointer.wait()
        self._conclude(stop, evaluation, time.perf_counter() - began)
        return TrainResult(self.step, stop.signal_name if evaluation is None else None, evaluation)

    def _loop(self, stop: StopRequest) -> Evaluation | None:
        train, evaluation = self.config.train, None
        if self._evaluation_is_missing():
            evaluation = self._evaluate()
        if train.nonfinite == "rollback":
            self._save()  # from the first step on there is something to roll back to
        while self.step < self.last_step:
            if stop.pending(ask_others=self.step % train.log_every == 0):
                if self._settle():
                    self._save()
                return None
            rolled_back = not self._advance()
            save = self.step == self.last_step or self.step % self.config.checkpoint.every == 0
            if rolled_back or ((save or self._evaluates()) and not self._settle()):
                continue
            if save:
                self._save()
            if self._evaluates():
                evaluation = self._evaluate()
            self.checkpointer.raise_failure()
        return evaluation

    def _evaluates(self) -> bool:
        every = self.config.train.eval_every
        return self.step == self.last_step or bool(every and self.step % every == 0)

    def _evaluation_is_missing(self) -> bool:
        """Whether the process that saved the checkpoint was killed before it had evaluated it."""
        records = read_metrics(self.workdir / FILE) if (self.workdir / FILE).exists() else []
        return (
            self.start is not None
            and self._evaluates()
            and not any(record["step"] == self.start and "validation_loss" in record for record in records)
        )

    def _advance(self) -> bool:
        """Dispatches one step, then settles the one before; False when that rolled the run back."""
        batch = shard_batch(next(self.data), self.mesh)
        self.state, metrics = self.train_step(self.state, batch, self.go)
        self.go = metrics["proceed"]
        self.step += 1
        before, self.in_flight = self.in_flight, _Step(self.step, metrics, self.data.get_state())
        return before is None or self._read(before)

    def _settle(self) -> bool:
        """Waits for the step in flight; False when it rolled the run back."""
        last, self.in_flight = self.in_flight, None
        return last is None or self._read(last)

    def _read(self, step: _Step) -> bool:
        metrics = jax.device_get(step.metrics)
        if not metrics["finite"]:
            return self._handle_nonfinite(step, float(metrics["loss"]))
        self.skipped_in_a_row = 0
        self.data_state = step.data_state
        if self.warm:
            self.throughput.count_step()
        else:  # this one was compiled, or came after a restore
            self.throughput.restart()
            self.warm = True
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")}
        numbers |= self.throughput.report()
        logged = step.number % self.config.train.log_every == 0 or step.number == self.last_step
        memory = peak_memory_bytes()
        self.progress.step(step.number, numbers, memory, self.throughput.seconds_per_step(), logged)
        if logged:
            self.metrics.write(step.number, numbers | {"peak_memory_bytes": memory})
            self.throughput.restart()
        return True

    def _handle_nonfinite(self, step: _Step, loss: float) -> bool:
        policy = self.config.train.nonfinite
        what = f"Step {step.number}: the {'loss' if not math.isfinite(loss) else 'gradient'} is not finite"
        if policy == "rollback":
            self._roll_back(step, what)
            return False
        if policy == "skip":
            self.data_state = step.data_state
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row < _MAX_SKIPPED_IN_A_ROW:
                self.progress.message(f"{what}, skipped")
                self.metrics.write(step.number, {"skipped": 1})
                return True
            what = f"{what}, like the {_MAX_SKIPPED_IN_A_ROW - 1} before it"
        elif step.number > 1:
            # Nothing was updated from this step on: the state is the one before it, and so is self.data_state.
            self._save()
            self.checkpointer.wait()
        raise TrainingError(
            f"{what}; training has stopped. {self._newest()}. Lower optimizer.learning_rate or look at the data; "
            "train.nonfinite=skip leaves such steps out, train.nonfinite=rollback returns to the last checkpoint."
        )

    def _roll_back(self, bad: _Step, what: str) -> None:
        """Restores the newest checkpoint and continues with the data after the bad batch."""
        self.checkpointer.wait()
        target = self.checkpointer.latest_step()
        self.rollbacks = (target, self.rollbacks[1] + 1 if self.rollbacks[0] == target else 1)
        if self.rollbacks[1] > _MAX_ROLLBACKS:
            raise TrainingError(
                f"{what} after {_MAX_ROLLBACKS} returns to the checkpoint of step {target}; training has stopped. "
                "Lower optimizer.learning_rate or look at the data."
            )
        self.progress.message(f"{what}, back to step {target} with the data after it")
        self.state = None  # room for the restored one
        self.state = self.checkpointer.restore(target, self.abstract_state)
        self.step = target
        self.data.set_state(bad.data_state)
        self.go = jnp.ones_like(self.go)
        self._reset(bad.data_state)
        self.metrics.rewind(target)

    def _reset(self, data_state: Any) -> None:
        self.in_flight: _Step | None = None
        self.data_state = data_state  # after the newest batch that is known to be good
        self.warm = False

    def _save(self) -> None:
        if not _all_finite((self.state.params, self.state.opt_state, self.state.ema)):
            raise TrainingError(
                f"Step {self.step}: a parameter or optimizer moment is not finite; nothing was saved. {self._newest()}."
            )
        self.checkpointer.save(self.state, self.config, self.tokenizer, self.data_state)
        self.throughput.restart()

    def _evaluate(self) -> Evaluation:
        limit = self.config.train.eval_batches
        evaluation = evaluate(self.eval_step, self.state.params, self.validation, limit, self.mesh)
        self.progress.message(f"step {self.step}: held-out {evaluation}")
        record = evaluation.record()
        if self.state.ema is not None:
            average = evaluate(self.eval_step, self.state.ema, self.validation, limit, self.mesh)
            self.progress.message(f"step {self.step}: held-out, moving average: {average}")
            record |= average.record("validation_ema")
        self.metrics.write(self.step, record)
        self.throughput.restart()
        return evaluation

    def _first_state(self) -> Any:
        if self.start is not None:
            return self.checkpointer.restore(self.start, self.abstract_state)
        if self.initial is None:
            return jax.jit(lambda: init_state(self.config, self.model), out_shardings=self.shardings)()
        params = self.initial.read(self.abstract_state.params)
        begin = jax.jit(partial(first_state, self.config), out_shardings=self.shardings, donate_argnums=0)
        return begin(params)

    def _check_resumable(self, stored: Config) -> dict[str, tuple[Any, Any]]:
        changed = changed_keys(stored, self.config)
        check_resumable(changed, self.checkpointer.root / str(self.start))
        self.checkpointer.check_shapes(self.start, self.abstract_state.params)
        return changed

    def _open_tokenizer(self, saved: Run | None) -> Tokenizer:
        name = self.config.data.tokenizer
        if saved is None:
            return load_tokenizer(name)
        tokenizer = load_tokenizer(name, saved.tokenizer["json_text"] if name == saved.tokenizer["name"] else None)
        if tokenizer.id != saved.tokenizer["id"]:
            raise CheckpointError(
                f"config.data.tokenizer = {name!r}: the run in {self.workdir} has another one, "
                f"{saved.tokenizer['name']!r}. Set it back, or start a new run with another --workdir."
            )
        return tokenizer

    def _peak_flops(self) -> float | None:
        peak = device_peak_flops(self.mesh.devices.flat[0])
        return None if peak is None else peak * self.mesh.size

    def _newest(self) -> str:
        step = self.checkpointer.latest_step()
        return "There is no checkpoint" if step is None else f"The newest checkpoint is that of step {step}"

    def _announce(self) -> None:
        say = self.progress.message
        say(parameter_table(self.abstract_state.params))
        say(environment_lines())
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        say(f"mesh      {mesh}")
        data = self.config.data
        say(f"data      {data.source}, tokenizer {data.tokenizer}; held out: {self.validation.n_tokens:,} tokens")
        say(f"step      {data.batch_size} sequences of {data.sequence_length} tokens")
        say(f"workdir   {self.workdir}")
        if self.start is not None:
            say(f"resumes from step {self.start}")
        if self.initial is not None:
            say(f"starts with the parameters of {self.initial.path}")
        for key, (old, new) in self.changed.items():
            say(f"  changed since: config.{key} = {new!r}, was {old!r}")
        say(f"trains to step {self.last_step} of {self.config.train.steps}; the first step compiles")

    def _conclude(self, stop: StopRequest, evaluation: Evaluation | None, seconds: float) -> None:
        say = self.progress.message
        if evaluation is None:
            say(f"{stop.signal_name}: stopped at step {self.step}. Run the same command again to continue.")
        else:
            say(f"finished step {self.step} in {format_seconds(seconds)}")
            say(f"held out    {evaluation}")
        say(f"checkpoint  {self.checkpointer.root / str(self.checkpointer.latest_step())}")
        say(f"metrics     {self.workdir / FILE}")
        curve = plot_loss_curve(self.workdir) if jax.process_index() == 0 else None
        if curve is not None:
            say(f"loss curve  {curve}")
        say(f"sample      python -m m3jax.generate --checkpoint {self.workdir} --prompt '...'")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))
