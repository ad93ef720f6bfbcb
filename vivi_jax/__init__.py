"""Image representations learned from video: `train`, `evaluate` and `load` do in Python what the commands do."""

import importlib
import inspect
import json
import os
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load`, imported when it is first used: it needs JAX, and importing this package must not."""
    if name == "load":
        from vivi_jax.export.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train(
    config: Any, workdir: str | os.PathLike, *, overrides: Mapping[str, Any] | None = None, may_change: tuple = ()
) -> dict:
    """Trains to the end, or goes on where the run in `workdir` was, as `python -m vivi_jax.main` does on one host.

    Args:
      config: a name or file with its variants, such as "vito:own"; or a ConfigDict, as those of configs/.
      workdir: of the run.
      overrides: of a config given by name, dotted key -> value: {"data.path": "STORE"}.
      may_change: as --may_change.

    Returns:
      the content of summary.json, and "metrics": the last value of each.

    Raises:
      ConfigError, DataError, CheckpointError (vivi_jax.errors): what the command would say in one line.
    """
    from vivi_jax import command_line, main, metrics
    from vivi_jax.errors import ConfigError

    if isinstance(config, str):
        config = command_line.configured(config, overrides or {})
    elif overrides:
        raise ConfigError("overrides are for a config given by its name: change the ConfigDict itself")
    folder = os.fspath(workdir)
    main.run(config, folder, may_change=may_change)
    last = {name: value for line in metrics.read(pathlib.Path(folder)) for name, value in line.items()}
    return json.loads(pathlib.Path(folder, "summary.json").read_text()) | {"metrics": last}


def evaluate(
    protocol: str,
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    *,
    config: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict:
    """Scores an encoder: `python -m evaluation.PROTOCOL --checkpoint=... --data=...`.

    Args:
      protocol: a key of PROTOCOLS.
      checkpoint: run, or file of weights.
      data: what the command takes.
      config: of a protocol that has one, such as "segmentation:own"; by default its own, without variants.
      overrides: of that config, dotted key -> value.
      options: the command's others by their names, such as mode="linear" or workdir="DIR".

    Returns:
      what the command writes as JSON.

    Raises:
      ConfigError, DataError, CheckpointError (vivi_jax.errors): what the command would say in one line.
    """
    from vivi_jax import command_line
    from vivi_jax.errors import ConfigError, lookup

    has_config = lookup("protocol", protocol, PROTOCOLS)
    given = {"checkpoint": os.fspath(checkpoint), "data": os.fspath(data), **options}
    if protocol not in ("probe", "vtab"):  # which read stores and TFDS sets where they are
        given["data"] = command_line.local_path(given["data"], "data")
    door = importlib.import_module(f"evaluation.{protocol}")
    if has_config:
        given["config"] = command_line.configured(config or protocol, overrides or {})
        try:
            inspect.signature(door.result_of).bind(**given)
        except TypeError as error:
            raise ConfigError(f"{protocol}: {error}") from None
        return door.result_of(**given)
    if config or overrides:
        raise ConfigError(f"{protocol} has no config: give its options by their names")
    return door.result_of(door.options().parse_args([f"--{name}={value}" for name, value in given.items()]))


PROTOCOLS = {  # whether it has a config
    "action": True,
    "davis": False,
    "detection": True,
    "probe": False,
    "segmentation": True,
    "vid_robust": False,
    "vtab": True,
}

# ---- The console scripts of setup.py: each is `python -m` of a module ------------------------------------------------

EVALUATIONS = (
    "action",
    "all",
    "attention",
    "davis",
    "detection",
    "probe",
    "report",
    "segmentation",
    "vid_robust",
    "vtab",
)


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_train() -> None:
    _run("vivi_jax.main")


def run_prepare() -> None:
    _run("input_pipeline.prepare")


def run_export() -> None:
    _run("vivi_jax.export")


def run_embed() -> None:
    _run("evaluation.embed")


def run_eval() -> None:
    """vivi-eval NAME ...: `python -m evaluation.NAME ...`."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in EVALUATIONS:
        sys.exit(f"error: vivi-eval NAME [options], NAME is one of {', '.join(EVALUATIONS)}, not {name!r}")
    _run(f"evaluation.{name}")
