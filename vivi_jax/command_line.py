"""What the commands with a --config share: flags, logging, and one line for what the user can mend."""

import logging
import sys
from collections.abc import Callable, Iterable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vivi_jax.distributed import preemption, processes
from vivi_jax.errors import CheckpointError, ConfigError, DataError
from vivi_jax.train import NotFinite


def protocol_flags(*, config: str, data: str, workdir: str) -> dict[str, flags.FlagHolder]:
    """Defines the flags of a protocol that trains: an example of --config, and help for --data and --workdir."""
    return {
        "config": config_flags.DEFINE_config_file("config", None, f"such as {config}", lock_config=True),
        "checkpoint": flags.DEFINE_string("checkpoint", None, "run directory, .safetensors file, or none"),
        "data": flags.DEFINE_string("data", None, data),
        "workdir": flags.DEFINE_string("workdir", None, workdir),
    }


def run(main: Callable[[dict], None], values: dict[str, flags.FlagHolder], optional: Iterable[str] = ()) -> None:
    """Parses the command line and calls main({flag: its value}); see `parse` and `ended`."""
    ended(
        lambda: app.run(
            lambda _: main({name: flag.value for name, flag in values.items()}),
            flags_parser=lambda argv: parse(argv, values, optional),
        )
    )


def parse(argv: list[str], values: dict[str, flags.FlagHolder], optional: Iterable[str] = ()) -> list[str]:
    """absl's parsing, with what is wrong in a flag or a config key said in one line.

    Args:
      values: the command's flags, with a ml_collections file under "config".
      optional: those that need not be given.

    Raises:
      ConfigError: a flag or key that does not exist, a value of the wrong type, a flag that is missing.
    """
    try:
        remaining = flags.FLAGS(argv)
        for name, flag in values.items():
            if flag.value is None and name not in optional:
                raise ConfigError(f"--{name} is missing: {flags.FLAGS[name].help}")
        values["config"].value.to_dict()  # a file that could not be loaded says so at the first use
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"the config has no key {' '.join(str(error.args[0]).split())}") from error
    except (AttributeError, TypeError, ValueError, OSError, flags.Error) as error:
        while "Traceback" in str(error) and (error.__cause__ or error.__context__):
            error = error.__cause__ or error.__context__  # the config file's own error, without absl's wrapping
        raise ConfigError(" ".join(str(error).split())) from error
    absl_logging.set_verbosity(absl_logging.WARNING)  # libraries; ours go through the standard loggers below
    logging.basicConfig(format="%(message)s", force=True)
    set_log_level(logging.INFO)
    return remaining


def set_log_level(level: int) -> None:
    for package in ("vivi_jax", "input_pipeline", "evaluation"):
        logging.getLogger(package).setLevel(level)


def ended(command: Callable[[], None]) -> None:
    """Runs a command to its end: what is the user's to mend is one line, all else keeps its traceback."""
    try:
        command()
    except (ConfigError, DataError, CheckpointError, NotFinite) as error:
        sys.exit(f"error: {error}")
    except preemption.Preempted:
        processes.leave(preemption.EXIT_CODE)  # at once: a compilation may still run in its thread
