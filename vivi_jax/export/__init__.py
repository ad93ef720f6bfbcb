"""Encoders under the names that other people's code knows: what can be written, and what can be read.

A format is a line of formats.FORMATS, and a reader in READERS for its files.
"""

from collections.abc import Callable

from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import elsewhere, resnet, swin, vit, weight_files
from vivi_jax.export.formats import FORMATS as FORMATS
from vivi_jax.export.formats import About as About
from vivi_jax.export.formats import check_weights, npz
from vivi_jax.export.formats import export_encoder as export_encoder
from vivi_jax.export.formats import save as save
from vivi_jax.export.resnet import export_timm as export_timm
from vivi_jax.export.resnet import export_torchvision as export_torchvision
from vivi_jax.export.weight_files import is_weight_file as is_weight_file
from vivi_jax.models import build_encoder

# (whether a state_dict is of this kind, function (state_dict, metadata) -> (arguments of build_encoder, variables))
READERS: tuple[tuple[Callable[[dict], bool], Callable[..., tuple[dict, dict]]], ...] = (
    (npz.recognises, npz.read),
    (elsewhere.is_bit, elsewhere.read_bit),
    (elsewhere.is_haiku, elsewhere.read_haiku),
    (resnet.recognises, resnet.read),
    (swin.recognises, swin.read),
    (vit.recognises, vit.read),
)


def load_encoder(path: str) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables) of a file of weights.

    What the encoder is follows from the names and shapes of its entries, also
    in a file that was not written here; what a project puts around them is found and left out (elsewhere.py). A missing
    or all-zero classifier is left out. Input statistics come from the metadata, or else are the library's own.

    Raises:
      CheckpointError: no such file, one that is damaged or holds more than weights, or entries that are of no encoder
        here.
    """
    file, architecture = weight_files.in_hub_folder(path)
    tree, metadata = weight_files.load(file)
    try:
        state = elsewhere.state_dict(tree)
        for recognises, read in READERS:
            if recognises(state):
                config, variables = read(state, metadata)
                check_weights(build_encoder(**config), variables)
                return config, variables
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    some = ", ".join(sorted(state)[:3])
    raise CheckpointError(
        f"{path} has no entry conv1.weight, stem.conv.weight or patch_embed.proj.weight, by which ResNets, ViTs and "
        f"Swin transformers in torchvision's or timm's names are known, nor haiku's or BiT's; it has {some or 'none'}"
        + (f". Its config.json names {architecture}: of the Hub, timm's folders are read" if architecture else "")
    )
