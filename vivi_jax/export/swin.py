"""A Swin transformer's safetensors file in torchvision's or timm's names: written from an encoder, and read back.

Read are also the names of Swin's own code, which are timm's but for merging and classifier.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax import files
from vivi_jax.config import without_name
from vivi_jax.errors import CheckpointError
from vivi_jax.export.safetensors_files import ENCODER, channels, save_safetensors
from vivi_jax.export.torch_names import TORCH_AXES, abstract_leaves, check_entries, encoder_json, timm_call
from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD
from vivi_jax.models.swin import TABLE, SwinTransformer, relative_positions

INDEX, MASK = "relative_position_index", "attn_mask"  # buffers of libraries, that follow from the sizes
LEAVES = {"kernel": "weight", "scale": "weight"}
MODELS: dict[tuple[int, ...], tuple[str, str]] = {
    (2, 2, 6, 2): ("swin_t", "swin_tiny"),
    (2, 2, 18, 2): ("swin_s", "swin_small"),
}  # torchvision's, timm's


@dataclasses.dataclass(frozen=True)
class SwinNaming:
    """How a library names the entries of its Swin transformers.

    Attributes:
      modules: ours -> theirs; a module that is not here has the same name.
      block, merge: theirs, with places for a number of the stage and for that of the block (from 0).
      stages: "block" or "merge" -> (a, b): the number of stage s (from 1) is a * s + b.
      classifier_always: as in torch_names.Naming.
      has_index: every attention has INDEX as an entry.
    """

    library: str
    modules: dict[str, str]
    block: str
    merge: str
    stages: Mapping[str, tuple[int, int]]
    classifier_always: bool
    has_index: bool

    def name(self, path: tuple[str, ...]) -> str:
        """("params", "stage1_block2", "mlp1", "kernel") -> "features.1.1.mlp.0.weight"."""
        _, *modules, leaf = path
        names = [self._module(module) for module in modules]
        return ".".join([*names, *(["attn"] if leaf == TABLE else []), LEAVES.get(leaf, leaf)])

    def _module(self, module: str) -> str:
        if match := re.fullmatch(r"stage(\d)_block(\d+)", module):
            return self.block.format(self.number("block", int(match[1])), int(match[2]) - 1)
        if match := re.fullmatch(r"stage(\d)_merge(_norm)?", module):
            return self.merge.format(self.number("merge", int(match[1]))) + (".norm" if match[2] else ".reduction")
        return self.modules.get(module, module)

    def number(self, kind: str, stage: int) -> int:
        factor, offset = self.stages[kind]
        return factor * stage + offset

    def depths(self, state: Mapping) -> tuple[int, ...]:
        """Number of blocks in each of the four stages, told from the names of the entries."""
        return tuple(
            sum(
                name.startswith(self.block.format(self.number("block", s), "")) and name.endswith(TABLE)
                for name in state
            )
            for s in (1, 2, 3, 4)
        )


ATTENTION = {"qkv": "attn.qkv", "proj": "attn.proj"}
TORCHVISION = SwinNaming(
    library="torchvision",
    modules=ATTENTION
    | {
        "patches": "features.0.0",
        "patches_norm": "features.0.2",
        "mlp1": "mlp.0",
        "mlp2": "mlp.3",
        "classifier": "head",
    },
    block="features.{}.{}",
    merge="features.{}",
    stages={"block": (2, -1), "merge": (2, -2)},
    classifier_always=True,
    has_index=True,
)
TIMM = SwinNaming(
    library="timm",
    modules=ATTENTION
    | {
        "patches": "patch_embed.proj",
        "patches_norm": "patch_embed.norm",
        "mlp1": "mlp.fc1",
        "mlp2": "mlp.fc2",
        "classifier": "head.fc",
    },
    block="layers.{}.blocks.{}",
    merge="layers.{}.downsample",
    stages={"block": (1, -1), "merge": (1, -1)},
    classifier_always=False,
    has_index=False,
)
MICROSOFT = dataclasses.replace(  # github.com/microsoft/Swin-Transformer, models/swin_transformer.py; only read
    TIMM,
    library="Swin's code",
    modules=TIMM.modules | {"classifier": "head"},
    stages={"block": (1, -1), "merge": (1, -2)},
)


def to_state(naming: SwinNaming, encoder: SwinTransformer, variables: dict) -> dict[str, np.ndarray]:
    """Returns the library's `state_dict` with the weights of ours: float32, and int64 indices.

    Raises:
      CheckpointError: variables that are not this encoder's.
    """
    leaves: Any = flatten_dict(variables)
    expected = {naming.name(path): leaf.shape for path, leaf in abstract_leaves(encoder).items()}
    check_entries({naming.name(path): leaf.shape for path, leaf in leaves.items()}, expected)
    state = {naming.name(path): to_torch(path, np.asarray(leaf, np.float32)) for path, leaf in leaves.items()}
    if naming.classifier_always and encoder.num_classes is None:
        name, width = naming.modules["classifier"], 8 * encoder.width
        state |= {f"{name}.weight": np.zeros((1000, width), np.float32), f"{name}.bias": np.zeros(1000, np.float32)}
    if naming.has_index:
        index = relative_positions(encoder.window).reshape(-1)
        state |= {name.replace(TABLE, INDEX): index.astype(np.int64) for name in list(state) if name.endswith(TABLE)}
    return state


def to_torch(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
    """[p, p, 3, C] -> [C, 3, p, p], [C, C'] -> [C', C]; contiguous, as safetensors writes buffers in memory order."""
    return leaf if path[-1] == TABLE else np.ascontiguousarray(leaf.transpose(TORCH_AXES[leaf.ndim]))


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`; always a float32 copy."""
    axes = tuple(range(array.ndim)) if path[-1] == TABLE else np.argsort(TORCH_AXES[array.ndim])
    return np.array(array.transpose(axes), np.float32, order="C")


