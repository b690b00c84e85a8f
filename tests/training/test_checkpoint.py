"""Checkpoints: what is saved comes back, bit for bit; what is unfinished is not used; what is damaged is named."""

import contextlib
import gc
import json
import resource
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import config_to_dict
from m3jax.data import load_tokenizer
from m3jax.errors import CheckpointError
from m3jax.training.checkpoint import Checkpointer, load_checkpoint, step_directory, steps_to_keep
from m3jax.training.manifest import NAME, finished_steps, verify, write_manifest
from m3jax.training.sharding import make_mesh, state_shardings, with_shardings
from m3jax.training.step import init_state
from tests.training.conftest import SmallModel
from tests.training.test_step import assert_same

pytestmark = pytest.mark.usefixtures("quick_compilation", "small_model")

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture
def run(small_config, tmp_path):
    """A config with an average, a state of it, and a checkpointer that keeps all."""
    config = small_config({"train.ema_decay": 0.9, "checkpoint.keep": 100})
    return Run(config, tmp_path)


class Run:
    def __init__(self, config, workdir):
        self.config, self.workdir = config, workdir
        self.checkpointer = Checkpointer(workdir, config.checkpoint)
        self.state = jax.jit(lambda: init_state(config, SmallModel(config.model)))()

    def save(self, *steps, data_state=None):
        for step in steps:
            state = self.state.replace(step=jnp.asarray(step, jnp.int32))
            self.checkpointer.save(state, self.config, TOKENIZER, data_state or {"position": step})
            self.checkpointer.wait()

    def abstract(self):
        shapes = jax.eval_shape(lambda: self.state)
        return with_shardings(shapes, state_shardings(shapes, make_mesh(self.config)))

    def path(self, step):
        return self.workdir / "checkpoints" / str(step)


def test_state_and_run_come_back(run):
    run.save(3, data_state={"epoch": 1, "next": [4, 5]})
    restored = run.checkpointer.restore(3, run.abstract())
    assert int(restored.step) == 3
    assert_same(restored.replace(step=0), run.state.replace(step=0))
    assert jax.tree.structure(restored) == jax.tree.structure(run.state)
    saved = run.checkpointer.read_run(3)
    assert saved.config == config_to_dict(run.config)
    assert saved.data_states == [{"epoch": 1, "next": [4, 5]}]
    assert saved.tokenizer == {"name": "bytes", "id": "bytes", "json_text": None}


def test_position_in_the_data_may_be_bytes(run):
    run.save(1, data_state=b"\x00\xff")
    assert run.checkpointer.read_run(1).data_states == [b"\x00\xff"]


def test_restores_onto_another_mesh(run, small_config):
    run.save(1)
    mesh = make_mesh(small_config({"mesh.fsdp": 8}))
    shapes = jax.eval_shape(lambda: run.state)
    restored = run.checkpointer.restore(1, with_shardings(shapes, state_shardings(shapes, mesh)))
    assert len(restored.params["embedding"].sharding.device_set) == 8
    assert_same(restored.params, run.state.params)


def test_donating_the_state_right_after_save_does_not_reach_the_file(run):
    expected = jax.tree.map(np.array, run.state.params)
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    run.checkpointer.save(run.state.replace(step=jnp.asarray(1)), run.config, TOKENIZER, {})
    jax.block_until_ready(overwrite((run.state.params, run.state.opt_state, run.state.ema)))
    run.checkpointer.wait()
    assert_same(load_checkpoint(run.workdir).params, expected)


def test_restored_state_can_be_donated(run):
    run.save(1)
    restored = run.checkpointer.restore(1, run.abstract())
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(restored.params)
    assert restored.params["embedding"].is_deleted()


@pytest.mark.parametrize(
    ("keep", "keep_every", "expected"),
    [(2, 0, {40, 50}), (1, 20, {20, 40, 50}), (9, 0, {10, 20, 30, 40, 50}), (2, 10, {10, 20, 30, 40, 50})],
)
def test_which_steps_are_kept(keep, keep_every, expected):
    assert steps_to_keep([50, 10, 20, 30, 40], keep, keep_every) == expected


def test_old_checkpoints_are_deleted_after_the_new_one_is_finished(small_config, tmp_path):
    run = Run(small_config({"checkpoint.keep": 2, "checkpoint.keep_every": 20}), tmp_path)
    (tmp_path / "checkpoints" / "15" / "params").mkdir(parents=True)  # left by a killed process
    run.save(10, 20, 30, 40, 50)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 40, 50]


def test_finished_checkpoint_is_never_overwritten(run):
    run.save(1)
    before = (run.path(1) / NAME).read_text()
    run.state = run.state.replace(params=jax.tree.map(jnp.zeros_like, run.state.params))
    run.save(1)
    assert (run.path(1) / NAME).read_text() == before
    verify(run.path(1))


def test_unfinished_checkpoint_is_never_chosen(run):
    run.save(1, 2)
    (run.path(2) / NAME).unlink()
    assert run.checkpointer.latest_step() == 1
    assert load_checkpoint(run.workdir).step == 1
    with pytest.raises(CheckpointError, match="no checkpoint of step 2: there are 1"):
        load_checkpoint(run.workdir, 2)
    with pytest.raises(CheckpointError, match="unfinished"):
        load_checkpoint(run.path(2))
    run.save(2)  # and it is replaced when the run reaches it again
    assert load_checkpoint(run.workdir).step == 2


