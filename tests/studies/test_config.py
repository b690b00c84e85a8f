"""Studies: lists in texts, groups of a grid, every preset, and messages that name the key."""

import dataclasses
import math
from pathlib import Path

import pytest

from m3jax.cli import Parser, read_config
from m3jax.errors import ConfigError
from m3jax.studies.config import Span, Stage, StudyConfig, build_study
from m3jax.studies.grid import Run, make_groups
from m3jax.studies.models import state_bytes
from tests.studies.conftest import RECALL

_EXPERIMENTS = Path(__file__).parents[2] / "experiments"
_PRESETS = sorted(
    path for study in ("recall", "state_tracking") for path in (_EXPERIMENTS / study / "configs").glob("*.py")
)


def test_lists(small_study):
    study = small_study(grid__tasks="parity:1, s3:2", grid__widths="8,16", grid__length_shifts="parity:1")
    assert study.grid.task_layers == (("parity", 1), ("s3", 2))
    assert (study.grid.d_models, study.grid.rates) == ((8, 16), (3e-3, 1e-2))
    assert (study.grid.shift("parity"), study.grid.shift("s3")) == (1, 0)
    assert study.train.curriculum == (Stage((Span(3, 4),), 6), Stage((Span(3, 8),), 6)) and study.train.steps == 12
    assert study.evaluation.spans == (Span(6, 6), Span(4, 12))
    assert [span.label for span in study.evaluation.spans] == ["6", "4-12"]


def test_lengths_that_alternate_and_numbers_of_pairs(small_study):
    study = small_study(**RECALL)
    assert study.train.curriculum == (Stage((Span(8, 8, 2), Span(16, 16, 4), Span(16, 16, 2)), 6),)
    assert study.evaluation.spans == (Span(8, 8, 2), Span(16, 16, 4))
    assert [span.label for span in study.evaluation.spans] == ["8/2", "16/4"]
    assert [span.task("mqar_few").name for span in study.training_spans] == ["mqar_few_2", "mqar_few_4", "mqar_few_2"]


