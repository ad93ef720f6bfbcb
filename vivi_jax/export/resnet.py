"""A ResNet's safetensors file in torchvision's or timm's names: written from an encoder, and read back."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vivi_jax import files
from vivi_jax.config import without_name
from vivi_jax.errors import CheckpointError
from vivi_jax.export.safetensors_files import ENCODER, channels, number, save_safetensors
from vivi_jax.export.torch_names import (
    EPS,
    TIMM,
    TORCHVISION,
    Naming,
    depth_of,
    encoder_json,
    from_torch,
    timm_call,
    to_torch,
)
from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD
from vivi_jax.models.resnet import ResNet

TIMM_V1 = dataclasses.replace(TORCHVISION, library="timm", classifier_always=False)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)  # of timm's resnetv2 models, where a file does not say
# (depth, width) of the models timm has: of v1, and for either norm of a v2 ResNet.
TIMM_MODELS: dict[str, dict[tuple[int, float], str]] = {
    "v1": {(depth, 1): f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "batch": {(depth, 1): f"resnetv2_{depth}" for depth in (18, 34, 50, 101, 152)},
    "group": {
        (depth, width): f"resnetv2_{depth}x{width}_bit"
        for depth, width in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))
    },
}


def recognises(state: dict[str, np.ndarray]) -> bool:
    """Whether a state_dict is a ResNet's in torchvision's or timm's names."""
    return "conv1.weight" in state or "stem.conv.weight" in state


def read(state: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables): depth, width, norm and stem by the entries.

    Raises:
      CheckpointError: as torch_names.from_torch; no depth has these blocks; or a BatchNorm ResNet v2 whose max-pool is
        padded otherwise.
    """
    naming = TIMM if "stem.conv.weight" in state else TORCHVISION
    stem = state["stem.conv.weight" if naming is TIMM else "conv1.weight"]
    mean, std = (INCEPTION_MEAN, INCEPTION_STD) if naming is TIMM else (IMAGENET_MEAN, IMAGENET_STD)
    classifier = state.get(f"{naming.classifier}.weight", np.zeros((0, 0)))
    config: dict[str, Any] = {
        "name": "resnet",
        "width": stem.shape[0] / 64,
        "stem": "imagenet" if stem.shape[-1] == 7 else "small",
        "num_classes": len(classifier) if classifier.any() else None,
        "input_mean": channels(metadata, "input_mean", mean),
        "input_std": channels(metadata, "input_std", std),
        "depth": depth_of(naming, state),
        "norm_eps": number(metadata, "norm_eps", EPS),
        "norm_decay": number(metadata, "norm_decay", 0.9),  # torch's default, as its momentum is 0.1
    }
    if naming is TIMM:
        config |= _v2_kind("norm.running_mean" in state, metadata)
    return config, from_torch(naming, ResNet(**without_name(config)), state)


def _v2_kind(batch_norm: bool, metadata: dict[str, str]) -> dict:
    if batch_norm and metadata.get("max_pool_padding") != "zeros":
        raise CheckpointError(
            "its max-pool is padded with -inf, as that of timm's resnetv2_50, and the encoder's here "
            "with zeros: only files written here, or built with stem_type='fixed' and with the "
            "metadata max_pool_padding=zeros, can be read"
        )
    if batch_norm:
        return {"version": 2, "norm": "batch", "weight_standardization": False}
    # timm's own code adds 1e-8. Files written here say what they were trained with, by earlier versions 1e-10.
    eps = number(metadata, "kernel_eps", 1e-10 if "max_pool_padding" in metadata else 1e-8)
    return {"version": 2, "norm": "group", "weight_standardization": True, "kernel_eps": eps}


def export_torchvision(
    encoder: ResNet, variables: dict, path: files.Path, extra: Mapping[str, str] = {}
) -> dict[str, str]:
    """Writes the encoder's safetensors file in torchvision's names; returns the metadata it carries."""
    plain = encoder.width == 1 and encoder.stem == "imagenet" and encoder.depth != 200
    loads = f"torchvision.models.resnet{encoder.depth}" if plain else "none (custom width or stem)"
    classes = "" if encoder.num_classes is None else f"(num_classes={encoder.num_classes})"
    return _export(
        TORCHVISION,
        encoder,
        variables,
        path,
        {
            "loads_strictly_into": loads + classes,
            "classifier": "none: fc is all zeros" if encoder.num_classes is None else "fc",
            **extra,
        },
    )


def export_timm(encoder: ResNet, variables: dict, path: files.Path, extra: Mapping[str, str] = {}) -> dict[str, str]:
    """Writes the encoder's safetensors file in timm's names; returns the metadata it carries.

    timm's ResNets v1 have torchvision's names, but no classifier if there is none.
    """
    naming = TIMM if encoder.version == 2 else TIMM_V1
    metadata = {
        "loads_strictly_into": timm_model(encoder),
        "classifier": "none" if encoder.num_classes is None else naming.classifier,
        **extra,
    }
    if encoder.version == 2:  # timm's own kernel_eps is 1e-8, which makes no difference to be seen
        metadata |= {"max_pool_padding": "zeros", "kernel_eps": str(encoder.kernel_eps)}
    return _export(naming, encoder, variables, path, metadata)


def timm_spec(encoder: ResNet) -> tuple[str, dict] | None:
    """timm's name of the model of this encoder, and its arguments; None: it has none of these sizes."""
    names = TIMM_MODELS[encoder.norm if encoder.version == 2 else "v1"]
    name = names.get((encoder.depth, float(encoder.width)))
    if name is None or encoder.stem != "imagenet":
        return None
    return name, {"stem_type": "fixed"} if (encoder.version, encoder.norm) == (2, "batch") else {}  # BiT's have it


def timm_model(encoder: ResNet) -> str:
    """The call of timm that makes the model of this encoder."""
    return timm_call(timm_spec(encoder), encoder.num_classes) or "none (custom depth, width or stem)"


def _export(
    naming: Naming, encoder: ResNet, variables: dict, path: files.Path, metadata: dict[str, str]
) -> dict[str, str]:
    metadata = {
        "format": "pt",
        **metadata,
        ENCODER: encoder_json("resnet", encoder),
        "width": str(encoder.width),
        "stem": encoder.stem,
        "norm_eps": str(encoder.norm_eps),  # what of it is above torch's 1e-5 is in the running variances
        "norm_decay": str(encoder.norm_decay),
        "input_mean": json.dumps(encoder.input_mean),
        "input_std": json.dumps(encoder.input_std),
    }
    save_safetensors(path, to_torch(naming, encoder, variables), metadata)
    return metadata
