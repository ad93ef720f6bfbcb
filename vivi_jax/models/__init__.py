"""Image encoders by name. An encoder is one file here and one line of ENCODERS; base.py has the contract."""

from typing import Any

from vivi_jax.config import call_with_config
from vivi_jax.errors import lookup
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.swin import SwinTransformer
from vivi_jax.models.vdim_encoder import VdimEncoder
from vivi_jax.models.vit import VisionTransformer

ENCODERS: dict[str, type[Encoder]] = {
    "resnet": ResNet,
    "swin": SwinTransformer,
    "vdim": VdimEncoder,
    "vit": VisionTransformer,
}


def build_encoder(name: str, **kwargs: Any) -> Encoder:
    """Returns the encoder `name` of ENCODERS, built with its own keyword arguments.

    Lists become tuples, so that arguments read back from config.json build the same (hashable) module.

    Raises:
      ConfigError: no encoder has this name, an argument it does not have, or a value impossible for it.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    return call_with_config("encoder", lookup("config.encoder.name", name, ENCODERS), **arguments)
