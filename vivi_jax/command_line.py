"""What all commands share: flags, logging, exit codes, and one-line messages for errors of the user.

Needs no JAX: commands that prepare data use it too.
"""

import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Never

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vivi_jax.distributed.preemption import Preempted
from vivi_jax.errors import CheckpointError, ConfigError, DataError, NotFinite


def ended(command: Callable[[], None], *, resumes: bool = False) -> None:
    """Runs a command to its end: an error of the user is one line and exit code 1, all else keeps its traceback.

    Args:
      resumes: started again, the command goes on where it was; Ctrl-C then ends it with a line that says so.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what no encoding fits; so does stderr
    try:
        command()
    except KeyboardInterrupt:
        if not resumes:
            raise
        sys.exit("interrupted; run the same command again, it goes on")
    except (ConfigError, DataError, CheckpointError, NotFinite) as error:
        sys.exit(f"error: {error}")
    except Preempted as preempted:
        from vivi_jax.distributed import processes  # JAX, which only training raises this from

        processes.leave(preempted.exit_code)  # at once: a compilation may still run in its thread


def start_logging() -> None:
    """Our messages from INFO on go to stderr as they are, libraries' from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.basicConfig(format="%(message)s", force=True)
    set_log_level(logging.INFO)


def set_log_level(level: int) -> None:
    """The level of the loggers of this repository's packages."""
    for package in ("vivi_jax", "input_pipeline", "evaluation"):
        logging.getLogger(package).setLevel(level)


# ---- Commands with a --config: absl's flags -------------------------------------------------------------------------


def protocol_flags(*, config: str, data: str, workdir: str) -> dict[str, flags.FlagHolder]:
    """Defines the flags of a protocol that trains: an example of --config, and help for --data and --workdir."""
    return {
        "config": config_flags.DEFINE_config_file("config", None, f"such as {config}", lock_config=True),
        "checkpoint": flags.DEFINE_string("checkpoint", None, "run directory, file of weights, or none"),
        "data": flags.DEFINE_string("data", None, data),
        "workdir": flags.DEFINE_string("workdir", None, workdir),
        "sweep": flags.DEFINE_bool("sweep", False, "first choose learning rate and weight decay, from config.sweep"),
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
    """absl's parsing; what is wrong in a flag or a config key is one line.

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
        if error.args and isinstance(error.args[0], KeyError):  # ml_collections: a flag of a key that is not there
            key, *hint = str(error.args[0].args[0]).replace("'", "").split("\n")
            options = [word.split("=")[0].lstrip("-") for word in argv]
            option = next((option for option in options if option.endswith(f".{key}")), key)
            raise ConfigError(". ".join([f"the config has no key {option}", *hint])) from error
        cause: BaseException = error
        while "Traceback" in str(cause) and (inner := cause.__cause__ or cause.__context__):
            cause = inner  # the config file's own error, without absl's wrapping
        raise ConfigError(" ".join(str(cause).split())) from error
    start_logging()
    return remaining


# ---- Commands without: argparse -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Options of `python -m MODULE`, described by the first line of its docstring; a wrong one is a ConfigError."""

    def __init__(self, module: str, doc: str | None):
        super().__init__(prog=f"python -m {module}", description=(doc or "").split("\n")[0])

    def error(self, message: str) -> Never:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def run_parser(main: Callable[[argparse.Namespace], None], parser: Parser, argv: list[str] | None = None) -> None:
    """Parses `argv`, by default the command line, and calls main(options); see `ended`."""

    def command() -> None:
        options = parser.parse_args(argv)
        start_logging()
        main(options)

    ended(command)
