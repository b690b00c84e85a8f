"""The command line: overrides of every type, and messages that name the fix."""

import errno
import sys

import pytest

from m3jax.cli import Parser, read_config, run_main
from m3jax.config import default_config
from m3jax.errors import ConfigError, TrainingError

PARSER_FLAGS = ("--workdir", "--checkpoint")


def parse(*argv):
    parser = Parser("m3jax.test", "A program.")
    for flag in PARSER_FLAGS:
        parser.add_argument(flag)
    return parser.parse(argv)


def write_config(path, body):
    path.write_text(f"from m3jax.config import default_config\n\n\ndef get_config():\n    {body}\n")
    return path


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--config.train.steps=7"], "train.steps", 7),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["--config.train.steps=190_735"], "train.steps", 190_735),
        (["--config.optimizer.learning_rate=3e-4"], "optimizer.learning_rate", 3e-4),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.data.source=a=b*.txt"], "data.source", "a=b*.txt"),
        (["--config.data.source="], "data.source", ""),
        (["--config.data.source=None"], "data.source", "None"),
        (["--config.train.tensorboard=true"], "train.tensorboard", True),
        (["--config.train.tensorboard", "False"], "train.tensorboard", False),
        (["--config.train.tensorboard"], "train.tensorboard", True),
        (["--config.train.tensorboard", "--workdir", "w"], "train.tensorboard", True),
        (["--config.model.chunk_size=64"], "model.chunk_size", 64),
        (["--config.model.chunk_size=None"], "model.chunk_size", None),
        (["--config.data.cache_dir=none"], "data.cache_dir", None),
        (["--config.mesh.data=-1"], "mesh.data", -1),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.train.steps=7", "--config.train.steps=8"], "train.steps", 8),
    ],
)
def test_override_values(argv, key, value):
    _, overrides = parse(*argv)
    assert overrides == {key: value} and type(overrides[key]) is type(value)


def test_flags_and_overrides_mix():
    arguments, overrides = parse("--workdir", "w", "--config.train.seed=1", "--checkpoint=c")
    assert (arguments.workdir, arguments.checkpoint, overrides) == ("w", "c", {"train.seed": 1})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.train.stpes=7"], r"Unknown key config.train.stpes. Did you mean config.train.steps\?"),
        (["--config.steps=7"], r"Unknown key config.steps. Did you mean config.train.steps\?"),
        (["--config.tran.seed=7"], r"Unknown key config.tran.seed. Did you mean config.(train|data).seed\?"),
        (["--config.qqq.zzz=7"], "Groups: model, data, optimizer, train, checkpoint, mesh"),
        (["--config.mesh=7"], "Unknown key config.mesh. It is a group of keys: mesh.data, mesh.fsdp"),
        (["--config.train.steps=1e3"], "config.train.steps = '1e3': expected an integer"),
        (["--config.train.steps=None"], "config.train.steps = 'None': expected an integer"),
        (["--config.optimizer.eps=small"], "config.optimizer.eps = 'small': expected a number"),
        (["--config.train.tensorboard=maybe"], "config.train.tensorboard = 'maybe': expected true or false"),
        (["--config.model.chunk_size=x"], "config.model.chunk_size = 'x': expected an integer or None"),
        (["--config.train.steps"], "config.train.steps has no value: expected an integer, as in --config.train.steps="),
        (["--config.train.steps", "--workdir", "w"], "config.train.steps has no value"),
        (["--wrkdir", "w"], r"Unknown argument --wrkdir. Did you mean --workdir\?"),
        (["--zzz"], "Unknown argument --zzz. Valid flags: --help, --workdir, --checkpoint"),
        (["--steps", "7"], r"Unknown argument --steps. Did you mean --config.train.steps\?"),
        (["--train.steps=7"], r"Unknown argument --train.steps=7. Did you mean --config.train.steps\?"),
        (["stray"], "Unknown argument stray"),
        (["--work", "w"], "Unknown argument --work. Did you mean --workdir"),
        (["--workdir"], "Argument --workdir: expected one argument. See python -m m3jax.test --help"),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_config_file_with_overrides(tmp_path):
    path = write_config(
        tmp_path / "c.py", "c = default_config(); c.model.d_model = 128; c.train.steps = 5000; return c"
    )
    config = read_config(path, {"train.steps": 2000})
    assert (config.model.d_model, config.train.steps) == (128, 2000)


def test_override_that_does_not_fit_the_file(tmp_path):
    path = write_config(tmp_path / "c.py", "return default_config()")
    with pytest.raises(ConfigError, match=r"config.model.headdim = 100: expected a divisor of .* = 1536"):
        read_config(path, {"model.headdim": 100})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c = default_config(); c.model.d_modl = 1; return c", r"line 5: .*d_modl.*"),
        ("c = default_config(); c.model.d_model = '1'; return c", "config.model.d_model = '1' is a str: expected int"),
        ("return {}", "get_config\\(\\) returned a dict, expected a ConfigDict"),
        ("return 1 / 0", "c.py: line 5: ZeroDivisionError"),
        ("return (", "c.py: line 5: SyntaxError"),
    ],
)
def test_bad_config_files(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write_config(tmp_path / "c.py", body))


def test_config_file_without_get_config(tmp_path):
    (tmp_path / "c.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"c.py: it defines no get_config\(\)"):
        read_config(tmp_path / "c.py")


def test_missing_config_file_names_the_nearest(tmp_path):
    write_config(tmp_path / "tiny_mimo.py", "return default_config()")
    with pytest.raises(ConfigError, match=r"No config file .*tiny_mino.py. Did you mean .*tiny_mimo.py\?"):
        read_config(tmp_path / "tiny_mino.py")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TrainingError("Step 3: bad."), "error: Step 3: bad.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "error: /x/y: No space left on device\n"),
    ],
)
def test_errors_for_the_user_are_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(raising(error))
    assert caught.value.code == 2
    assert capsys.readouterr().err == line


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))
    with pytest.raises(OSError, match="odd"):
        run_main(raising(OSError(errno.EINVAL, "odd")))


def test_success_exits_with_zero():
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: None)
    assert caught.value.code == 0


def test_arguments_default_to_those_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--config.train.seed=3"])
    assert Parser("m3jax.test", "A program.").parse()[1] == {"train.seed": 3}


def test_default_config_is_locked():
    config = default_config()
    with pytest.raises(AttributeError, match="d_modl"):
        config.model.d_modl = 1
