"""Errors whose message is written for the user: one line that says what is wrong, where, and what to do.

A CLI's `main` catches exactly these and exits with the line; every other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot work: unknown name, impossible value, unsupported combination."""


class DataError(ValueError):
    """Data that cannot be used: not there, damaged, too few, or values that no data could meet."""


class CheckpointError(ValueError):
    """Stored weights that are missing, damaged, or do not fit the model they are loaded into."""


class NotFinite(RuntimeError):
    """The loss or the state of a step is NaN or infinite. The checkpoints written before are good."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class CopiesDiffer(RuntimeError):
    """Devices that should hold the same state do not. The checkpoints written before are good."""


def lookup(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """Returns table[name]; a name it does not have is a ConfigError that suggests the nearest one it has."""
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{what}={name!r} is unknown; did you mean {nearest!r}? Known: {', '.join(sorted(table))}")
