"""Errors whose message is meant for the person at the keyboard; the programs print them without a traceback."""


class M3jaxError(Exception):
    """Base of every error caused by what the user gave (a config, data, a checkpoint), not by a bug here."""


class ConfigError(M3jaxError, ValueError):
    """A config key, value or combination of values that cannot work; the message names the fix."""


class DataError(M3jaxError, ValueError):
    """A data source, shard or tokenizer that cannot be used; the message names the file."""


class CheckpointError(M3jaxError, RuntimeError):
    """A checkpoint that is missing, incomplete, corrupt or of another shape; the message names the culprit."""


class TrainingError(M3jaxError, RuntimeError):
    """Training stopped on purpose, for example at a non-finite loss; the message says what is saved and where."""