def files_of_a_checkpoint(run):
    run.save(1)
    return sorted(path.relative_to(run.path(1)) for path in run.path(1).rglob("*") if path.is_file())


def test_every_damaged_file_is_named(run):
    names = files_of_a_checkpoint(run)
    assert {name.parts[0] for name in names} >= {"params", "opt_state", "ema", "run.json", NAME}
    run.save(2)
    pristine = run.workdir / "pristine"
    shutil.copytree(run.path(2), pristine)
    for path in [path for path in pristine.rglob("*") if path.is_file()]:
        name = path.relative_to(pristine)
        for damage in (flip_a_byte, truncate, remove):
            if path.stat().st_size == 0 and damage is not remove:
                continue
            damage(run.path(2) / name)
            if name.name == NAME and damage is remove:
                assert finished_steps(run.path(2).parent) == [1]
            else:
                with pytest.raises(CheckpointError) as caught:
                    run.checkpointer.restore(2, run.abstract())
                assert str(run.path(2) / name) in str(caught.value), damage.__name__
                assert "Step 1 is intact: to continue from it, move" in str(caught.value)
            (run.path(2) / name).parent.mkdir(exist_ok=True)
            shutil.copy(path, run.path(2) / name)
    verify(run.path(2))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def test_advice_skips_corrupt_earlier_checkpoints(run):
    run.save(1, 2, 3)
    for step in (2, 3):
        flip_a_byte(run.path(step) / "params" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match="Step 1 is intact"):
        run.checkpointer.restore(3, run.abstract())
    flip_a_byte(run.path(1) / "params" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match="No earlier checkpoint is intact"):
        run.checkpointer.restore(3, run.abstract())


def test_inference_reads_parameters_without_the_optimizer(run):
    run.save(1)
    flip_a_byte(run.path(1) / "opt_state" / "manifest.ocdbt")
    loaded = load_checkpoint(run.path(1))
    assert_same(loaded.params, run.state.params)
    assert (loaded.step, loaded.config, loaded.tokenizer.id) == (1, run.config, "bytes")
    flip_a_byte(run.path(1) / "params" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"params/manifest\.ocdbt"):
        load_checkpoint(run.path(1))


def test_average_and_overrides_on_load(run, small_config, tmp_path):
    run.save(1)
    loaded = load_checkpoint(run.workdir, ema=True, overrides={"data.source": "other.txt"})
    assert_same(loaded.params, run.state.ema)
    assert loaded.config.data.source == "other.txt"
    plain = Run(small_config(), tmp_path / "plain")
    plain.save(1)
    with pytest.raises(CheckpointError, match=r"no moving average: .*train.ema_decay = 0"):
        load_checkpoint(plain.workdir, ema=True)


def test_parameters_of_another_shape_are_named_with_both_shapes(run):
    run.save(1)
    with pytest.raises(CheckpointError, match=r"embedding of params has shape \(264, 32\).* and has shape \(264, 64\)"):
        load_checkpoint(run.workdir, overrides={"model.d_model": 64})
    abstract = run.abstract()
    del abstract.params["norm"]
    with pytest.raises(
        CheckpointError, match=r"norm/scale of params has shape \(32,\) in the checkpoint and is missing in the config"
    ):
        run.checkpointer.check_shapes(1, abstract.params)


def test_directories_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=f"No checkpoint directory {tmp_path}/missing"):
        step_directory(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="has no checkpoints: expected a workdir"):
        step_directory(tmp_path)


def test_every_way_to_name_a_checkpoint(run):
    run.save(1, 2)
    assert step_directory(run.workdir) == run.path(2)
    assert step_directory(run.workdir / "checkpoints") == run.path(2)
    assert step_directory(run.workdir, 1) == run.path(1)
    assert step_directory(run.path(1)) == run.path(1)
    assert step_directory(run.path(1), 1) == run.path(1)


def test_newer_format_is_refused(run):
    run.save(1)
    path = run.path(1) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    write_manifest(run.path(1))
    with pytest.raises(CheckpointError, match="format 99, this m3jax reads 1: update m3jax"):
        load_checkpoint(run.workdir)


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def failed_write():
    """Waits for what a failed save leaves behind in orbax: reads and writes whose event loop is already closed."""
    yield
    time.sleep(0.3)
    gc.collect()


left_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@left_behind
@pytest.mark.usefixtures("failed_write")
def test_file_that_cannot_be_written_leaves_the_previous_checkpoint(run):
    run.save(1)
    with file_size_limit(2000), pytest.raises(CheckpointError) as caught:
        run.save(2)
    message = str(caught.value)
    assert str(run.path(2)) in message
    assert "File too large" in message and "checkpoint of step 1 is intact" in message
    assert [path.name for path in run.path(1).parent.iterdir()] == ["1"]
    run.checkpointer.restore(1, run.abstract())
    run.save(2)
    assert run.checkpointer.latest_step() == 2


@left_behind
@pytest.mark.usefixtures("failed_write")
def test_full_disk_leaves_the_previous_checkpoint(small_config, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system of limited size here")
    try:
        run = Run(small_config({"checkpoint.keep": 100}), tmp_path)
        with pytest.raises(CheckpointError, match=r"No space left on device.*checkpoint of step \d+ is intact"):
            run.save(*range(1, 100))
        run.checkpointer.restore(run.checkpointer.latest_step(), run.abstract())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
