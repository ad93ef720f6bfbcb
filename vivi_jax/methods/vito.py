"""VITO (Parthasarathy et al. 2022, papers: arXiv:2210.06433), and MoCLR (Tian et al. 2021), which is VITO with options.

Read beside Section 3.1 of the paper:

    views      v_l ~ A_l(x_l), x_1..x_V ~ T({x_t})        frames of one clip, BYOL augmentation
    encoder    h_l,s = f_theta(v_l), s = 1..S             spatial maps of the last S ResNet stages
    attention  m_l,s = softmax(a_s(h_l,s))                one two-layer MLP per scale
    pooling    hhat_l = [sum_ij m_l,s[i,j] h_l,s[i,j], s = 1..S]
    projector  z_l = g_theta(hhat_l), rescaled to norm 1/sqrt(tau)
    loss       sum over i != j of InfoNCE(z_i of theta, z_j of xi)
    target     xi <- moving average of theta

MoCLR: one scale, average pooling, all views from one frame (data.sampler="single").
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vivi_jax import losses
from vivi_jax.augment import byol
from vivi_jax.config import Count, OneOf, Positive
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Traffic, Tree, init_network, noise
from vivi_jax.models.base import Encoder, cast_kernels
from vivi_jax.models.heads import FLOAT32_LAYERS, POOLINGS, MultiScalePool, Projector


class VitoNetwork(nn.Module):
    """f, a and g of the paper's Figure 2."""

    encoder: Encoder
    pool: nn.Module
    projector: nn.Module

    def __call__(self, images_BxHxWx3: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, features = self.encoder(images_BxHxWx3, train=train)
        pooled_BxC, masks = self.pool(features)
        return self.projector(pooled_BxC, train=train), masks


class Vito:
    """The method: how examples become embeddings, and embeddings a loss."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        stages: tuple[str, ...],
        pooling: Annotated[str, OneOf(POOLINGS)],
        attention_hidden: Count,
        projector_hidden: Count,
        projector_out: Count,
        temperature: Positive,
    ):
        if not stages or {*stages} - {*encoder.feature_maps()}:
            known = ", ".join(encoder.feature_maps())
            raise ConfigError(f"config.method.stages={tuple(stages)}: one or more of the encoder's maps {known}")
        self.network = VitoNetwork(
            encoder,
            MultiScalePool(stages=tuple(stages), pooling=pooling, hidden=attention_hidden, dtype=encoder.dtype),
            Projector(hidden=projector_hidden, out=projector_out, norm=encoder.head_norm, dtype=encoder.dtype),
        )
        self.temperature = temperature
        self.online_network = self.network.clone(encoder=encoder.on_cast_kernels())  # of `embed`'s cast parameters
        self.target_network = self.network.clone(encoder=encoder.without_noise())

    def batch_spec(self, batch_size: int, data) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"views": uint8[B, V, H, W, 3]}."""
        if data.views < 2:
            raise ConfigError(
                f"config.data.views={data.views}: the loss compares views of a clip, so there must be 2 or more"
            )
        shape = (batch_size, data.views, data.image_size, data.image_size, 3)
        return {"views": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """Online and target network start from different seeds, as in BYOL's code."""
        images = jnp.zeros((1, *batch["views"].shape[2:]))  # [1, H, W, 3]
        online, target = (init_network(self.network, k, images) for k in jax.random.split(key))
        return MethodState(*online, {"params": target[0], "model_state": target[1]})

    def views(self, batch: Batch, keys: Keys) -> dict[str, jax.Array]:
        """BYOL's augmentation, A1, A2, A1: {"views": float32[B, V, H, W, 3] in [0, 1]}."""
        return {"views": byol.byol_views(batch["views"], keys["views"])}

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[dict[str, jax.Array], Tree, Tree]:
        """Projects all views with the online and the target network.

        Args:
          batch: {"views": uint8[B, V, H, W, 3]}.
          keys: {"views": a key per example [B]}.

        Returns:
          ({"online", "target"}: float32[B, V, D] of norm 1/sqrt(tau), new model_state, new target). The target network
          runs in training mode too, with BatchNorm statistics of its own (BYOL's code; the paper does not say), but
          without stochastic depth (MoBY, arXiv:2105.04553).
        """
        views_BxVxHxWx3 = self.views(batch, keys)["views"]
        params = self.cast_kernels(params)
        online, momentum, target_state = [], [], target["model_state"]
        for v in range(views_BxVxHxWx3.shape[1]):  # separately: BatchNorm sees one view at a time, as in BYOL's code
            view_BxHxWx3 = views_BxVxHxWx3[:, v]
            draws = noise(keys["views"], v)
            z_BxD, model_state = self.project(self.online_network, params, model_state, view_BxHxWx3, draws)
            y_BxD, target_state = self.project(self.target_network, target["params"], target_state, view_BxHxWx3)
            online.append(z_BxD)
            momentum.append(jax.lax.stop_gradient(y_BxD))
        embeddings = {"online": jnp.stack(online, axis=1), "target": jnp.stack(momentum, axis=1)}
        return embeddings, model_state, {**target, "model_state": target_state}

    def cast_kernels(self, params: Tree) -> Tree:
        """Kernels in the type that each part computes in, made once for all views."""
        encoder = self.network.encoder
        cast = {part: cast_kernels(tree, encoder.dtype, keep=FLOAT32_LAYERS) for part, tree in params.items()}
        return cast | {"encoder": encoder.cast_kernels(params["encoder"])}

    def project(
        self,
        network: VitoNetwork,
        params: Tree,
        model_state: Tree,
        images_BxHxWx3: jax.Array,
        draws: Mapping[str, Tree] = types.MappingProxyType({}),
    ) -> tuple[jax.Array, Tree]:
        """z = g(pool(f(images))) with norm 1/sqrt(tau), in training mode; and the new BatchNorm statistics."""
        (z_BxD, _), model_state = network.apply(
            {"params": params, **model_state, **draws}, images_BxHxWx3, train=True, mutable=list(model_state)
        )
        return losses.unit_length(z_BxD) / self.temperature**0.5, model_state

    def loss(
        self, embeddings: dict[str, jax.Array], batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """MoCLR's loss on the global batch, and signs of collapse (of the online network's first view)."""
        loss = losses.moclr(embeddings["online"], embeddings["target"])
        return loss, loss_state, losses.collapse_indicators(jax.lax.stop_gradient(embeddings["online"][:, 0]))

    def attention_masks(self, params: Tree, model_state: Tree, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
        """Masks of the online network, stage -> float32[B, h, w] summing to 1; {} with average pooling (Fig. A.1)."""
        if self.network.pool.pooling == "average":
            return {}
        masks: Any
        _, masks = self.network.apply({"params": params, **model_state}, images_BxHxWx3, train=False)
        return masks

    def traffic(self, embeddings: dict[str, jax.Array], devices: int) -> Traffic:
        """The keys go to all devices; they are the target network's, so that no gradient comes back."""
        views = embeddings["target"].shape[1]
        # Each view forwards through the online and the target network, and backwards through the online one.
        return Traffic(embeddings["target"].size, 3 * views, ("encoder", "pool", "projector"))
