"""Image encoders by name: `build_encoder("resnet", depth=50)`. A new encoder is one file and one line of ENCODERS.

An encoder is a Flax module with `apply(variables, images, train=bool) -> (pooled, intermediates)`: images float
[B, H, W, 3] in [0, 1], pooled float32 [B, C], intermediates a dict of named feature maps [B, h, w, c]. "vdim" also
takes clips [B, T, H, W, 3], and its feature maps have a time axis.
"""

from flax import linen as nn

from vivi_jax.errors import lookup
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.vdim_encoder import VdimEncoder

ENCODERS = {"resnet": ResNet, "vdim": VdimEncoder}


def build_encoder(name: str, **kwargs) -> nn.Module:
    """Returns the encoder `name` of ENCODERS built with its own keyword arguments.

    Lists become tuples, so that arguments read back from config.json build the same (hashable) module.

    Raises:
      ConfigError: no encoder has this name, or a value is impossible for it.
      TypeError: an argument the encoder does not have.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    return lookup("config.encoder.name", name, ENCODERS)(**arguments)
