"""VDIM, Video Deep InfoMax (Hjelm & Bachman 2020, arXiv:2007.13278).

Read beside Sections 3 and 4 of the paper:

    views     G_1(x), G_2(x) ~ p(G)                    two sub-sequences of a clip, each augmented as a whole (§3.1)
    encoder   f_j = Psi(G_k(x)), j = 5, 6, 8           features of patches (local) and of the whole clip (global) (§3.2)
    phi       one residual MLP per layer, at each location i of it (§3.3)
    scores    s = phi_j(f_i,j(G_1(x))) . phi_j'(f_i',j'(G_2(x')))                                           (Eq. 1, 2)
    loss      InfoNCE for each (i, i'), summed over layer pairs: J = {5, 6, 8} with J' = {8}, and the reverse (Eq. 3, 4)

The layers are named local1 (5), local2 (6) and global (8) here; Section 4.2 calls the last one 9.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from vivi_jax import losses
from vivi_jax.augment import vdim as augment_vdim
from vivi_jax.config import Count, NonNegative, OneOf, Positive
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Traffic, Tree, init_network
from vivi_jax.models.base import Encoder, cast_kernels
from vivi_jax.models.heads import ResidualMlp

Features = dict[str, jax.Array]  # layer -> [B, locations, D]


class VdimNetwork(nn.Module):
    """Psi and the phi_j of Figure 3, left."""

    encoder: Encoder
    layers: tuple[str, ...]
    embed_dim: int

    def setup(self):
        self.phi = {
            name: ResidualMlp(self.embed_dim, norm=self.encoder.head_norm, dtype=self.encoder.dtype)
            for name in self.layers
        }

    def __call__(
        self, view1_BxTxHxWx3: jax.Array, view2_BxSxHxWx3: jax.Array, train: bool
    ) -> tuple[Features, Features]:
        """Both views to phi_j(f_j), float32 [B, locations, D] by layer.

        S is T, or 2 T for temporal differences: then view 2's features are second-half features minus first-half
        features. The paper splits "the features of the second view in half temporally", but layers 5, 6 and 8 have 7,
        5 and 1 frames: so here the frames are split, and each half is encoded.
        """
        batch, frames, *rest = view1_BxTxHxWx3.shape
        view2_BxKxTxHxWx3 = view2_BxSxHxWx3.reshape(batch, -1, frames, *rest)
        clips = jnp.concatenate([view1_BxTxHxWx3[:, None], view2_BxKxTxHxWx3], axis=1)
        # One pass for all: a smaller program than two or three, and the encoder's BatchNorm sees all views together.
        _, features = self.encoder(clips.reshape(-1, frames, *rest), train=train)

        view1, view2 = {}, {}
        for layer in self.layers:
            f = features[layer]
            f = f.reshape(batch, clips.shape[1], -1, f.shape[-1])  # [B, 1 + K, locations, C]
            second = f[:, 1] if f.shape[1] == 2 else f[:, 2] - f[:, 1]
            # phi's BatchNorm sees the views apart, as in AMDIM; differences are not distributed as features are.
            view1[layer], view2[layer] = self.phi[layer](f[:, 0], train=train), self.phi[layer](second, train=train)
        return view1, view2


class Vdim:
    """The method: how clips become features of locations, and features a loss."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        layers: tuple[str, ...],
        embed_dim: Count,
        color: Annotated[str, OneOf(augment_vdim.COLORS)],
        clip_score: Positive,
        score_penalty: NonNegative,
    ):
        if "global" not in layers:
            raise ConfigError(f"config.method.layers={tuple(layers)}: 'global' must be among them, every pair has it")
        if {*layers} - {*encoder.feature_maps()}:
            known = ", ".join(encoder.feature_maps())
            raise ConfigError(f"config.method.layers={tuple(layers)}: they are among the encoder's maps {known}")
        self.network = VdimNetwork(encoder, layers=tuple(layers), embed_dim=embed_dim)
        self.color = color
        self.clip_score = clip_score
        self.score_penalty = score_penalty

    def batch_spec(self, batch_size: int, data) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"view1": uint8[B, T, H, W, 3], "view2": [B, T or 2T, ...]}."""

        def view(frames: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, frames, data.image_size, data.image_size, 3), jnp.uint8)

        return {"view1": view(data.frames), "view2": view(data.frames * (2 if data.difference else 1))}

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """There is no target network."""
        views = (jnp.zeros((1, *batch[name].shape[1:])) for name in ("view1", "view2"))
        return MethodState(*init_network(self.network, key, *views, train=True))

    def views(self, batch: Batch, keys: Keys) -> dict[str, jax.Array]:
        """One draw of colours per view, the same for all its frames; RGB in [0, 1], or Lab (augment_clips).

        Returns:
          {"view1": float32[B, T, H, W, 3], "view2": float32[B, T or 2T, H, W, 3]}.
        """
        return {
            name: augment_vdim.augment_clips(batch[name], keys[name], color=self.color) for name in ("view1", "view2")
        }

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[dict[str, Features], Tree, Tree]:
        """Features of all locations that enter the loss.

        Args:
          batch: {"view1": uint8[B, T, H, W, 3], "view2": uint8[B, T or 2T, H, W, 3]}.
          keys: {"view1", "view2": a key per clip [B]}.

        Returns:
          ({"view1", "view2": {layer: float32[B, locations, D]}}, new model_state, target).
        """
        params = {
            name: tree if name == "encoder" else cast_kernels(tree, self.network.encoder.dtype)
            for name, tree in params.items()
        }  # phi sees the views apart
        views = self.views(batch, keys)
        (view1, view2), model_state = self.network.apply(
            {"params": params, **model_state},
            views["view1"],
            views["view2"],
            train=True,
            mutable=list(model_state),
        )
        return {"view1": view1, "view2": view2}, model_state, target

    def loss(
        self, embeddings: dict[str, Features], batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """Eq. 4 on the global batch: each layer of view 1 with the global layer of view 2, and the reverse.

        So (global, global) counts twice, as the paper's two sets do. Locations are averaged, not summed as in Eq. 4, so
        that 343 local and one global location weigh alike (AMDIM).
        """
        view1, view2 = embeddings["view1"], embeddings["view2"]
        total, metrics = jnp.float32(0), {}
        for layer in self.network.layers:
            for pair, antecedents, consequents in (
                (f"{layer}_global", view1[layer], view2["global"]),
                (f"global_{layer}", view1["global"], view2[layer]),
            ):
                nce, squared_score = losses.deep_infomax_nce(antecedents, consequents, clip_score=self.clip_score)
                total += nce + self.score_penalty * squared_score
                metrics[f"nce_{pair}"] = nce
        first_location = jax.lax.stop_gradient(view1["global"][:, 0])
        return total, loss_state, metrics | losses.collapse_indicators(first_location)

    def traffic(self, embeddings: dict[str, Features], devices: int) -> Traffic:
        """The global features of both views go to all devices, and their gradients come back."""
        sent = 2 * sum(view["global"].size for view in embeddings.values())
        return Traffic(sent, 2, ("encoder", *(f"phi_{layer}" for layer in self.network.layers)))
