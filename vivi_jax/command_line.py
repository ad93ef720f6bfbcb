"""What all commands share: flags, logging, exit codes, and one-line messages for errors of the user.

Needs no JAX: commands that prepare data use it too.
"""

import argparse
import difflib
import errno
import importlib.util
import io
import itertools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, Never

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from vivi_jax import files
from vivi_jax.buckets import local
from vivi_jax.buckets.client import ADDRESSES
from vivi_jax.distributed.preemption import Preempted
from vivi_jax.errors import CheckpointError, ConfigError, CopiesDiffer, DataError, NotFinite

# Errors of the system that a user can mend: no right to write, no folder, no room, a name too long.
OF_THE_SYSTEM = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
}


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
    except (ConfigError, DataError, CheckpointError, NotFinite, CopiesDiffer) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM or error.filename is None:
            raise
        of_writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        remedy = "give a place that can be written" if of_writing else "see that it can be read or written"
        sys.exit(f"error: {error.filename}: {(error.strerror or '').lower()}; {remedy}")
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

# What people call a key of ours elsewhere -> the ends of our dotted keys, the likeliest first.
SYNONYMS = {
    "learning_rate": ("schedule.base_lr", "schedule.lr"),
    "lr": ("schedule.base_lr", "schedule.lr"),
    "base_lr": ("schedule.base_lr", "schedule.lr"),
    "wd": ("optimizer.weight_decay",),
    "l2": ("optimizer.weight_decay",),
    "beta1": ("optimizer.b1",),
    "beta2": ("optimizer.b2",),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), ("schedule.epochs", "schedule.total_steps")),
    **dict.fromkeys(
        ("steps", "num_steps", "max_steps", "train_steps", "iterations"), ("schedule.total_steps", "schedule.epochs")
    ),
    "epochs": ("schedule.epochs", "schedule.total_steps"),
    "warmup": ("schedule.warmup_epochs", "schedule.warmup_steps"),
    **dict.fromkeys(("bs", "batch", "batchsize"), ("batch_size",)),
    **dict.fromkeys(("accumulate", "accum_steps", "grad_accum", "gradient_accumulation_steps"), ("micro_batches",)),
    **dict.fromkeys(("tau", "temp"), ("method.temperature",)),
    **dict.fromkeys(("resolution", "img_size", "input_size", "crop_size"), ("data.image_size", "data.crop_size")),
    **dict.fromkeys(("data", "dataset", "data_dir", "data_path", "videos", "store"), ("data.path",)),
    **dict.fromkeys(("arch", "backbone", "model"), ("encoder.name",)),
    **dict.fromkeys(("precision", "amp", "half_precision"), ("encoder.dtype",)),
    **dict.fromkeys(("save_every", "save_interval", "checkpoint_interval"), ("run.checkpoint_every",)),
    "random_seed": ("seed",),
}


def define_config(default: str | None, help: str) -> flags.FlagHolder:
    """The flag --config: a file, or the name of one in configs/, with its argument after a colon."""
    return config_flags.DEFINE_config_file("config", default, help, lock_config=True)


def protocol_flags(*, config: str, data: str, workdir: str) -> dict[str, flags.FlagHolder]:
    """Defines the flags of a protocol that trains: an example of --config, and help for --data and --workdir."""
    return {
        "config": define_config(None, f"such as {config}"),
        "checkpoint": flags.DEFINE_string("checkpoint", None, "run directory, file of weights, or none"),
        "data": flags.DEFINE_string("data", None, data),
        "workdir": flags.DEFINE_string("workdir", None, workdir),
        "sweep": flags.DEFINE_bool("sweep", False, "first choose learning rate and weight decay, from config.sweep"),
    }


def run(
    main: Callable[[dict], None],
    values: dict[str, flags.FlagHolder],
    optional: Iterable[str] = (),
    remote: Iterable[str] = (),
    copied: Iterable[str] = (),
) -> None:
    """Parses the command line and calls main({flag: its value}); see `parse` and `ended`.

    Args:
      copied: flags that may be folders or files in a bucket, of which main gets the paths of copies on this machine.
    """
    ended(
        lambda: app.run(
            lambda _: main(
                {name: local_path(flag.value, name) if name in copied else flag.value for name, flag in values.items()}
            ),
            flags_parser=lambda argv: parse(argv, values, optional, [*remote, *copied]),
        )
    )


