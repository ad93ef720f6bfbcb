"""Encoders as NumPy archives: any encoder, under the names it has here, with what builds it; read back exactly.

Arrays are named "params/stem_conv/kernel"; "encoder" is the JSON text of models.build_encoder's arguments, "sha256"
that of all the rest. numpy.load(path, allow_pickle=False) reads it.
"""

import json
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from vivi_jax import files
from vivi_jax.errors import CheckpointError
from vivi_jax.export.safetensors_files import DIGEST, ENCODER, content_sha256
from vivi_jax.export.torch_names import abstract_leaves, check_entries, encoder_json
from vivi_jax.models import ENCODERS, build_encoder
from vivi_jax.models.base import Encoder


def name_of(encoder: Encoder) -> str:
    """The encoder's name in models.ENCODERS."""
    return next(name for name, kind in ENCODERS.items() if type(encoder) is kind)


def write(encoder: Encoder, arrays: dict[str, np.ndarray], path: files.Path) -> dict[str, str]:
    """Writes float32 arrays by name; returns the metadata."""
    metadata = {ENCODER: encoder_json(name_of(encoder), encoder)}
    texts = metadata | {DIGEST: content_sha256(arrays, metadata)}
    with files.atomic(path) as unfinished, open(unfinished, "wb") as file:
        named: dict[str, Any] = arrays | {key: np.array(text) for key, text in texts.items()}
        np.savez(file, **named)
    return metadata


def recognises(state: dict[str, np.ndarray]) -> bool:
    """Whether the arrays are of an archive written here."""
    return ENCODER in state and any(name.startswith("params/") for name in state)


def read(state: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables).

    Raises:
      CheckpointError: it is damaged, or its arrays are not those of its encoder.
    """
    arrays = {name: array for name, array in state.items() if name not in (ENCODER, DIGEST)}
    texts = {ENCODER: str(state[ENCODER])}
    if str(state.get(DIGEST)) != content_sha256(arrays, texts):
        raise CheckpointError("it is damaged: its content has not the SHA-256 that it carries; export it again")
    try:
        config: dict[str, Any] = json.loads(texts[ENCODER])
        config["name"]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"its {ENCODER!r} says of no encoder what it is") from None
    encoder = build_encoder(**config)
    check_entries({name: array.shape for name, array in arrays.items()}, expected(encoder))
    return config, unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})


def expected(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Shapes of an encoder's arrays by name."""
    return {"/".join(path): leaf.shape for path, leaf in abstract_leaves(encoder).items()}
