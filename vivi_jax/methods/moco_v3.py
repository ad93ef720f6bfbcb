"""MoCo v3 (Chen, Xie & He 2021, arXiv:2104.02057): contrast of two views, with a predictor and a momentum encoder.

Read beside Algorithm 1 of the paper:

    views      x1, x2 = aug(x), aug(x)             two crops of an image, or two frames of a clip; BYOL's augmentation
    queries    q1, q2 = f_q(x1), f_q(x2)           encoder, projection head, prediction head
    keys       k1, k2 = f_k(x1), f_k(x2)           momentum encoder: encoder and projection head, no gradient
    loss       ctr(q1, k2) + ctr(q2, k1)           ctr(q, k) = 2 tau InfoNCE(q . k / tau), q and k of unit length
    f_k        m f_k + (1 - m) f_q                 m from 0.99 to 1 along a cosine (config.ema); f_k starts as f_q

The authors' code averages before it computes the keys of a step, the step here after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax import losses
from vivi_jax.augment import byol
from vivi_jax.config import Count, Positive
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import (
    Batch,
    BatchSpec,
    Keys,
    MethodState,
    Metrics,
    Traffic,
    Tree,
    encoder_variables,
    init_network,
)
from vivi_jax.models.base import Encoder, cast_kernels

MOMENTUM_PARTS = ("encoder", "projector")  # the predictor is the online network's alone


class Head(nn.Module):
    """An MLP without biases: BatchNorm and ReLU in between, BatchNorm without scale and bias at the end."""

    layers: int
    hidden: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, C] -> float32 [B, out]."""
        for i in range(1, self.layers + 1):
            last = i == self.layers
            x = nn.Dense(self.out if last else self.hidden, use_bias=False, dtype=self.dtype, name=f"dense{i}")(x)
            norm = nn.BatchNorm(
                not train, momentum=0.9, dtype=jnp.float32, use_scale=not last, use_bias=not last, name=f"norm{i}"
            )
            x = norm(x)
            x = x if last else nn.relu(x).astype(self.dtype)
        return x


class MocoV3Network(nn.Module):
    """f_q, and without the predictor f_k."""

    encoder: Encoder
    projector: Head
    predictor: Head

    def __call__(self, images_BxHxWx3: jax.Array, train: bool, predict: bool = True) -> jax.Array:
        pooled_BxC, _ = self.encoder(images_BxHxWx3, train=train)
        z_BxD = self.projector(pooled_BxC, train)
        return self.predictor(z_BxD, train) if predict else z_BxD


class MocoV3:
    """The method: how examples become embeddings, and embeddings a loss."""

    def __init__(self, encoder: Encoder, *, hidden: Count, out: Count, temperature: Positive):
        self.network = MocoV3Network(encoder, Head(3, hidden, out, encoder.dtype), Head(2, hidden, out, encoder.dtype))
        self.online_network = self.network.clone(encoder=encoder.on_cast_kernels())  # of `embed`'s cast parameters
        self.temperature = temperature

    def batch_spec(self, batch_size: int, data) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"views": uint8[B, 2, H, W, 3]}."""
        if data.views != 2:
            raise ConfigError(f"config.data.views={data.views}: MoCo v3 has 2")
        return {"views": jax.ShapeDtypeStruct((batch_size, 2, data.image_size, data.image_size, 3), jnp.uint8)}

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """The momentum encoder starts as a copy of the online one; in arrays of its own, as both are donated."""
        images = jnp.zeros((1, *batch["views"].shape[2:]))
        (params, model_state), (copy, copied_state) = (init_network(self.network, key, images) for _ in range(2))
        return MethodState(
            params,
            model_state,
            {
                "params": {part: copy[part] for part in MOMENTUM_PARTS},
                "model_state": momentum_collections(copied_state),
            },
        )

    def views(self, batch: Batch, keys: Keys) -> dict[str, jax.Array]:
        """BYOL's augmentation: {"views": float32[B, 2, H, W, 3] in [0, 1]}."""
        return {"views": byol.byol_views(batch["views"], keys["views"])}

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[dict[str, jax.Array], Tree, Tree]:
        """Returns ({"queries", "keys"}: float32[B, 2, D] of norm 1/sqrt(tau), new model_state, new target)."""
        views_Bx2xHxWx3 = self.views(batch, keys)["views"]
        encoder = self.network.encoder
        params = cast_kernels(params, encoder.dtype) | {"encoder": encoder.cast_kernels(params["encoder"])}
        queries, keys_of_views, target_state = [], [], target["model_state"]
        for v in range(2):  # separately: the heads' BatchNorm sees one view at a time
            view_BxHxWx3 = views_Bx2xHxWx3[:, v]
            q_BxD, model_state = self.online_network.apply(
                {"params": params, **model_state}, view_BxHxWx3, train=True, mutable=list(model_state)
            )
            k_BxD, target_state = self.network.apply(
                {"params": target["params"], **target_state},
                view_BxHxWx3,
                train=True,
                predict=False,
                mutable=list(target_state),
            )
            queries.append(q_BxD)
            keys_of_views.append(jax.lax.stop_gradient(k_BxD))
        scale = self.temperature**-0.5
        embeddings = {
            "queries": scale * losses.unit_length(jnp.stack(queries, axis=1)),
            "keys": scale * losses.unit_length(jnp.stack(keys_of_views, axis=1)),
        }
        return embeddings, model_state, {**target, "model_state": target_state}

    def loss(
        self, embeddings: dict[str, jax.Array], batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """The symmetric loss on the global batch, and signs of collapse (of the first view's queries)."""
        q, k = embeddings["queries"], embeddings["keys"]
        contrast = losses.info_nce(q[:, 0], k[:, 1]) + losses.info_nce(q[:, 1], k[:, 0])
        return (
            2 * self.temperature * contrast,
            loss_state,
            losses.collapse_indicators(jax.lax.stop_gradient(q[:, 0])),
        )

    def attention_masks(self, params: Tree, model_state: Tree, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
        """What the class token of a ViT attends to in its last block, float32[B, h, w]; {} for other encoders."""
        encoder = self.network.encoder
        intermediates: Any
        _, intermediates = encoder.apply(encoder_variables(params, model_state), images_BxHxWx3, train=False)
        last = encoder.feature_maps()[0]
        return {last: intermediates["attention"]} if "attention" in intermediates else {}

    def traffic(self, embeddings: dict[str, jax.Array], devices: int) -> Traffic:
        """The keys go to all devices; no gradient comes back. Two views forwards twice, and backwards once."""
        return Traffic(embeddings["keys"].size, 6, ("encoder", "projector", "predictor"))


def momentum_collections(model_state: Tree) -> Tree:
    """The collections of the parts that the momentum encoder has."""
    return {name: {part: tree[part] for part in MOMENTUM_PARTS if part in tree} for name, tree in model_state.items()}
