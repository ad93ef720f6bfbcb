"""Files of weights, from here or elsewhere, as trees of arrays: by their suffix, without running what is in them."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import numpy as np

from vivi_jax import files
from vivi_jax.errors import CheckpointError
from vivi_jax.export import unpickle
from vivi_jax.export.safetensors_files import load_safetensors

PICKLED = (".pth", ".pt", ".pkl", ".npy", ".tar")  # .pth.tar: MoCo
SUFFIXES = (".safetensors", ".npz", *PICKLED)
HUB_WEIGHTS = "model.safetensors"  # in a folder of the Hugging Face Hub, beside config.json
CPU_S, WALL_S = 600, 900


def is_weight_file(source: str) -> bool:
    """Whether a --checkpoint names a file of weights, or a folder of the Hugging Face Hub; else it is of a run."""
    path = pathlib.Path(source)
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()) or (path / HUB_WEIGHTS).is_file()


def in_hub_folder(source: files.Path) -> tuple[files.Path, str]:
    """(the file of weights, what config.json says they are of) of a folder of the Hub; of a file (itself, "")."""
    folder = pathlib.Path(source)
    if not (folder / HUB_WEIGHTS).is_file():
        return source, ""
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config.get("architecture") or ", ".join(config.get("architectures") or ()) or config.get("model_type")
    except (OSError, ValueError, AttributeError):
        found = None
    return folder / HUB_WEIGHTS, str(found or "no architecture")


def load(path: files.Path) -> tuple[Any, dict[str, str]]:
    """Returns (nested dicts and lists of arrays and values, metadata).

    Raises:
      CheckpointError: no such file, or one that is damaged or holds more than arrays and plain containers.
    """
    source = pathlib.Path(path)
    if source.suffix == ".safetensors":
        return load_safetensors(source)
    if not source.is_file():
        raise CheckpointError(f"no file {path}")
    if source.suffix == ".npz":
        try:
            with np.load(source, allow_pickle=False) as archive:
                return dict(archive.items()), {}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is no .npz file of arrays: {error}") from None
    return load_pickled(source), {}  # by its content, whatever it is called


def load_pickled(source: pathlib.Path) -> Any:
    """The content of a pickled file, read in a process of its own: see unpickle.py."""
    memory_mb = 2048 + 6 * (source.stat().st_size >> 20)
    with tempfile.TemporaryDirectory() as out:
        arguments = [source.resolve(), out, memory_mb, CPU_S]
        command = [sys.executable, "-P", unpickle.__file__, *map(str, arguments)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # threads cost address space
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=WALL_S, env=environment)
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{source} cannot be read: it took longer than {WALL_S} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"])[-1]
            raise CheckpointError(f"{source} cannot be read: {reason}")
        with np.load(pathlib.Path(out, "arrays.npz"), allow_pickle=False) as archive:
            arrays = [archive[f"arr_{i}"] for i in range(len(archive.files))]
        return decode(json.loads(pathlib.Path(out, "tree.json").read_text()), arrays)


def decode(tree: dict, arrays: list[np.ndarray]) -> Any:
    """The inverse of unpickle.encode."""
    ((kind, content),) = tree.items()
    if kind == "dict":
        return {key: decode(value, arrays) for key, value in content}
    if kind == "list":
        return [decode(value, arrays) for value in content]
    return arrays[content] if kind == "array" else content