def test_lengths_of_recall_are_even(small_study):
    for key, value, label in (
        ("train__stages", "13-16/2:6", "13-16/2"),
        ("evaluation__lengths", "8/2,17/4", "17/4"),
        ("grid__length_shifts", "mqar_few:1", "8/2"),
    ):
        with pytest.raises(ConfigError, match=f"= '{label}': expected (even|odd) lengths for mqar_few_[24]"):
            small_study(**RECALL | {key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid.tasks", "parity", "config.grid.tasks = 'parity': expected TASK:LAYERS items with commas between."),
        ("grid.tasks", "parety:1", "task 'parety': not known. Did you mean 'parity'?"),
        ("grid.tasks", "parity:0", "config.grid.tasks = 'parity:0': expected at least one layer"),
        ("grid.models", "mamba3_sisso", "Did you mean 'mamba3_siso'?"),
        ("grid.models", "mamba2@x", "config.grid.models = 'mamba2@x': expected a model's name, or NAME@WIDTH"),
        ("grid.models", "mamba2,", "expected names of models with commas between"),
        ("grid.widths", "8,x", "config.grid.widths = '8,x': expected widths with commas between."),
        ("grid.learning_rates", "0", "config.grid.learning_rates = '0': expected positive numbers."),
        ("grid.seeds", 0, "config.grid.seeds = 0: expected at least 1."),
        ("grid.initial_steps", "0.1", "config.grid.initial_steps = '0.1': expected ranges MIN-MAX with commas"),
        ("grid.initial_steps", "1-0.1", "config.grid.initial_steps = '1-0.1': expected ranges of positive numbers"),
        ("optimizer.learning_rate", 0.5, "grid.learning_rates has the learning rates"),
        ("optimizer.beta1", 1.0, "config.optimizer.beta1 = 1.0"),
        ("train.stages", "4:6,8", "config.train.stages = '4:6,8': expected LENGTH:STEPS"),
        ("train.stages", "4:9, :3", "config.train.stages = '4:9, :3': expected at least one length for every stage"),
        ("train.drawn_as", "s3:a4", "config.train.drawn_as = 's3'"),
        ("train.drawn_as", "parity:s3", "config.train.drawn_as = 'parity:s3': expected a task with the tokens and len"),
        ("train.stages", "8-4:12", "config.train.stages = '8-4': expected lengths in ascending order"),
        ("train.stages", "4/2:12", "task 'parity_2': not known."),
        ("train.stages", "4 8:9,8:3", "config.train.block_steps = 3: expected a multiple of the 2 lengths"),
        ("train.runs_at_once", 3, "config.train.runs_at_once = 3: expected 0 or a divisor of the 4 runs of a group."),
        ("train.block_steps", 5, "config.train.block_steps = 5: expected a divisor of the 12 steps of train.stages."),
        ("train.batch_size", 0, "config.train.batch_size = 0: expected at least 1."),
        ("train.array_lengths", "4", "config.train.array_lengths = '4': expected one of at least 8"),
        ("train.shortest", 1, "config.train.stages = '1-4': expected lengths in ascending order, for parity of at"),
        ("train.label_smoothing", 1.0, "config.train.label_smoothing = 1.0: expected 0 or a share under 1."),
        ("train.stop_accuracy", 1.5, "config.train.stop_accuracy = 1.5: expected 0 or a share of the answers."),
        ("train.ema_decay", 1.0, "config.train.ema_decay = 1.0: expected a number in [0, 1)"),
        ("train.validate_every", 4, "config.train.validate_every = 4: expected 0 or a multiple of the 3 steps"),
        ("train.matmul_precision", "float16", "config.train.matmul_precision = 'float16': expected one of float32"),
        ("evaluation.lengths", "8-4", "config.evaluation.lengths = '8-4': expected lengths in ascending order"),
        ("evaluation.lengths", "8/", "config.evaluation.lengths = '8/': expected lengths N or N-N"),
        ("evaluation.lengths", "a", "config.evaluation.lengths = 'a': expected lengths N or N-N"),
        ("evaluation.sequences", 0, "config.evaluation.sequences = 0"),
        ("train.stage", "4:3", "Unknown key config.train.stage. Did you mean 'stages'?"),
        ("model.d_conv", 1, "config.model.d_conv = 1"),
    ],
)  # fmt: skip
def test_errors_name_the_key(small_study, key, value, message):
    with pytest.raises(ConfigError) as error:
        small_study(**{key.replace(".", "__"): value})
    assert message in str(error.value)


def test_groups(small_study):
    study = small_study(grid__tasks="parity:1,modular_arithmetic:2", grid__widths="8,16", grid__models="mamba2,gdn",
                        grid__length_shifts="modular_arithmetic:1", model__d_state=8)  # fmt: skip
    groups = make_groups(study)
    assert [group.name for group in groups[:4]] == [
        "parity-mamba2-8", "parity-gdn-8", "parity-mamba2-16", "parity-gdn-16",
    ]  # fmt: skip
    assert groups[0].runs == (Run(3e-3, 0), Run(3e-3, 1), Run(1e-2, 0), Run(1e-2, 1))
    last = groups[-1]
    assert (last.model.n_layers, last.model.d_model, last.model.gdn_heads, last.model.gdn_headdim) == (2, 16, 2, 8)
    assert (last.model.vocab_size, last.width(Span(3, 40), True)) == (16, 48)
    assert [g.name for g in make_groups(study, ["parity"], ["gdn"])] == ["parity-gdn-8", "parity-gdn-16"]
    with pytest.raises(ConfigError, match="Did you mean 'parity'"):
        make_groups(study, ["parit"])
    with pytest.raises(ConfigError, match="headdim = 8: expected a multiple of"):
        make_groups(small_study(grid__models="gdn", model__d_state=16))


