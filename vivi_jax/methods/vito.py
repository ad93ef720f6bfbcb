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

import flax.linen as nn
import jax
import jax.numpy as jnp

from vivi_jax import losses
from vivi_jax.augment import byol
from vivi_jax.models.heads import MultiScalePool, Projector, cast_kernels


class VitoNetwork(nn.Module):
    """f, a and g of the paper's Figure 2."""

    encoder: nn.Module
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
        encoder: nn.Module,
        *,
        stages: tuple[str, ...],
        pooling: str,
        attention_hidden: int,
        projector_hidden: int,
        projector_out: int,
        temperature: float,
        ema_base: float,
    ):
        self.network = VitoNetwork(
            encoder,
            MultiScalePool(stages=tuple(stages), pooling=pooling, hidden=attention_hidden, dtype=encoder.dtype),
            Projector(hidden=projector_hidden, out=projector_out, norm=encoder.norm, dtype=encoder.dtype),
        )
        self.temperature = temperature
        self.ema_base = ema_base

    @staticmethod
    def batch_spec(batch_size: int, data) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch, from config.data: {"views": uint8[B, V, H, W, 3]}."""
        shape = (batch_size, data.views, data.image_size, data.image_size, 3)
        return {"views": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(self, key: jax.Array, batch: dict[str, jax.Array]) -> tuple[dict, dict, dict]:
        """Returns (params, model_state, target). Online and target start from different seeds, as in BYOL's code."""
        images = jnp.zeros((1, *batch["views"].shape[2:]))  # [1, H, W, 3]
        online, target = (self._init_network(k, images) for k in jax.random.split(key))
        return *online, {"params": target[0], "model_state": target[1]}

    def _init_network(self, key: jax.Array, images: jax.Array) -> tuple[dict, dict]:
        variables = self.network.init(key, images, train=False)
        params = variables.pop("params")
        return params, variables

    def embed(self, params, model_state, target, batch: dict[str, jax.Array], keys: dict[str, jax.Array]):
        """Projects all views with the online and the target network.

        Args:
          batch: {"views": uint8[B, V, H, W, 3]}.
          keys: {"views": a key per example [B]}.

        Returns:
          ({"online", "target"}: float32[B, V, D] of norm 1/sqrt(tau), new model_state, new target). The target network
          runs in training mode too, with BatchNorm statistics of its own (BYOL's code; the paper does not say).
        """
        views_BxVxHxWx3 = byol.byol_views(batch["views"], keys["views"])
        params = cast_kernels(params, self.network.encoder.dtype)
        online, momentum, target_state = [], [], target["model_state"]
        for v in range(views_BxVxHxWx3.shape[1]):  # separately: BatchNorm sees one view at a time, as in BYOL's code
            z_BxD, model_state = self.project(params, model_state, views_BxVxHxWx3[:, v])
            y_BxD, target_state = self.project(target["params"], target_state, views_BxVxHxWx3[:, v])
            online.append(z_BxD)
            momentum.append(jax.lax.stop_gradient(y_BxD))
        embeddings = {"online": jnp.stack(online, axis=1), "target": jnp.stack(momentum, axis=1)}
        return embeddings, model_state, {**target, "model_state": target_state}

    def project(self, params, model_state, images_BxHxWx3: jax.Array) -> tuple[jax.Array, dict]:
        """z = g(pool(f(images))) with norm 1/sqrt(tau), in training mode; and the new BatchNorm statistics."""
        (z_BxD, _), model_state = self.network.apply(
            {"params": params, **model_state}, images_BxHxWx3, train=True, mutable=list(model_state)
        )
        return losses.unit_length(z_BxD) / self.temperature**0.5, model_state

    def loss(
        self, embeddings: dict[str, jax.Array], batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """MoCLR's loss on the global batch, and signs of collapse (of the online network's first view)."""
        loss = losses.moclr(embeddings["online"], embeddings["target"])
        return loss, losses.collapse_indicators(jax.lax.stop_gradient(embeddings["online"][:, 0]))

    def attention_masks(self, params, model_state, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
        """Masks of the online network, stage -> float32[B, h, w] summing to 1; {} with average pooling (Fig. A.1)."""
        if self.network.pool.pooling == "average":
            return {}
        _, masks = self.network.apply({"params": params, **model_state}, images_BxHxWx3, train=False)
        return masks
