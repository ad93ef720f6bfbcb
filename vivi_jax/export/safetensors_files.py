"""safetensors files with a checksum beside them, as safetensors does not notice flipped bits."""

import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from vivi_jax import files
from vivi_jax.errors import CheckpointError


def save_safetensors(path: files.Path, state_dict: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, and PATH.sha256 beside it; an older file of that name is replaced as a whole."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    checksum = checksum_path(target)
    with files.atomic(target) as unfinished:
        safetensors.numpy.save_file(state_dict, unfinished, metadata)
        digest = files.sha256(unfinished)
        checksum.unlink(missing_ok=True)  # first: a kill in between must not leave a new file beside an old checksum
    files.write_text(checksum, f"{digest}  {target.name}\n")


def load_safetensors(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (state_dict, metadata) of a safetensors file.

    Raises:
      CheckpointError: no such file, not a safetensors file, or a content other than PATH.sha256 says (where it exists).
    """
    source = pathlib.Path(path)
    if not source.is_file():
        raise CheckpointError(f"no file {path}; python -m vivi_jax.export writes one from a run")
    checksum = checksum_path(source)
    if checksum.is_file() and checksum.read_text().split()[:1] != [files.sha256(source)]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {checksum}; export it again")
    try:
        with safetensors.safe_open(source, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def checksum_path(path: pathlib.Path) -> pathlib.Path:
    """Where the checksum of a file is."""
    return path.with_name(path.name + ".sha256")
