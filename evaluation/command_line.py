"""What protocols with a --config share as programs: flags, logging, one line for what the user can mend."""
import logging
import os
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline.store import DataError
from vivi_jax import preemption
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.train import NotFinite


def run(main: Callable[[dict], None], values: dict[str, flags.FlagHolder]) -> None:
    """Calls main({flag: its value}) after parsing the command line; does not return.

    A mistake of the user's ends the process with one line and code 1, SIGTERM (with everything saved) with
    preemption.EXIT_CODE; everything else keeps its traceback.

    Args:
      values: the flags, all of which must be given or have a default; with a ml_collections file under "config".
    """
    try:
        app.run(lambda _: main({name: flag.value for name, flag in values.items()}),
                flags_parser=lambda argv: parse(argv, values))
    except (CheckpointError, ConfigError, DataError, NotFinite) as error:
        sys.exit(f"error: {error}")
    except preemption.Preempted:
        sys.stderr.flush()
        os._exit(preemption.EXIT_CODE)  # at once: a compilation may still run in its thread


def parse(argv: list[str], values: dict[str, flags.FlagHolder]) -> list[str]:
    """absl's parsing, with what is wrong in a flag or a config key said in one line.

    Raises:
      ConfigError: a flag or key that does not exist, a value of the wrong type, a flag that is missing.
    """
    try:
        remaining = flags.FLAGS(argv)
        for name, flag in values.items():
            if flag.value is None:
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
    absl_logging.set_verbosity(absl_logging.ERROR)  # libraries; ours go through the standard loggers below
    logging.basicConfig(format="%(message)s", force=True)
    for package in ("vivi_jax", "input_pipeline", "evaluation"):
        logging.getLogger(package).setLevel(logging.INFO)
    return remaining
