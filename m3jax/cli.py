"""The command line: a config file, `--config.a.b=value` overrides, a program's own flags, and errors in one line.

Every program of m3jax is `main(argv) -> None` under `run_main`. Overrides are checked against the fields of the
program's config class before anything else is built, on a config file's values and on those stored with a checkpoint.
"""

import argparse
import dataclasses
import difflib
import errno
import os
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from m3jax.config import Config, build_config, override
from m3jax.errors import ConfigError, M3jaxError
from m3jax.kernels.choice import CannotRunHereError

_PREFIX = "--config."
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
# What the machine refuses or a path lacks, as opposed to a bug here: shown as one line, like an M3jaxError.
_MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)

Overrides = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """An argument parser that leaves `--config.*` to this module and raises ConfigError instead of exiting."""

    def __init__(self, program: str, description: str, config: type = Config):
        """Without flags of its own; `config` is the dataclass whose keys can be changed."""
        self._config = config
        super().__init__(
            prog=f"python {program}" if program.endswith(".py") else f"python -m {program}",
            description=description,
            epilog="Any key of the config can be changed with --config.GROUP.KEY=VALUE.",
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise ConfigError(f"{message[0].upper()}{message[1:]}. See {self.prog} --help.")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Overrides]:
        """Parses a command line.

        Args:
          argv: the arguments after the program's name; None = those of this process.

        Returns:
          The program's own flags, and the overrides as {"a.b": value}.

        Raises:
          ConfigError: an unknown flag or config key (with the nearest valid one), a missing or mistyped value.
        """
        rest, overrides = _take_overrides(list(sys.argv[1:] if argv is None else argv), self._config)
        for argument in rest:  # before argparse, which would complain of a required flag that was mistyped
            if argument.startswith("--") and argument.split("=")[0] not in self._option_string_actions:
                self._refuse(argument)
        arguments, unknown = self.parse_known_args(rest)
        if unknown:
            self._refuse(unknown[0])
        return arguments, overrides

    def _refuse(self, argument: str) -> NoReturn:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = argument.split("=")[0]
        near = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
        key = name.removeprefix("--").replace("-", "_")
        keys = [field for field in _config_fields(self._config) if key in (field, field.split(".")[1])]
        near += [f"{_PREFIX}{field}" for field in keys]
        hint = f"Did you mean {near[0]}?" if near else f"Valid flags: {', '.join(flags)}, --config.GROUP.KEY=VALUE."
        raise ConfigError(f"Unknown argument {argument}. {hint}")


def read_config(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    build: Callable[[dict[str, Any]], Any] = build_config,
) -> Any:
    """Runs a config file's `get_config()`, applies overrides and checks the whole.

    Args:
      path: a Python file that defines get_config(), which returns a ConfigDict made by default_config().
      overrides: {"a.b": value}, as `Parser.parse` returns them.
      build: checks the values and makes the program's config of them.

    Returns:
      What `build` returns, a `Config` by default.

    Raises:
      ConfigError: no such file, a file that fails, an unknown key, a value of the wrong type, sizes that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        known = {p.stem: p for folder in (Path("configs"), path.parent) for p in folder.glob("*.py")}
        near = difflib.get_close_matches(path.stem, known, n=1)
        raise ConfigError(f"No config file {path}.{f' Did you mean {known[near[0]]}?' if near else ''}")
    try:
        values = runpy.run_path(str(path))["get_config"]()
    except M3jaxError:
        raise
    except Exception as error:
        raise ConfigError(f"Config file {path}: {_describe(error, path)}") from error
    if not isinstance(values, ConfigDict):
        raise ConfigError(
            f"Config file {path}: get_config() returned a {type(values).__name__}, expected a ConfigDict."
        )
    return build(override(values.to_dict(), dict(overrides or {})))


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs a program and ends the process: an error meant for the user is one line on stderr and exit code 2."""
    try:
        main()
    except M3jaxError as error:
        _exit_with(f"error: {error}", 2)
    except CannotRunHereError as error:
        _exit_with(f"error: {error} With config.model.scan_implementation = None the fastest that can is taken.", 2)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        _exit_with(f"error: {error.filename or 'writing failed'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a normal exit would first wait for the threads that write a checkpoint
    sys.exit(0)


def _exit_with(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _take_overrides(argv: list[str], config: type) -> tuple[list[str], Overrides]:
    """Splits the `--config.a.b=value` and `--config.a.b value` out of argv."""
    fields = _config_fields(config)
    rest, overrides = [], {}
    while argv:
        argument = argv.pop(0)
        if not argument.startswith(_PREFIX):
            rest.append(argument)
            continue
        key, equals, text = argument[len(_PREFIX) :].partition("=")
        if key not in fields:
            raise ConfigError(f"Unknown key config.{key}.{_nearest(key, fields)}")
        allowed = fields[key]
        if not equals:
            follows = argv[0] if argv and not argv[0].startswith("--") else None
            if bool in allowed and (follows is None or follows.lower() not in _TRUE + _FALSE):
                text = "true"
            elif follows is None:
                raise ConfigError(f"config.{key} has no value: expected {_names(allowed)}, as in {_PREFIX}{key}=VALUE.")
            else:
                text = argv.pop(0)
        overrides[key] = _parse_value(key, text, allowed)
    return rest, overrides


def _parse_value(key: str, text: str, allowed: tuple[type, ...]) -> Any:
    if types.NoneType in allowed and text.lower() == "none":
        return None
    try:
        if bool in allowed:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        return next(kind for kind in (int, float, str) if kind in allowed)(text)
    except (ValueError, KeyError):
        raise ConfigError(f"config.{key} = {text!r}: expected {_names(allowed)}.") from None


def _config_fields(config: type) -> dict[str, tuple[type, ...]]:
    """Returns {"a.b": allowed types} of every key of the config."""
    fields = {}
    for group, cls in typing.get_type_hints(config).items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            fields[f"{group}.{field.name}"] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return fields


def _nearest(key: str, fields: Mapping[str, Any]) -> str:
    if any(field.startswith(f"{key}.") for field in fields):
        members = [field for field in fields if field.startswith(f"{key}.")]
        return f" It is a group of keys: {', '.join(members)}."
    same_name = [field for field in fields if field.split(".")[1] == key.split(".")[-1]]
    near = same_name[:1] or difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    groups = dict.fromkeys(field.split(".")[0] for field in fields)
    return f" Did you mean config.{near[0]}?" if near else f" Groups: {', '.join(groups)}."


def _names(allowed: tuple[type, ...]) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "None"}
    return " or ".join(words[kind] for kind in allowed)


def _describe(error: Exception, path: Path) -> str:
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "it defines no get_config()."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {str(error).strip(chr(34))}"
