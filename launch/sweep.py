"""Prints one command per setting of a grid, each with a run directory of its own; nothing is started.

    python -m launch.sweep --set schedule.base_lr=0.1,0.2 --set seed=0,1,2 --workdir=runs/lr -- \\
        python -m vivi_jax.main --config=vito:own --config.data.path=STORE

The lines are for a shell (`| bash`), for `xargs -P`, or for a scheduler, one job each. Settings that are finished, of
which there is a summary or a result, are left out and named on stderr: the same line goes on with a sweep that was
stopped, as each run goes on by its own.

KEY is a key of the command's config, which must have it, or an option of the command: `--set=--checkpoint=A,B`. The
command is any that has a --workdir.
"""

import argparse
import itertools
import pathlib
import re
import shlex
import sys

from absl import flags

from vivi_jax import command_line
from vivi_jax.errors import ConfigError

FINISHED = ("summary.json", "result.json", "davis.json", "vtab.json")  # of a training; of evaluations
VALUES = {"config": command_line.define_config(None, "a config")}


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("launch.sweep", __doc__)
    parser.add_argument(
        "--set", action="append", required=True, metavar="KEY=VALUE,VALUE", help="values of a key; give it for each key"
    )
    parser.add_argument("--workdir", required=True, help="folder of all run directories")
    parser.add_argument("command", nargs="+", help="behind --: the command without --workdir")
    command_line.run_parser(sweep, parser, argv)


def sweep(options: argparse.Namespace) -> None:
    """Prints the commands.

    Raises:
      ConfigError: a key that the config does not have, a value that it does not take, or one given twice.
    """
    if given := [word for word in options.command if word.startswith("--workdir")]:
        raise ConfigError(f"{given[0]} in the command: each run gets a directory of its own in the sweep's --workdir")
    grid = parsed(options.set)
    check(grid, options.command)
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        folder = pathlib.Path(options.workdir, name_of(setting))
        if any((folder / name).is_file() for name in FINISHED):
            print(f"finished: {folder}", file=sys.stderr)
        else:
            words = [f"{option_of(key)}={value}" for key, value in setting.items()]
            print(shlex.join([*options.command, *words, f"--workdir={folder}"]))


def parsed(settings: list[str]) -> dict[str, list[str]]:
    """["seed=0,1"] -> {"seed": ["0", "1"]}.

    >>> parsed(["seed=0,1", "--k=5"])
    {'seed': ['0', '1'], '--k': ['5']}
    """
    grid: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not (key and equals and all(values.split(","))):
            raise ConfigError(f"--set={setting}: it is KEY=VALUE,VALUE")
        if key in grid or len({name_of({key: value}) for value in values.split(",")}) <= values.count(","):
            raise ConfigError(f"--set={setting}: {key} or a value is given twice, or two would share a folder")
        grid[key] = values.split(",")
    return grid


def check(grid: dict[str, list[str]], command: list[str]) -> None:
    """Raises ConfigError for a key or value that the command's config refuses, in the words of the command itself."""
    keys = {key: values for key, values in grid.items() if not key.startswith("--")}
    config = [word for word in command if word.startswith("--config")]
    if keys and not any(word.startswith("--config=") for word in config):
        raise ConfigError(f"--set={next(iter(keys))}=...: the command has no --config=NAME; an option begins with --")
    for key, values in keys.items():
        for value in values:
            sys.argv = ["sweep", *config, f"--config.{key}={value}"]  # where ml_collections looks for keys
            for name in [name for name in flags.FLAGS if name.startswith("config.")]:  # of the parsing before
                delattr(flags.FLAGS, name)
            command_line.parse(sys.argv, VALUES)


def option_of(key: str) -> str:
    """seed -> --config.seed; --k stays."""
    return key if key.startswith("--") else f"--config.{key}"


def name_of(setting: dict[str, str]) -> str:
    """A folder's name that tells the setting.

    >>> name_of({"schedule.base_lr": "0.1", "--checkpoint": "runs/a"})
    'schedule.base_lr=0.1,checkpoint=runs_a'
    """
    return ",".join(re.sub(r"[^\w.+=-]", "_", f"{key.lstrip('-')}={value}") for key, value in setting.items())


if __name__ == "__main__":
    main()