def test_initial_steps_are_a_setting_of_models_that_have_steps(small_study):
    groups = make_groups(small_study(grid__models="mamba2,transformer", grid__initial_steps="0.001-0.1,0.5-1"))
    assert [group.name for group in groups] == [
        "parity-mamba2-8-0.001-0.1",
        "parity-mamba2-8-0.5-1",
        "parity-transformer-8",
    ]
    assert [(group.model.dt_min, group.model.dt_max) for group in groups[:2]] == [(0.001, 0.1), (0.5, 1.0)]


@pytest.mark.parametrize("path", _PRESETS, ids=lambda path: path.stem)
def test_presets(path):
    study = read_config(path, {}, build_study)
    grid = study.grid
    groups = make_groups(study)
    assert len(groups) == len(grid.task_layers) * len(grid.d_models) * len(grid.model_names) * len(grid.step_ranges)
    assert len({group.name for group in groups}) == len(groups)
    assert all(len(group.runs) == len(grid.rates) * grid.seeds for group in groups)


def test_models_with_states_of_their_own():
    study = read_config(_EXPERIMENTS / "recall/configs/zoology.py", {}, build_study)
    groups = {group.model_name: group for group in make_groups(study)}
    wide, narrow = groups["mamba3_mimo@128"].model, groups["mamba3_mimo@64"].model
    assert wide == dataclasses.replace(narrow, d_state=128) and narrow.d_state == 64
    assert groups["hybrid@64"].model.mixer_pattern == ("mamba3", "attention")
    cache = 2 * 4 * 64 * 4  # bytes of a position in a layer: keys and values, heads, width, float32
    small = 2 * 4  # two numbers of a cache that say where it is
    assert state_bytes(groups["transformer"].model, 10) == 2 * (10 * cache + small)
    # Two layers of four heads: state, last B, last x, angles.
    assert state_bytes(groups["mamba3_siso@64"].model, 10) == 2 * 4 * 4 * (64 * 64 + 64 + 64 + 16)


def test_recall_preset_is_the_sweep_of_its_source():
    study = read_config(_EXPERIMENTS / "recall/configs/zoology.py", {}, build_study)
    ((cycle, steps),) = study.train.curriculum
    settings = {(64, 4): 100_000, (128, 8): 20_000, (256, 16): 20_000, (256, 32): 20_000, (256, 64): 20_000}
    for (length, pairs), sequences in settings.items():
        theirs = 32 * -(-sequences // study.train.batch_size)
        ours = steps * cycle.count(Span(length, length, pairs)) / len(cycle)
        assert abs(ours / theirs - 1) < 0.01
    assert set(cycle) == {Span(length, length, pairs) for length, pairs in settings}
    assert study.grid.rates[0] == 1e-3 and abs(math.log10(study.grid.rates[-1]) + 1.5) < 1e-3


def test_paper_preset_is_the_paper_s_sweep():
    study = read_config(_EXPERIMENTS / "state_tracking/configs/mamba3_paper.py", {}, build_study)
    assert study.train.steps == 10_000 and study.train.batch_size == 256 and study.train.shortest == 3
    longest = [stage.spans[0].longest for stage in study.train.curriculum]
    assert (longest[0], longest[-1]) == (40, 160) and longest == sorted(longest)
    assert study.grid.d_models == (32, 64) and len(study.grid.rates) == 8
    assert study.evaluation.spans == (Span(256, 256),)


def test_command_line_overrides_keys_of_a_study():
    parser = Parser("experiments/state_tracking/sweep.py", "A study.", StudyConfig)
    _, overrides = parser.parse(["--config.grid.widths=8", "--config.train.bos"])
    assert overrides == {"grid.widths": "8", "train.bos": True}
    with pytest.raises(ConfigError, match=r"Did you mean config\.grid\.widths\?"):
        parser.parse(["--config.grid.width=8"])