def local_path(value: Any, option: str) -> Any:
    """The value of an option; in place of a folder or file in gs:// or s3:// the path of its copy on this machine."""
    if isinstance(value, str) and value.startswith(ADDRESSES):
        return local.copied(value)
    files.refuse_remote(f"--{option}", value)
    return value


def parse(
    argv: list[str],
    values: dict[str, flags.FlagHolder],
    optional: Iterable[str] = (),
    remote: Iterable[str] = (),
) -> list[str]:
    """absl's parsing; what is wrong in a flag or a config key is one line.

    Args:
      values: the command's flags, with a ml_collections file under "config".
      optional: those that need not be given.
      remote: those, and keys "config.KEY", that may be paths with a scheme, such as gs://BUCKET.

    Raises:
      ConfigError: a flag, key or config that does not exist, a value of the wrong type, a word that is no flag, a
        missing flag, or a path that the command cannot take.
    """
    argv = with_config_file(argv)
    try:
        remaining = flags.FLAGS(argv)
        if len(remaining) > 1:
            word = remaining[1]
            hint = f": options begin with two dashes, --{word}" if "=" in word else "; the options are listed by --help"
            raise ConfigError(f"{word!r} is no option{hint}")
        for name, flag in values.items():
            if flag.value is None and name not in optional:
                raise ConfigError(f"--{name} is missing: {flags.FLAGS[name].help}")
        if values["config"].value is not None:
            for key, value in flat(values["config"].value.to_dict()).items():
                if f"config.{key}" not in remote:
                    files.refuse_remote(f"--config.{key}", value)
        for name, flag in values.items():
            if name not in remote:
                files.refuse_remote(f"--{name}", flag.value)
    except ConfigError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"there is no option --{error.flagname}{_instead(argv, error.flagname, values)}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        if option := unknown_key(argv):
            raise ConfigError(f"the config has no key config.{option}{_instead(argv, option, values)}") from error
        cause: BaseException = error
        while "Traceback" in str(cause) and (inner := cause.__cause__ or cause.__context__):
            cause = inner  # the config file's own error, without absl's wrapping
        raise ConfigError(" ".join(str(cause).split())) from error
    start_logging()
    return remaining


# ---- The config file ------------------------------------------------------------------------------------------------


def configs_folder() -> pathlib.Path:
    """The folder of the package `configs`, wherever it is installed."""
    spec = importlib.util.find_spec("configs")
    return pathlib.Path((spec.submodule_search_locations or ["configs"])[0] if spec else "configs")


def config_names() -> list[str]:
    """What --config=NAME may be."""
    return sorted(path.stem for path in configs_folder().glob("*.py") if path.stem not in ("__init__", "common"))


def with_config_file(argv: list[str]) -> list[str]:
    """The command line with --config=vito:demo as --config=DIR/vito.py:demo, DIR being that of the installed configs.

    Raises:
      ConfigError: no file and no config has this name.
    """
    argv = list(argv)
    for i, word in enumerate(argv):
        if word.startswith(("--config=", "-config=")):
            argv[i] = "--config=" + config_file(word.partition("=")[2])
        elif word in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = config_file(argv[i + 1])
    return argv


def config_file(given: str) -> str:
    """NAME:ARGUMENT, or FILE:ARGUMENT -> the same with the path of a file that is there."""
    name, colon, argument = given.partition(":")
    files.refuse_remote("--config", given)
    path = pathlib.Path(name)
    if path.is_file():
        return given
    here = configs_folder() / f"{path.stem}.py"
    if path.parent.name in ("", "configs") and here.stem in config_names():
        return f"{here}{colon}{argument}"
    nearest = difflib.get_close_matches(here.stem, config_names(), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"--config={name}: there is no such file or config; did you mean {nearest}? Known: {', '.join(config_names())}"
    )


def load_config(given: str) -> ConfigDict:
    """The config of FILE or FILE:ARGUMENT, as it is without other options."""
    name, colon, argument = given.partition(":")
    spec = importlib.util.spec_from_file_location("config", name)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if colon else module.get_config()


