"""Whole runs in this process: resuming, the non-finite policies, what is written and when."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from m3jax.training import loop
from m3jax.training.checkpoint import load_checkpoint
from m3jax.training.loop import train
from m3jax.training.manifest import finished_steps
from m3jax.training.metrics import read_metrics
from tests.training.conftest import use_small_model
from tests.training.test_step import assert_same

pytestmark = pytest.mark.usefixtures("quick_compilation", "small_model")


class PoisonedData:
    """The training data with NaN weights in the batches of these numbers, counted from 1 in data order."""

    def __init__(self, inner, bad):
        self.inner, self.bad, self.count = inner, bad, 0
        self.served = []

    def __next__(self):
        self.count += 1
        self.served.append(self.count)
        batch = dict(next(self.inner))
        if self.count in self.bad:
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return batch

    def get_state(self):
        return {"count": self.count, "inner": self.inner.get_state()}

    def set_state(self, state):
        self.count = state["count"]
        self.inner.set_state(state["inner"])

    def close(self):
        self.inner.close()


@pytest.fixture
def poison(monkeypatch):
    """Makes these batches bad; returns the list of the iterators that runs have opened."""
    opened, open_train = [], loop.open_train

    def install(*bad):
        def open_poisoned(*arguments):
            opened.append(PoisonedData(open_train(*arguments), bad))
            return opened[-1]

        monkeypatch.setattr(loop, "open_train", open_poisoned)
        return opened

    return install


def losses(workdir):
    return {record["step"]: record["loss"] for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record}


def steps_saved(workdir):
    return finished_steps(workdir / "checkpoints")


def assert_everything_finite(workdir):
    for step in steps_saved(workdir):
        for leaf in jax_leaves(load_checkpoint(workdir, step).params):
            assert jnp.isfinite(leaf).all(), step


def jax_leaves(tree):
    return [leaf for value in tree.values() for leaf in (jax_leaves(value) if isinstance(value, dict) else [value])]


def test_a_run_writes_everything_it_says(small_config, tmp_path, capsys):
    result = train(small_config({"train.eval_every": 4, "train.tensorboard": True}), tmp_path)
    assert (result.step, result.stopped_by) == (10, None)
    assert result.evaluation.perplexity == pytest.approx(np.exp(result.evaluation.loss))
    assert steps_saved(tmp_path) == [5, 10]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8, 10]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= records[3].keys()
    assert losses(tmp_path)[10] < losses(tmp_path)[1]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 10
    output = capsys.readouterr().out
    for part in (
        "layers/kernel",
        "total",
        "devices ",
        "step 7/10  loss",
        "held out    loss",
        f"{tmp_path}/checkpoints/10",
    ):
        assert part in output


def test_stop_and_resume_equals_straight_through(small_config, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"train.ema_decay": 0.9, "train.log_every": 2}
    train(small_config(changes), whole)
    assert train(small_config(changes | {"train.stop_at": 3}), parts).step == 3
    train(small_config(changes), parts)
    assert "resumes from step 3" in capsys.readouterr().out
    for ema in (False, True):
        assert_same(load_checkpoint(parts, ema=ema).params, load_checkpoint(whole, ema=ema).params)
    straight = losses(whole)
    assert {step: loss for step, loss in losses(parts).items() if step in straight} == straight
    assert sorted(losses(parts)) == [2, 3, 4, 6, 8, 10]


def test_finished_run_says_so_and_does_nothing(small_config, tmp_path, capsys):
    config = small_config({"train.stop_at": 2})
    train(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(config, tmp_path).evaluation is None
    assert "is finished: its checkpoint of step 2 reaches the last step, 2" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_evaluation_that_was_killed_is_made_up_for(small_config, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(self):
        raise Killed

    config = small_config({"train.stop_at": 2})
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_evaluate", die)
        with pytest.raises(Killed):
            train(config, tmp_path)
    assert steps_saved(tmp_path)[-1] == 2
    result = train(config, tmp_path)
    (record,) = (r for r in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in r)
    assert record["step"] == result.step == 2
    assert record["validation_loss"] == pytest.approx(result.evaluation.loss)


def test_records_of_steps_after_the_checkpoint_are_dropped_on_resume(small_config, tmp_path):
    train(small_config({"train.stop_at": 2}), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 7.0}\n{"step": 4, "lo')  # what a kill -9 leaves
    train(small_config({"train.stop_at": 4}), tmp_path)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert losses(tmp_path)[3] != 7.0


def test_nonfinite_stop_saves_the_state_before_it(small_config, tmp_path, poison):
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    poison(8)
    with pytest.raises(TrainingError, match=r"Step 8: the loss is not finite.*checkpoint is that of step 7.*skip"):
        train(small_config(), stopped)
    assert steps_saved(stopped) == [5, 7]
    assert sorted(losses(stopped)) == list(range(1, 8))
    # The saved state is exactly the one after step 7: with good data the run continues as if nothing had happened.
    poison()
    train(small_config(), stopped)
    train(small_config(), straight)
    assert_same(load_checkpoint(stopped).params, load_checkpoint(straight).params)


def test_nonfinite_first_step_saves_nothing(small_config, tmp_path, poison):
    poison(1)
    with pytest.raises(TrainingError, match=r"Step 1: .*There is no checkpoint"):
        train(small_config(), tmp_path)
    assert steps_saved(tmp_path) == []


def test_nonfinite_last_step_is_not_saved(small_config, tmp_path, poison):
    poison(10)
    with pytest.raises(TrainingError, match="Step 10"):
        train(small_config(), tmp_path)
    assert steps_saved(tmp_path) == [5, 9]
    assert_everything_finite(tmp_path)


def test_nonfinite_skip_continues_with_the_next_batch(small_config, tmp_path, poison, capsys):
    (data,) = [poison(3, 5)]
    result = train(small_config({"train.nonfinite": "skip"}), tmp_path)
    assert result.step == 10 and data[0].served == list(range(1, 11))
    assert sorted(losses(tmp_path)) == [1, 2, 4, 6, 7, 8, 9, 10]
    assert "Step 3: the loss is not finite, skipped" in capsys.readouterr().out
    assert_everything_finite(tmp_path)


def test_nonfinite_skip_gives_up(small_config, tmp_path, poison, monkeypatch):
    monkeypatch.setattr(loop, "_MAX_SKIPPED_IN_A_ROW", 3)
    poison(2, 3, 5, 6, 7)
    with pytest.raises(TrainingError, match="Step 7: the loss is not finite, like the 2 before it"):
        train(small_config({"train.nonfinite": "skip"}), tmp_path)
    assert_everything_finite(tmp_path)


def test_nonfinite_rollback_returns_to_the_checkpoint_with_later_data(small_config, tmp_path, poison, capsys):
    data = poison(8, 9)
    result = train(small_config({"train.nonfinite": "rollback"}), tmp_path)
    assert result.step == 10
    # 8 is bad, read when 9 is on its way; back to step 5 with 9, which is bad too; steps 6 to 10 are 10 to 14.
    assert data[0].served == [*range(1, 10), 9, 10, *range(10, 15)]
    assert sorted(losses(tmp_path)) == list(range(1, 11))
    assert "Step 8: the loss is not finite, back to step 5 with the data after it" in capsys.readouterr().out
    assert_everything_finite(tmp_path)


def test_nonfinite_rollback_before_the_first_checkpoint(small_config, tmp_path, poison):
    poison(2)
    assert train(small_config({"train.nonfinite": "rollback", "train.stop_at": 3}), tmp_path).step == 3
    assert steps_saved(tmp_path) == [0, 3]


def test_nonfinite_rollback_gives_up(small_config, tmp_path, poison):
    poison(*range(7, 40))
    with pytest.raises(TrainingError, match="after 5 returns to the checkpoint of step 5"):
        train(small_config({"train.nonfinite": "rollback"}), tmp_path)
    assert steps_saved(tmp_path) == [0, 5]


def test_nonfinite_parameters_are_never_saved(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_all_finite", lambda tree: False)
    with pytest.raises(TrainingError, match="a parameter or optimizer moment is not finite; nothing was saved"):
        train(small_config(), tmp_path)
    assert steps_saved(tmp_path) == []


def test_all_finite_finds_one_bad_number():
    tree = {"a": jnp.ones(3), "count": jnp.asarray(1)}
    assert loop._all_finite(tree)
    assert not loop._all_finite(tree | {"b": jnp.array([1.0, jnp.inf])})


def test_signal_saves_at_the_next_step(small_config, tmp_path, poison, capsys, monkeypatch):
    data = poison()
    handler, show = signal.getsignal(signal.SIGTERM), loop.Progress.step

    def show_and_send(self, step, *arguments):
        show(self, step, *arguments)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "step", show_and_send)
    result = train(small_config(), tmp_path)
    # The numbers of step 3 are read when step 4 is on its way.
    assert (result.step, result.stopped_by, steps_saved(tmp_path)) == (4, "SIGTERM", [4])
    assert data[0].served == [1, 2, 3, 4]
    assert "SIGTERM: stopped at step 4. Run the same command again" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler


def test_second_ctrl_c_aborts_at_once(small_config, tmp_path, monkeypatch):
    def interrupt_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Progress, "step", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(), tmp_path)
    assert steps_saved(tmp_path) == []


@pytest.fixture(scope="module")
def finished_run(small_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_small_model(patch)
        train(small_config({"train.stop_at": 1}), workdir)
    return workdir


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model.d_model": 64}, CheckpointError, r"config.model.d_model = 64: the run in .* has 32"),
        (
            {"model.a_activation": "softplus"},
            CheckpointError,
            r"config.model.a_activation = 'softplus': .*'heavy_tail'",
        ),
        ({"train.ema_decay": 0.5}, CheckpointError, r"config.train.ema_decay = 0.5"),
        ({"data.seed": 1}, DataError, r"config.data.seed was 0 and is now 1"),
        ({"data.batch_size": 16}, DataError, r"config.data.batch_size was 8"),
        ({"model.vocab_size": 100}, CheckpointError, r"config.model.vocab_size = 100: the run in .* has"),
    ],
)
def test_run_of_another_config_is_left_alone(small_config, finished_run, changes, error, message):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        train(small_config(changes | {"train.stop_at": 4}), finished_run)
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_damaged_checkpoint_is_named_before_anything_is_written(small_config, tmp_path, item):
    train(small_config({"train.stop_at": 6}), tmp_path)
    (damaged,) = (tmp_path / "checkpoints" / "6" / item / "d").iterdir()
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"{damaged} does not have the SHA-256.*Step 5 is intact: .* move"):
        train(small_config(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    damaged.parents[2].rename(tmp_path / "damaged-6")
    assert train(small_config(), tmp_path).step == 10


def test_harmless_changes_are_listed_on_resume(small_config, tmp_path, capsys):
    train(small_config({"train.stop_at": 1}), tmp_path)
    train(small_config({"train.stop_at": 2, "optimizer.learning_rate": 1e-3, "train.grad_accumulation": 2}), tmp_path)
    assert "changed since: config.optimizer.learning_rate = 0.001, was 0.003" in capsys.readouterr().out


def test_bad_input_leaves_no_directory(small_config, tmp_path):
    with pytest.raises(ConfigError, match=r"vocab_size = 100: expected at least 258"):
        train(small_config({"model.vocab_size": 100}), tmp_path / "run")
    with pytest.raises(DataError, match=r"missing\.txt"):
        train(small_config({"data.source": str(tmp_path / "missing.txt")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_keys_that_help(small_config, tmp_path, monkeypatch):
    def make_train_step(*_):
        def train_step(*_):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nMore."
            )

        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    with pytest.raises(
        TrainingError, match=r"Out of device memory: .*allocate 9 bytes\. Raise train.grad_accumulation"
    ):
        train(small_config(), tmp_path)


def test_workdir_in_use_is_refused(small_config, tmp_path):
    with loop.locked(tmp_path), pytest.raises(TrainingError, match="in use by process"):
        train(small_config(), tmp_path)
