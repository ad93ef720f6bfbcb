"""Small networks and variables for them: all that a property hangs on, and quick to compile."""

import math

import jax
import numpy as np
from flax import linen as nn

from vivi_jax.export import torch_names
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import Conv, ResNet, make_norm


class PlainEncoder(Encoder):
    """The contract of an encoder without classifier or dense form, for encoders of tests."""

    norm: str = "batch"

    @property
    def head_norm(self):
        return self.norm

    def feature_maps(self):
        return ("stage4", "stage3")

    def for_transfer(self):
        return self


class TinyEncoder(PlainEncoder):
    """Two convolutions with the norms of the real encoder, for images."""

    @nn.compact
    def __call__(self, images, *, train):
        stages = {}
        x = images
        for i in (3, 4):
            x = Conv(8, 3, stride=2, name=f"conv{i}")(x)
            x = stages[f"stage{i}"] = nn.relu(make_norm(self.norm, name=f"norm{i}")(x, train))
        return x.mean((1, 2)), stages


class TinyVideoEncoder(PlainEncoder):
    """Two convolutions with the real norms, for images and clips: compiles in a tenth of a ResNet's time."""

    def feature_maps(self):
        return ("global", "local2", *super().feature_maps())

    @nn.compact
    def __call__(self, images, *, train):
        x, maps = images.reshape(-1, *images.shape[-3:]), {}
        for i in (3, 4):
            x = Conv(8, 3, stride=2, name=f"conv{i}")(x)
            x = maps[f"stage{i}"] = nn.relu(make_norm(self.norm, name=f"norm{i}")(x, train))
        pooled = x.mean((1, 2)).reshape(*images.shape[:-3], -1)
        if images.ndim == 5:
            pooled = pooled.mean(1)
            maps = {"local2": x.reshape(len(images), -1, *x.shape[1:]), "global": pooled[:, None, None, None]}
        return pooled, maps


def random_variables(encoder: ResNet) -> dict:
    """Parameters and BatchNorm statistics that keep activations around 1.

    Drawn with NumPy: in tests of small networks, compiling JAX's generator would take longest.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            return rng.normal(0, np.sqrt(1 / np.prod(shape[:-1])), shape)
        return rng.uniform(0.5, 1.5, shape) if name in ("scale", "var") else rng.normal(0, 0.1, shape)

    return jax.tree.map(np.float32, jax.tree_util.tree_map_with_path(draw, torch_names.abstract_variables(encoder)))


def count(tree) -> int:
    """Numbers in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