def config_text(config: ConfigDict, given: str) -> str:
    """A line for each key of a config; of those that are not as in its file without variants and flags, both values.

    Args:
      given: FILE or FILE:ARGUMENT.
    """
    plain = flat(load_config(given.partition(":")[0]).to_dict())
    here = flat(config.to_dict())
    lines = []
    for key in sorted(here.keys() | plain.keys()):
        was = f"{plain[key]!r} in the file itself" if key in plain else "not in the file itself"
        if key not in here:
            lines.append(f"# config.{key} is not there; {was}")
        else:
            changed = key not in plain or plain[key] != here[key]
            lines.append(f"config.{key} = {here[key]!r}" + (f"  # {was}" if changed else ""))
    return "\n".join(lines)


def flat(section: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted key: value}.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    found = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def nearest_key(given: str, keys: Iterable[str]) -> str | None:
    """The dotted key that was meant by `given`, a key or the end of one; None: none is near.

    >>> keys = ["schedule.base_lr", "batch_size", "optimizer.weight_decay", "optimizer.momentum"]
    >>> [nearest_key(word, keys) for word in ("optimizer.learning_rate", "batchsize", "weight_decay", "lr", "xyz")]
    ['schedule.base_lr', 'batch_size', 'optimizer.weight_decay', 'schedule.base_lr', None]
    """
    keys = list(keys)
    section, _, last = given.rpartition(".")
    ends = [end for end in SYNONYMS.get(last, ()) if end in keys]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    if found := same + ends:
        return found[0]
    lasts = {key.rpartition(".")[2]: key for key in reversed(keys)}  # of equal ones that of the first section
    lasts |= {key.rpartition(".")[2]: key for key in keys if section and key.startswith(f"{section}.")}
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)
    return lasts[near[0]] if near else None


def unknown_key(argv: list[str]) -> str | None:
    """The first --config.KEY on the command line that the config does not have."""
    keys = _keys(argv)
    sections = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    for word in argv:
        option = word.partition("=")[0]
        key = option.lstrip("-").partition(".")[2]
        if option.startswith(("--config.", "-config.")) and key not in keys | sections:
            return key
    return None


def _keys(argv: list[str]) -> set[str]:
    """The keys of the config that the command line names; none if it cannot be loaded."""
    given = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    given += [after for word, after in itertools.pairwise(argv) if word == "--config"]
    if not given:
        given = [flags.FLAGS["config"].default] if isinstance(flags.FLAGS["config"].default, str) else []
    try:
        return set(flat(load_config(given[-1]).to_dict())) if given else set()
    except (OSError, TypeError, ValueError):  # which the parsing itself tells
        return set()


def _instead(argv: list[str], given: str, values: dict[str, flags.FlagHolder]) -> str:
    """What to write in place of an option that is not there, as the end of a message."""
    given = given.removeprefix("config.")
    own = difflib.get_close_matches(given, values, n=1, cutoff=0.75)
    keys = sorted(_keys(argv), key=lambda key: (key.count("."), key))
    if key := None if own else nearest_key(given, keys):
        return f"; did you mean --config.{key}?"
    section = given.rpartition(".")[0]
    known = [f"--{name}" for name in own] or [key for key in keys if section and key.startswith(f"{section}.")]
    if own:
        return f"; did you mean {known[0]}?"
    return f". config.{section} has {', '.join(key.rpartition('.')[2] for key in known)}" if known else ""


# ---- Commands without: argparse -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Options of `python -m MODULE`, described by the first line of its docstring; a wrong one is a ConfigError."""

    def __init__(self, module: str, doc: str | None):
        super().__init__(prog=f"python -m {module}", description=(doc or "").split("\n")[0])

    def error(self, message: str) -> Never:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def run_parser(
    main: Callable[[argparse.Namespace], None],
    parser: Parser,
    argv: list[str] | None = None,
    *,
    remote: Iterable[str] = (),
    copied: Iterable[str] = (),
) -> None:
    """Parses `argv`, by default the command line, and calls main(options); see `ended`, `parse` and `run`."""

    def command() -> None:
        options = parser.parse_args(argv)
        for name, value in vars(options).items():
            if name not in [*remote, *copied]:
                files.refuse_remote(f"--{name}", value)
        start_logging()
        for name in copied:
            setattr(options, name, local_path(getattr(options, name), name))
        main(options)

    ended(command)
