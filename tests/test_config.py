"""The check of a whole configuration: what passes, and what each error says."""

import dataclasses
import re
from pathlib import Path

import pytest

from m3jax.config import Config, build_config, config_to_dict, default_config, override
from m3jax.errors import ConfigError


def build(**changes):
    return build_config(override(default_config().to_dict(), {k.replace("__", "."): v for k, v in changes.items()}))


def test_defaults_pass_and_survive_a_round_trip():
    assert build_config(default_config()) == Config()
    assert build_config(config_to_dict(Config())) == Config()
    assert build_config({}) == Config()


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 1


def test_override_leaves_the_original_alone():
    values = {"train": {"steps": 1}}
    assert override(values, {"train.steps": 2, "data.seed": 3}) == {"train": {"steps": 2}, "data": {"seed": 3}}
    assert values == {"train": {"steps": 1}}


def test_integers_serve_as_numbers():
    assert build(optimizer__learning_rate=1).optimizer.learning_rate == 1.0


def test_derived_sizes():
    model = build(model__vocab_size=258, model__d_intermediate=1500).model
    assert (model.padded_vocab_size, model.d_mlp, model.d_inner, model.n_heads, model.n_angles) == (
        264,
        1536,
        1536,
        24,
        32,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__d_modl": 1}, r"Unknown key config.model.d_modl. Did you mean 'd_model'\?"),
        ({"modle__d_model": 1}, r"Unknown key config.modle. Did you mean 'model'\?"),
        ({"train__qqqq": 1}, "Unknown key config.train.qqqq. Valid keys: .*steps"),
        ({"model__d_model": "8"}, "config.model.d_model = '8' is a str: expected int"),
        ({"model__d_model": True}, "config.model.d_model = True is a bool: expected int"),
        ({"model__d_model": 8.0}, "config.model.d_model = 8.0 is a float: expected int"),
        ({"model__chunk_size": 1.5}, "config.model.chunk_size = 1.5 is a float: expected int or None"),
        ({"optimizer__eps": float("nan")}, "config.optimizer.eps = nan: expected a finite number"),
        ({"data__source": None}, "config.data.source = None is a NoneType: expected str"),
        ({"model__n_layers": 0}, "config.model.n_layers = 0: expected at least 1"),
        ({"model__headdim": 100}, "config.model.headdim = 100: expected a divisor of expand \\* d_model = 1536"),
        ({"model__ngroups": 5}, "config.model.ngroups = 5: expected a divisor of the 24 heads"),
        ({"model__rope_fraction": 0.3}, "config.model.rope_fraction = 0.3: expected 0, 0.5 or 1"),
        ({"model__rotation": "rope"}, "config.model.rotation = 'rope': expected one of data, standard"),
        ({"model__fixed_lambda": 0}, r"config.model.fixed_lambda = 0.0: expected None or a number in \(0, 1\]"),
        ({"model__fixed_lambda": 1.5}, r"config.model.fixed_lambda = 1.5: expected None or a number in \(0, 1\]"),
        ({"model__d_state": 130, "model__rope_fraction": 0.5}, "config.model.d_state = 130"),
        (
            {"model__remat": "ful"},
            r"config.model.remat = 'ful': expected one of none, dots, full. Did you mean 'full'\?",
        ),
        (
            {"model__scan_implementation": "tritn"},
            r"scan_implementation = 'tritn': expected one of mosaic, reference, triton, xla. Did you mean 'triton'\?",
        ),
        ({"model__dtype": "float16"}, "config.model.dtype = 'float16': expected one of float32, bfloat16, float64"),
        ({"model__dt_min": 0.5}, r"config.model.dt_min = 0.5: expected a number in \(0, dt_max = 0.1\]"),
        ({"data__holdout": 1.0}, r"config.data.holdout = 1.0: expected a share in \[0, 1\)"),
        ({"data__batch_size": 0}, "config.data.batch_size = 0: expected at least 1"),
        ({"train__grad_accumulation": 3}, "config.train.grad_accumulation = 3: expected a divisor of .* = 256"),
        ({"train__stop_at": 200_000}, r"config.train.stop_at = 200000: expected None or a step in \[1, .* = 190735\]"),
        ({"optimizer__warmup_fraction": 1.5}, r"config.optimizer.warmup_fraction = 1.5: expected a share in \[0, 1\]"),
        (
            {"optimizer__schedule": "wsd", "optimizer__warmup_fraction": 0.5, "optimizer__decay_fraction": 0.6},
            r"config.optimizer.decay_fraction = 0.6: expected a share in \(0, 0.5\], what the warm-up leaves",
        ),
        ({"train__nonfinite": "ignore"}, "config.train.nonfinite = 'ignore': expected one of stop, skip, rollback"),
        ({"train__ema_decay": 1.0}, r"config.train.ema_decay = 1.0: expected a number in \[0, 1\)"),
        ({"optimizer__schedule": "cosin"}, r"Did you mean 'cosine'\?"),
        ({"optimizer__beta2": 1.0}, r"config.optimizer.beta2 = 1.0: expected a number in \[0, 1\)"),
        ({"optimizer__clip_norm": 0.0}, "config.optimizer.clip_norm = 0.0: expected a positive number"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep = 0: expected at least 1"),
        ({"mesh__data": 0}, "config.mesh.data = 0: expected -1 or at least 1"),
        ({"mesh__fsdp": -1}, "config.mesh.fsdp = -1: expected at least 1"),
    ],
)
def test_what_an_error_says(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_group_that_is_not_one():
    with pytest.raises(ConfigError, match=r"config.model = 3: expected a group of keys"):
        build_config({"model": 3})


def test_every_training_key_is_in_the_user_page():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    for group in ("optimizer", "train", "checkpoint", "mesh"):
        keys = config_to_dict(Config())[group]
        section = page.split(f"`config.{group}.`")[1].split("\n\n")[0]
        assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in section.splitlines()[2:]))) == set(
            keys
        )