def export_torchvision(
    encoder: SwinTransformer, variables: dict, path: files.Path, extra: Mapping[str, str] = {}
) -> dict[str, str]:
    """Writes the encoder's file in torchvision's names; returns the metadata it carries."""
    model = model_name(encoder, 0)
    classes = "" if encoder.num_classes is None else f"(num_classes={encoder.num_classes})"
    return _export(
        TORCHVISION,
        encoder,
        variables,
        path,
        {
            "loads_strictly_into": f"torchvision.models.{model}{classes}" if model else "none (custom sizes)",
            "classifier": "none: head is all zeros" if encoder.num_classes is None else "head",
            **extra,
        },
    )


def export_timm(
    encoder: SwinTransformer, variables: dict, path: files.Path, extra: Mapping[str, str] = {}
) -> dict[str, str]:
    """Writes the encoder's file in timm's names; returns the metadata it carries."""
    return _export(
        TIMM,
        encoder,
        variables,
        path,
        {
            "loads_strictly_into": timm_call(timm_spec(encoder), encoder.num_classes) or "none (custom sizes)",
            "classifier": "none" if encoder.num_classes is None else "head.fc",
            **extra,
            # timm shifts a map before it fills it up to whole windows, torchvision and the encoder here after.
            "same_features_at": f"sides that are multiples of {8 * encoder.patch * encoder.window}",
        },
    )


def timm_spec(encoder: SwinTransformer) -> tuple[str, dict] | None:
    """timm's name of the model of this encoder, and its arguments; None: it has none of these sizes."""
    model = model_name(encoder, 1)
    return (f"{model}_patch4_window7_224", {}) if model else None


def model_name(encoder: SwinTransformer, library: int) -> str | None:
    """torchvision's (0) or timm's (1) name of the model with the encoder's sizes; None: it has no such model."""
    plain = (encoder.width, encoder.heads, encoder.window, encoder.patch) == (96, (3, 6, 12, 24), 7, 4)
    return MODELS.get(encoder.depths, (None, None))[library] if plain else None


def _export(
    naming: SwinNaming, encoder: SwinTransformer, variables: dict, path: files.Path, metadata: dict[str, str]
) -> dict[str, str]:
    statistics = {"input_mean": json.dumps(encoder.input_mean), "input_std": json.dumps(encoder.input_std)}
    metadata = {"format": "pt", **metadata, ENCODER: encoder_json("swin", encoder), **statistics}
    save_safetensors(path, to_state(naming, encoder, variables), metadata)
    return metadata


def recognises(state: dict[str, np.ndarray]) -> bool:
    """Whether a state_dict is a Swin transformer's in torchvision's, timm's or its own code's names."""
    return any(name.endswith(f"attn.{TABLE}") for name in state)


def read(state: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables): all sizes by the entries' names and shapes.

    Raises:
      CheckpointError: entries that are missing, unexpected or of another shape, or of Swin v2.
    """
    naming = TORCHVISION if "features.0.0.weight" in state else TIMM
    if "layers.0.downsample.reduction.weight" in state:
        naming = MICROSOFT
    none = np.zeros(0)
    first = [state.get(naming.block.format(naming.number("block", s), f"0.attn.{TABLE}"), none) for s in (1, 2, 3, 4)]
    patches = state.get(f"{naming.modules['patches']}.weight", none)
    if patches.ndim != 4 or any(table.ndim != 2 for table in first):
        raise CheckpointError("it has no four stages of a Swin transformer")
    name = naming.modules["classifier"]
    classifier = state.get(f"{name}.weight", np.zeros((0, 0)))
    config: dict[str, Any] = {
        "name": "swin",
        "width": patches.shape[0],
        "depths": naming.depths(state),
        "heads": tuple(table.shape[1] for table in first),
        "window": (round(len(first[0]) ** 0.5) + 1) // 2,
        "patch": patches.shape[-1],
        "num_classes": len(classifier) if classifier.any() else None,
        "input_mean": channels(metadata, "input_mean", IMAGENET_MEAN),
        "input_std": channels(metadata, "input_std", IMAGENET_STD),
    }
    encoder = SwinTransformer(**without_name(config))
    index = relative_positions(encoder.window).reshape(-1)
    if wrong := [n for n, x in state.items() if n.endswith(INDEX) and not np.array_equal(np.ravel(x), index)]:
        raise CheckpointError(f"{wrong[0]} is not the order of relative positions of Swin's code")
    state = {n: array for n, array in state.items() if not n.endswith((INDEX, MASK))}
    if encoder.num_classes is None:
        state = {n: array for n, array in state.items() if not n.startswith(f"{name}.")}
    leaves = abstract_leaves(encoder)
    shapes = {
        naming.name(path): to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        for path, leaf in leaves.items()
    }
    check_entries({n: array.shape for n, array in state.items()}, shapes)
    return config, unflatten_dict({path: from_torch(path, state[naming.name(path)]) for path in leaves})
