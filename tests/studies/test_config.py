"""Studies: lists in texts, groups of a grid, every preset, and messages that name the key."""

from pathlib import Path

import pytest

from m3jax.cli import Parser, read_config
from m3jax.errors import ConfigError
from m3jax.studies.config import Span, Stage, StudyConfig, build_study
from m3jax.studies.grid import Run, make_groups

_PRESETS = sorted((Path(__file__).parents[2] / "experiments/state_tracking/configs").glob("*.py"))


def test_lists(small_study):
    study = small_study(grid__tasks="parity:1, s3:2", grid__widths="8,16", grid__length_shifts="parity:1")
    assert study.grid.task_layers == (("parity", 1), ("s3", 2))
    assert (study.grid.d_models, study.grid.rates) == ((8, 16), (3e-3, 1e-2))
    assert (study.grid.shift("parity"), study.grid.shift("s3")) == (1, 0)
    assert study.train.curriculum == (Stage(4, 6), Stage(8, 6)) and study.train.steps == 12
    assert study.evaluation.spans == (Span(6, 6), Span(4, 12))
    assert [span.label for span in study.evaluation.spans] == ["6", "4-12"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid.tasks", "parity", "config.grid.tasks = 'parity': expected TASK:LAYERS items with commas between."),
        ("grid.tasks", "parety:1", "task 'parety': not known. Did you mean 'parity'?"),
        ("grid.tasks", "parity:0", "config.grid.tasks = 'parity:0': expected at least one layer"),
        ("grid.models", "mamba3_sisso", "Did you mean 'mamba3_siso'?"),
        ("grid.models", "mamba2,", "expected names of models with commas between"),
        ("grid.widths", "8,x", "config.grid.widths = '8,x': expected widths with commas between."),
        ("grid.learning_rates", "0", "config.grid.learning_rates = '0': expected positive numbers."),
        ("grid.seeds", 0, "config.grid.seeds = 0: expected at least 1."),
        ("optimizer.learning_rate", 0.5, "grid.learning_rates has the learning rates"),
        ("optimizer.beta1", 1.0, "config.optimizer.beta1 = 1.0"),
        ("train.stages", "4:6,8", "config.train.stages = '4:6,8': expected LENGTH:STEPS items"),
        ("train.block_steps", 5, "config.train.block_steps = 5: expected a divisor of the 12 steps of train.stages."),
        ("train.array_lengths", "4", "config.train.array_lengths = '4': expected one of at least 8"),
        ("train.shortest", 1, "config.train.stages = '1-4': expected lengths in ascending order, for parity of at"),
        ("train.matmul_precision", "float16", "config.train.matmul_precision = 'float16': expected one of float32"),
        ("evaluation.lengths", "8-4", "config.evaluation.lengths = '8-4': expected lengths in ascending order"),
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
    assert (last.model.vocab_size, last.span(3, 40), last.width(40, True)) == (16, Span(4, 41), 48)
    assert [g.name for g in make_groups(study, ["parity"], ["gdn"])] == ["parity-gdn-8", "parity-gdn-16"]
    with pytest.raises(ConfigError, match="Did you mean 'parity'"):
        make_groups(study, ["parit"])


@pytest.mark.parametrize("path", _PRESETS, ids=lambda path: path.stem)
def test_presets(path):
    study = read_config(path, {}, build_study)
    grid = study.grid
    groups = make_groups(study)
    assert len(groups) == len(grid.task_layers) * len(grid.d_models) * len(grid.model_names)
    assert len({group.name for group in groups}) == len(groups)
    assert all(len(group.runs) == len(grid.rates) * grid.seeds for group in groups)


def test_paper_preset_is_the_paper_s_sweep():
    study = read_config(_PRESETS[[path.stem for path in _PRESETS].index("mamba3_paper")], {}, build_study)
    assert study.train.steps == 10_000 and study.train.batch_size == 256 and study.train.shortest == 3
    longest = [stage.longest for stage in study.train.curriculum]
    assert (longest[0], longest[-1]) == (40, 160) and longest == sorted(longest)
    assert study.grid.d_models == (32, 64) and len(study.grid.rates) == 8
    assert study.evaluation.spans == (Span(256, 256),)


def test_command_line_overrides_keys_of_a_study():
    parser = Parser("experiments/state_tracking/sweep.py", "A study.", StudyConfig)
    _, overrides = parser.parse(["--config.grid.widths=8", "--config.train.bos"])
    assert overrides == {"grid.widths": "8", "train.bos": True}
    with pytest.raises(ConfigError, match=r"Did you mean config\.grid\.widths\?"):
        parser.parse(["--config.grid.width=8"])
