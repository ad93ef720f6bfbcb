"""Errors whose message is written for the user: one line that says what is wrong, where, and what to do.

A CLI's `main` catches exactly these and exits with the line; every other exception is a bug and keeps its traceback.
"""


class ConfigError(ValueError):
    """A configuration value that cannot work: unknown name, impossible value, unsupported combination."""


class CheckpointError(ValueError):
    """Stored weights that are missing, damaged, or do not fit the model they are loaded into."""
