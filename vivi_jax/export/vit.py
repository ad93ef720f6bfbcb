"""A vision transformer's safetensors file in timm's names: written from an encoder, and read back.

timm holds positions as parameters; here they are fixed, so a file is read only if its positions are these.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax import files
from vivi_jax.config import without_name
from vivi_jax.errors import CheckpointError
from vivi_jax.export.safetensors_files import ENCODER, channels, number, save_safetensors
from vivi_jax.export.torch_names import abstract_leaves, check_entries, encoder_json, timm_call
from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD
from vivi_jax.models.vit import VisionTransformer, positions

MODULES = {"patches": "patch_embed.proj", "qkv": "attn.qkv", "proj": "attn.proj", "mlp1": "mlp.fc1", "mlp2": "mlp.fc2"}
LEAVES = {"kernel": "weight", "patch_kernel": "weight", "scale": "weight", "bias": "bias"}
POSITIONS, TOKEN = "pos_embed", "cls_token"
TIMM_MODELS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # width -> vit_NAME_patch16_224


def timm_name(path: tuple[str, ...]) -> str:
    """("block1", "qkv", "kernel") -> "blocks.0.attn.qkv.weight"."""
    *modules, leaf = path
    names = [re.sub(r"^block(\d+)$", lambda m: f"blocks.{int(m[1]) - 1}", MODULES.get(m, m)) for m in modules]
    return ".".join([*names, LEAVES.get(leaf, leaf)])


def to_timm(leaf: np.ndarray) -> np.ndarray:
    """[p, p, 3, C] -> [C, 3, p, p], [C, C'] -> [C', C]; contiguous, as safetensors writes buffers in memory order."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    return np.ascontiguousarray(np.asarray(leaf, np.float32).transpose(order))


def from_timm(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_timm`."""
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
    return np.ascontiguousarray(np.asarray(array, np.float32).transpose(order))


def pos_embed(width: int, grid: int) -> np.ndarray:
    """float32[1, 1 + grid^2, width], 0 for the class token."""
    of_patches = np.asarray(positions(grid, grid, width)).reshape(1, -1, width)
    return np.concatenate([np.zeros((1, 1, width), np.float32), of_patches], axis=1)


def timm_state(encoder: VisionTransformer, variables: dict) -> dict[str, np.ndarray]:
    """timm's `state_dict` with the weights of ours, for images of encoder.image_size."""
    params: Any = flatten_dict(variables["params"])
    state = {timm_name(path): to_timm(leaf) for path, leaf in params.items()}
    state[TOKEN] = state[TOKEN].reshape(1, 1, -1)
    return state | {POSITIONS: pos_embed(encoder.width, -(-encoder.image_size // encoder.patch))}


def export_timm(
    encoder: VisionTransformer, variables: dict, path: files.Path, extra: Mapping[str, str] = {}
) -> dict[str, str]:
    """Writes the encoder's file for images of encoder.image_size; returns the metadata it carries."""
    metadata = {
        "format": "pt",
        "loads_strictly_into": timm_model(encoder),
        "classifier": "none",
        **extra,
        ENCODER: encoder_json("vit", encoder),
        "heads": str(encoder.heads),
        "image_size": str(encoder.image_size),
        "input_mean": json.dumps(encoder.input_mean),
        "input_std": json.dumps(encoder.input_std),
    }
    save_safetensors(path, timm_state(encoder, variables), metadata)
    return metadata


def timm_spec(encoder: VisionTransformer) -> tuple[str, dict]:
    """timm's name of a model like this encoder, and the arguments that make it this one."""
    size = TIMM_MODELS.get(encoder.width, "small")
    return f"vit_{size}_patch16_224", dict(
        img_size=encoder.image_size, patch_size=encoder.patch, embed_dim=encoder.width,
        depth=encoder.depth, num_heads=encoder.heads,
    )  # fmt: skip


def timm_model(encoder: VisionTransformer) -> str:
    """The call of timm that makes the model of this encoder."""
    return timm_call(timm_spec(encoder), None)


def recognises(state: dict[str, np.ndarray]) -> bool:
    """Whether a state_dict is a ViT's in timm's names."""
    return "patch_embed.proj.weight" in state and TOKEN in state


def read(state: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables); a classifier is left out.

    Raises:
      CheckpointError: positions that were learned, or entries that are missing, unexpected or of another shape.
    """
    state = {name: array for name, array in state.items() if not name.startswith("head.")}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    found = state.pop(POSITIONS, np.zeros((1, 0, width), np.float32))
    grid = int(max(found.shape[1] - 1, 0) ** 0.5)
    expected = pos_embed(width, grid)
    if found.shape != expected.shape or not np.allclose(found, expected, atol=1e-4):
        raise CheckpointError(
            "its positions were learned, or are of another form: only fixed sines and cosines are read"
        )
    config: dict[str, Any] = {
        "name": "vit",
        "patch": int(patch),
        "width": int(width),
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "heads": int(number(metadata, "heads", max(width // 64, 1))),  # 64 channels a head: timm's models
        "image_size": int(grid * patch),
        "input_mean": channels(metadata, "input_mean", IMAGENET_MEAN),
        "input_std": channels(metadata, "input_std", IMAGENET_STD),
    }
    encoder = VisionTransformer(**without_name(config))
    leaves = {path[1:]: leaf for path, leaf in abstract_leaves(encoder).items()}  # without "params"
    paths = {timm_name(path): path for path in leaves}
    state[TOKEN] = state[TOKEN].reshape(-1)
    check_entries(
        {name: array.shape for name, array in state.items()},
        {name: to_timm(np.broadcast_to(np.float32(0), leaves[path].shape)).shape for name, path in paths.items()},
    )
    return config, {"params": unflatten_dict({paths[name]: from_timm(array) for name, array in state.items()})}
