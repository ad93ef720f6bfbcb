"""Encoders under the names that other people's code knows: what can be written, and what can be read.

A format is a line of EXPORTERS, the kinds of encoder it holds, and a reader in READERS for its files.
"""

from collections.abc import Callable

from vivi_jax.errors import CheckpointError, ConfigError, lookup
from vivi_jax.export import elsewhere, resnet, swin, vit, weight_files
from vivi_jax.export.resnet import export_timm, export_torchvision
from vivi_jax.export.weight_files import is_weight_file as is_weight_file
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.swin import SwinTransformer
from vivi_jax.models.vit import VisionTransformer

# format -> kind of encoder -> function (encoder, variables, path) that writes the file and returns its metadata
EXPORTERS: dict[str, dict[type[Encoder], Callable[..., dict[str, str]]]] = {
    "torchvision": {ResNet: export_torchvision, SwinTransformer: swin.export_torchvision},
    "timm": {ResNet: export_timm, SwinTransformer: swin.export_timm, VisionTransformer: vit.export_timm},
}
# (whether a state_dict is of this kind, function (state_dict, metadata) -> (arguments of build_encoder, variables))
READERS: tuple[tuple[Callable[[dict], bool], Callable[..., tuple[dict, dict]]], ...] = (
    (elsewhere.is_bit, elsewhere.read_bit),
    (elsewhere.is_haiku, elsewhere.read_haiku),
    (resnet.recognises, resnet.read),
    (swin.recognises, swin.read),
    (vit.recognises, vit.read),
)


def export_encoder(format_name: str, encoder: Encoder, variables: dict, path: str) -> dict[str, str]:
    """Writes PATH and PATH.sha256; returns the metadata that the file carries.

    Raises:
      ConfigError: no such format, or one that has no such encoder.
    """
    holds = lookup("--format", format_name, EXPORTERS)
    if type(encoder) not in holds:
        others = [name for name, kinds in EXPORTERS.items() if type(encoder) in kinds]
        remedy = f"use --format={' or '.join(others)}" if others else "no format here has it"
        raise ConfigError(f"format {format_name} has no {type(encoder).__name__}: {remedy}")
    return holds[type(encoder)](encoder, variables, path)


def load_encoder(path: str) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables) of a file of weights.

    What the encoder is follows from the names and shapes of its entries, also
    in a file that was not written here; what a project puts around them is found and left out (elsewhere.py). A missing
    or all-zero classifier is left out. Input statistics come from the metadata, or else are the library's own.

    Raises:
      CheckpointError: no such file, one that is damaged or holds more than weights, or entries that are of no encoder
        here.
    """
    tree, metadata = weight_files.load(path)
    try:
        state = elsewhere.state_dict(tree)
        for recognises, read in READERS:
            if recognises(state):
                return read(state, metadata)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    some = ", ".join(sorted(state)[:3])
    raise CheckpointError(
        f"{path} has no entry conv1.weight, stem.conv.weight or patch_embed.proj.weight, by which ResNets, ViTs and "
        f"Swin transformers in torchvision's or timm's names are known, nor haiku's or BiT's; it has {some or 'none'}"
    )
