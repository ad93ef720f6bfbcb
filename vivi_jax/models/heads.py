"""Heads on top of the encoder during pretraining: multi-scale pooling (VITO section 3.1), projector, VDIM's phi."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax.errors import ConfigError
from vivi_jax.models.resnet import haiku_kernel, make_norm

POOLINGS = ("attention", "average")
FLOAT32_LAYERS = ("mlp2",)  # AttentionPool's logits


class AttentionPool(nn.Module):
    """Attention pooling of one feature map: a two-layer MLP a_s at each place, softmax over space (VITO section 3.1).

    The paper's prefactor 1 / sum(m) is 1 here, as the softmax sums to 1. `hidden`, the ReLU and the absence of a norm
    are not in the paper.
    """

    hidden: int = 512
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, h, w, C] -> pooled float32 [B, C], mask float32 [B, h, w] (>= 0, sums to 1 over space)."""
        y = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="mlp1")(x))
        logits = nn.Dense(1, dtype=jnp.float32, name="mlp2")(y)[..., 0]  # [B, h, w]
        mask = jax.nn.softmax(logits, axis=(1, 2))
        return jnp.einsum("bhw,bhwc->bc", mask, x.astype(jnp.float32)), mask


class MultiScalePool(nn.Module):
    """Pools several stages of an encoder, each with its own attention, and concatenates them (VITO section 3.1).

    Attributes:
      stages: names of the encoder's intermediates, in the order of concatenation; ("stage4",) is one scale.
      pooling: "attention", or "average" (VITO's ablation; no parameters, no masks).
      hidden: width of the attention MLP.
      dtype: compute type of the MLP; pooling is float32.
    """

    stages: tuple[str, ...] = ("stage3", "stage4")
    pooling: str = "attention"
    hidden: int = 512
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, intermediates: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Feature maps [B, h, w, c] by name -> pooled float32 [B, sum of c], masks {stage: float32 [B, h, w]} or {}.

        Raises:
          ConfigError: unknown pooling, or a stage the encoder does not give.
        """
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling={self.pooling!r}: must be one of {POOLINGS}")
        if missing := [stage for stage in self.stages if stage not in intermediates]:
            raise ConfigError(f"stages {missing} are not among the encoder's outputs {sorted(intermediates)}")
        pooled, masks = [], {}
        for stage in self.stages:
            x = intermediates[stage]  # [B, h, w, c]
            if self.pooling == "attention":
                features, masks[stage] = AttentionPool(self.hidden, dtype=self.dtype, name=stage)(x)
            else:
                features = x.astype(jnp.float32).mean(axis=(1, 2))
            pooled.append(features)
        return jnp.concatenate(pooled, axis=-1), masks


class Projector(nn.Module):
    """Dense (bias) - norm - ReLU - Dense (no bias): the projector of BYOL's code, used by VITO; there is no predictor.

    Attributes:
      hidden, out: widths of the two layers.
      norm: "batch" as in the paper; "group" keeps examples independent (for exact micro-batches).
      dtype: compute type of the matmuls; the output is float32.
    """

    hidden: int = 4096
    out: int = 256
    norm: str = "batch"
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, C] -> float32 [B, out], not normalised."""
        dense = functools.partial(nn.Dense, kernel_init=haiku_kernel, dtype=self.dtype)
        x = dense(self.hidden, name="dense1")(x)
        x = nn.relu(make_norm(self.norm, dtype=self.dtype, name="norm")(x, train))
        return dense(self.out, use_bias=False, name="dense2")(x).astype(jnp.float32)


class ResidualMlp(nn.Module):
    """VDIM's phi_j: an MLP with one hidden layer and a shortcut, at each location (VDIM section 3.3, footnote 1).

    The form is AMDIM's FakeRKHSConvNet: conv - norm - ReLU - conv (0 at first) + shortcut conv (near the identity at
    first), then a norm over the sum; VDIM says "batch norm is used ... in the contrastive models".

    Attributes:
      out: width of the hidden layer and the output (VDIM section 4: 512).
      norm: "batch", over examples and locations, or "group".
      dtype: compute type of the matmuls; the output is float32.
    """

    out: int = 512
    norm: str = "batch"
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, ..., C] -> float32 [B, ..., out]."""
        locations = x.reshape(-1, x.shape[-1])  # two axes: why, see resnet.Conv
        hidden = nn.Dense(self.out, use_bias=False, dtype=self.dtype, name="conv1")(locations)
        hidden = hidden.reshape(*x.shape[:-1], self.out)
        hidden = nn.relu(make_norm(self.norm, dtype=self.dtype, name="norm1")(hidden, train))
        y = nn.Dense(self.out, use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv2")(
            hidden.reshape(-1, self.out)
        )
        y += nn.Dense(self.out, kernel_init=near_identity, dtype=self.dtype, name="shortcut")(locations)
        y = y.reshape(*x.shape[:-1], self.out)
        return make_norm(self.norm, dtype="float32", name="norm2")(y, train)


def near_identity(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Kernel [C, C'] of U(-0.01, 0.01) with ones on the diagonal (AMDIM)."""
    noise = jax.random.uniform(key, shape, dtype, -0.01, 0.01)
    return jnp.where(jnp.eye(*shape, dtype=bool), 1.0, noise)
