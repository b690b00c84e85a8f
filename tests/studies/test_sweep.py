"""A sweep: killed and resumed it ends bit for bit where it would have; what is finished is not done again."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from filelock import FileLock

from m3jax.errors import CheckpointError
from m3jax.studies import sweep
from m3jax.studies.files import GroupFiles
from m3jax.studies.grid import make_groups
from m3jax.studies.report import write_report
from m3jax.training.interrupt import StopRequest
from m3jax.training.progress import LiveLine
from tests.studies.conftest import RECALL


class Killed(BaseException):
    """Like the process ending after a save."""


def run(study, workdir):
    assert sweep.run_sweep(study, workdir, make_groups(study))
    (group,) = make_groups(study)
    with np.load(workdir / "groups" / f"{group.name}.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "header"}
    results = json.loads((workdir / "groups" / f"{group.name}.json").read_text())["results"]
    return arrays, results


@pytest.fixture(scope="module")
def whole(small_study, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(small_study(), workdir)


def test_results(small_study, whole):
    workdir, (_, results) = whole
    assert results["steps"] == [3, 6, 9, 12] and len(results["runs"]) == 4
    assert results["parameters"] > 0 and results["seconds"] > 0
    for result in results["runs"]:
        assert list(result["test"]) == list(result["validation"]) == ["6", "4-12"]
        assert all(0 <= accuracy <= 1 for accuracy in result["test"].values())
        assert len(result["loss"]) == 4 and result["skipped_steps"] == 0
    paths = write_report(workdir, small_study(), "the command", None)
    assert [path.name for path in paths] == ["results.json", "results.md", "parity.png"]
    assert json.loads(paths[0].read_text())["groups"] == [results]


def test_steps_take_turns_and_every_setting_is_measured(small_study, tmp_path):
    study = small_study(**RECALL, model__d_state=16)
    _, results = run(study, tmp_path)
    for result in results["runs"]:
        assert list(result["test"]) == list(result["validation"]) == ["8/2", "16/4"]
    (group,) = make_groups(study)
    with jax.default_matmul_precision(study.train.matmul_precision):  # as in a sweep, whose programs it shares
        trainer = sweep.GroupTrainer(study, group, GroupFiles(tmp_path, study, group))
        *_, kind_and_place, (short, long) = trainer.block(3)
    assert kind_and_place.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert short.tokens.shape == (1, 2, 4, 8) and short.real.sum(axis=-1).tolist() == [[[2] * 4] * 2]
    assert long.tokens.shape == (2, 2, 4, 16) and long.real.sum(axis=-1).tolist() == [[[4] * 4] * 2, [[2] * 4] * 2]
    text = write_report(tmp_path, study, "the command", None)[1].read_text()
    assert "| at 8/2 | at 16/4 |" in text and f"| {results['parameters']:,} |" in text
    # Nor does a report fail for want of a model that was not trained because heads of 8 with states of 16 are not its.
    others = small_study(**RECALL | {"grid__models": "gdn,transformer"}, model__d_state=16)
    assert write_report(tmp_path, others, "the command", None)[1].read_text() == text


def test_a_group_that_another_process_has_is_left_to_it(small_study, tmp_path, capsys):
    study = small_study()
    (group,) = groups = make_groups(study)
    with GroupFiles(tmp_path, study, group).claimed() as holder, GroupFiles(tmp_path, study, group).claimed() as other:
        assert (holder, other) == (None, str(os.getpid()))
        assert sweep.run_sweep(study, tmp_path, groups)
        assert f"{group.name}: process {os.getpid()} trains it" in capsys.readouterr().out
    assert GroupFiles(tmp_path, study, group).load_results() is None
    with GroupFiles(tmp_path, study, group).claimed() as holder:
        assert holder is None


def test_reports_of_several_processes_wait_for_each_other(small_study, whole, tmp_path):
    with ThreadPoolExecutor() as threads:
        with FileLock(tmp_path / ".report.lock"):
            writing = threads.submit(write_report, tmp_path, small_study(), "the command", None)
            with pytest.raises(TimeoutError):
                writing.result(timeout=0.2)
            assert not (tmp_path / "results.json").exists()
            shutil.copytree(whole[0] / "groups", tmp_path / "groups", dirs_exist_ok=True)
        written = json.loads(writing.result()[0].read_text())
    assert written["groups"] == [whole[1][1]]


def test_packed_rows_are_half_as_many(small_study, tmp_path):
    study = small_study(train__packed=True)
    (group,) = make_groups(study)
    *_, (questions,) = sweep.GroupTrainer(study, group, GroupFiles(tmp_path, study, group)).block(6)
    shapes = {name: v.shape for name, v in questions._asdict().items()}
    assert shapes["tokens"] == shapes["documents"] == (3, 2, 2, 16) and shapes["targets"] == (3, 2, 2, 2)


def test_a_stage_may_have_a_shortest_length_of_its_own(small_study, tmp_path):
    study = small_study(train__packed=True, train__stages="8:6,16 14-16 14-16:6", train__array_lengths="8,16")
    (group,) = make_groups(study)
    *_, kind_and_place, (all_lengths, long) = sweep.GroupTrainer(
        study, group, GroupFiles(tmp_path, study, group)
    ).block(6)
    assert kind_and_place.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert all_lengths.tokens.shape == (1, 2, 2, 24) and long.tokens.shape == (2, 2, 2, 32)
    apart = small_study(train__stages="8:6,16 14-16 14-16:6", train__array_lengths="8,16")
    *_, one_kind = sweep.GroupTrainer(apart, group, GroupFiles(tmp_path, apart, group)).block(6)
    assert [of_kind.tokens.shape for of_kind in one_kind] == [(3, 2, 4, 16)]
    # A sequence of parity asks after its last bit: lengths n count the answer, so the first question is at n - 2.
    first = long.positions[..., 0]
    assert first.min() >= 12 and first.max() <= 14


def test_a_task_may_be_trained_with_the_sequences_of_another(small_study, tmp_path):
    name, times = "modular_arithmetic_brackets", 7
    for drawn_as, has_times in (("", True), (f"{name}:{name}_without_times", False)):
        study = small_study(
            grid__tasks=f"{name}:1", train__stages="8:3", train__batch_size=64, train__drawn_as=drawn_as
        )
        (group,) = make_groups(study)
        *_, (drawn,) = sweep.GroupTrainer(study, group, GroupFiles(tmp_path, study, group)).block(0)
        assert np.any(np.asarray(drawn.tokens) == times) == has_times
        assert group.task(study.evaluation.spans[0]).name == name


def test_what_is_compiled_ahead_is_what_runs(small_study, tmp_path, monkeypatch, caplog):
    study = small_study(train__batch_size=6, train__stages="4:6,16:6", train__array_lengths="4,16")
    (group,) = make_groups(study)

    def compilations(name):
        return sum(f"compilation of jit({name})" in record.getMessage() for record in caplog.records)

    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sweep.jax, "default_backend", lambda: "gpu")
            with sweep._compiled_ahead(study, tmp_path, [group]) as compiled:
                compiled(group)
        assert (compilations("train_block"), compilations("count_correct")) == (2, 2)
        caplog.clear()
        run(study, tmp_path)
        assert (compilations("train_block"), compilations("count_correct")) == (0, 0)
    finally:
        jax.config.update("jax_log_compiles", False)


def dying_after(step):
    """GroupFiles.save_training that is killed once it has saved a training of so many steps."""
    save = GroupFiles.save_training

    def save_and_die(self, training):
        save(self, training)
        if training.step == step:
            raise Killed

    return save_and_die


def test_killed_and_resumed_is_bit_equal(small_study, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GroupFiles, "save_training", dying_after(6))
        with pytest.raises(Killed):
            run(small_study(), tmp_path)
    arrays, results = run(small_study(), tmp_path)
    expected_arrays, expected = whole[1]
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected_arrays[name])
    assert results["runs"] == expected["runs"] and results["steps"] == expected["steps"]


def test_a_group_ends_when_all_seeds_of_a_learning_rate_have_learned(small_study, tmp_path):
    study = small_study(train__stop_accuracy=0.9)
    (group,) = make_groups(study)
    trainer = sweep.GroupTrainer(study, group, GroupFiles(tmp_path, study, group))
    for last, ends in (([1.0, 0.5, 0.5, 1.0], False), ([0.5, 0.5, 0.9, 1.0], True), ([0.9, 0.9, 0.5, 0.5], True)):
        trainer.training.curves["accuracy"] = [[1.0] * 4, last]
        assert trainer._learned() == ends
    assert trainer.train(None, None, "") and trainer.training.step == 0


def test_every_run_keeps_what_was_best_at_validation(small_study, tmp_path, monkeypatch):
    """Of averages, also across a restart; accuracies are given, what was measured is looked at."""
    study = small_study(train__validate_every=3, train__stop_accuracy=0.99, train__ema_decay=0.5)
    (group,) = make_groups(study)
    given = {3: [0.9, 0.2, 0.2, 0.2], 6: [0.9, 0.5, 0.2, 0.1], 9: [0.1, 0.4, 1.0, 0.1], 12: [0.1, 0.4, 0.1, 0.3]}
    best = [6, 6, 9, 12]  # of two that are alike, the later
    measured = {}

    def measure(name, study, group, params):
        step = 3 * len(measured) + 3
        measured[step] = jax.tree.map(np.asarray, params)
        return {"a": [v - 0.05 for v in given[step]], "b": [v + 0.05 for v in given[step]]}

    monkeypatch.setattr(sweep, "measure_on", measure)

    def train():
        with jax.default_matmul_precision("float32"), LiveLine() as line, StopRequest() as stop:  # as in a sweep
            trainer = sweep.GroupTrainer(study, group, GroupFiles(tmp_path, study, group))
            assert trainer.train(line, stop, "")
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(GroupFiles, "save_training", dying_after(6))
        with pytest.raises(Killed):
            train()
    trainer = train()
    assert trainer.training.curves["validated_step"] == [3, 6, 9, 12]
    np.testing.assert_allclose(trainer.training.curves["validated"], list(given.values()))
    jax.tree.map(np.testing.assert_array_equal, measured[12], trainer.training.state.ema)
    for number, step in enumerate(best):
        for kept, then in zip(jax.tree.leaves(trainer.params), jax.tree.leaves(measured[step]), strict=True):
            np.testing.assert_array_equal(kept[number], then[number])
    assert not trainer._learned()
    trainer.training.kept = trainer.training.kept._replace(accuracy=np.array([0.3, 0.995, 0.99, 0.4]))
    assert not trainer._learned()
    trainer.training.kept = trainer.training.kept._replace(accuracy=np.array([0.3, 0.9, 0.99, 1.0]))
    assert trainer._learned()


def test_finished_groups_are_skipped_and_only_measured_again(small_study, whole, monkeypatch):
    workdir, (_, before) = whole
    monkeypatch.setattr(sweep, "train_block", None)  # nothing is trained
    assert run(small_study(), workdir)[1] == before
    monkeypatch.setattr(sweep, "evaluate_group", lambda *_: {"validation": {"5": [0.5] * 4}, "test": {"5": [0.5] * 4}})
    again = run(small_study(evaluation__lengths="5"), workdir)[1]
    assert again["runs"][0]["test"] == {"5": 0.5} and again["runs"][0]["loss"] == before["runs"][0]["loss"]


def test_another_study_is_refused(small_study, whole):
    workdir, _ = whole
    for key, value in (("train__batch_size", 8), ("grid__seeds", 3), ("optimizer__beta2", 0.9)):
        study = small_study(**{key: value})
        with pytest.raises(CheckpointError, match=key.split("__")[1] if key != "grid__seeds" else "runs"):
            sweep.run_sweep(study, workdir, make_groups(study))


def test_damaged_file_is_named(small_study, tmp_path):
    study = small_study()
    (group,) = make_groups(study)
    files = GroupFiles(tmp_path, study, group)
    path = tmp_path / "groups" / f"{group.name}.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match=rf"{group.name}\.npz cannot be read"):
        files.load_training(None)
