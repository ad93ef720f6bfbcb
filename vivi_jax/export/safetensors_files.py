"""safetensors files whose content is verified, as safetensors does not notice flipped bits.

A file carries the SHA-256 of its own tensors and metadata, and PATH.sha256 beside it has that of all its bytes.
"""

import hashlib
import json
import math
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from vivi_jax import files
from vivi_jax.errors import CheckpointError

DIGEST = "sha256"  # key of the metadata
ENCODER = "encoder"  # key: the arguments of models.build_encoder as JSON. A file that has it has DIGEST

SOURCE = "run"  # key: the name of the run directory or file that the encoder is from


def save_safetensors(path: files.Path, state_dict: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, and PATH.sha256 beside it; an older file of that name is replaced as a whole.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    checksum = checksum_path(target)
    # Written by us: safetensors' own writer makes files that only their owner can read, and its errors are no OSErrors.
    content = safetensors.numpy.save(state_dict, metadata | {DIGEST: content_sha256(state_dict, metadata)})
    with files.atomic(target) as unfinished:
        unfinished.write_bytes(content)
        checksum.unlink(missing_ok=True)  # first: a kill in between must not leave a new file beside an old checksum
    files.write_text(checksum, f"{hashlib.sha256(content).hexdigest()}  {target.name}\n")


def content_sha256(state_dict: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata and the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(state_dict.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_safetensors(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (state_dict, metadata) of a safetensors file; one from elsewhere, or of 0.1.0, has no SHA-256 inside.

    Raises:
      CheckpointError: no such file, not a safetensors file, or a content other than PATH.sha256 (where it exists) or
        the file itself says.
    """
    source = pathlib.Path(path)
    if not source.is_file():
        raise CheckpointError(f"no file {path}; python -m vivi_jax.export writes one from a run")
    checksum = checksum_path(source)
    if checksum.is_file():
        written = checksum.read_bytes().split()[:1]
        if len(b"".join(written)) != 64:
            raise CheckpointError(f"{checksum} is damaged: it holds no SHA-256; remove it, or export {path} again")
        if written != [files.sha256(source).encode()]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {checksum}; export it again")
    try:
        with safetensors.safe_open(source, framework="numpy") as file:
            state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    written_inside = metadata.pop(DIGEST, None)
    if written_inside != (content_sha256(state, metadata) if written_inside or ENCODER in metadata else None):
        raise CheckpointError(f"{path} is damaged: its content has not the SHA-256 that it carries; export it again")
    return state, metadata


def number(metadata: dict[str, str], key: str, default: float) -> float:
    """A number of the metadata.

    Raises:
      CheckpointError: it is none.
    """
    try:
        value = float(metadata.get(key, default))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"its metadata say {key}={metadata[key]!r}, which is no number")
    return value


def channels(metadata: dict[str, str], key: str, default: tuple[float, ...]) -> list[float]:
    """Three numbers of the metadata, one of each channel of the input.

    Raises:
      CheckpointError: they are not three finite numbers.
    """
    try:
        values = json.loads(metadata.get(key, json.dumps(default)))
        usable = len(values) == 3 and all(math.isfinite(float(value)) for value in values)
    except (ValueError, TypeError):
        usable = False
    if not usable:
        raise CheckpointError(f"its metadata say {key}={metadata[key]!r}, which are not three numbers")
    return values


def checksum_path(path: pathlib.Path) -> pathlib.Path:
    """Where the checksum of a file is."""
    return path.with_name(path.name + ".sha256")
