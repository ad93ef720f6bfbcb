"""A classifier of clips on a pretrained encoder, as a method of vivi_jax.loop: VDIM's and VITO's forms.

VDIM §4.1   clip encoder     phi_8(Psi(view k)), k = 1..K, concatenated -> AMDIM's classifier with a hidden layer
VITO        image encoder    mean over frames                           -> dropout, linear
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vivi_jax import optim
from vivi_jax.augment import vdim as augment_vdim
from vivi_jax.config import Count, Decay, NonNegative, Whole
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Tree, init_network
from vivi_jax.models.base import Encoder
from vivi_jax.models.heads import ResidualMlp
from vivi_jax.models.resnet import make_norm


class ActionNetwork(nn.Module):
    """Encoder and classifier.

    Attributes:
      encoder: of clips if phi_dim is set, else of images.
      phi_dim: width of phi_8, the head of the global layer, which VDIM transfers with the encoder (VDIM §4.1); None:
        pooled features of single frames, averaged.
      hidden: width of the classifier's hidden layer, 0: linear.
      dropout: rate, before each of the classifier's layers.
    """

    encoder: Encoder
    num_classes: int
    phi_dim: Count | None
    hidden: Whole
    dropout: Decay

    @nn.compact
    def __call__(self, clips_BxKxTxHxWx3: jax.Array, keys_B: jax.Array | None, *, train: bool) -> jax.Array:
        """Float clips as the encoder takes them -> logits float32 [B, num_classes]; keys for dropout, if training."""
        batch, views, frames, *image = clips_BxKxTxHxWx3.shape
        if self.phi_dim:
            _, layers = self.encoder(clips_BxKxTxHxWx3.reshape(-1, frames, *image), train=train)
            phi = ResidualMlp(
                self.phi_dim, norm=self.encoder.head_norm, dtype=self.encoder.dtype, name="phi_global"
            )  # its name in methods/vdim.py
            x = phi(layers["global"], train=train).mean(axis=(1, 2, 3))  # over one location, at the table's size
        else:
            pooled, _ = self.encoder(clips_BxKxTxHxWx3.reshape(-1, *image), train=train)
            x = pooled.reshape(batch * views, frames, -1).mean(axis=1)
        x = x.reshape(batch, -1)  # [B, K * C]

        if self.hidden:  # AMDIM's form
            x = nn.Dense(self.hidden, use_bias=False, name="dense1")(self.drop(x, keys_B, 1, train))
            x = nn.relu(make_norm(self.encoder.head_norm, name="norm")(x, train))
        return nn.Dense(self.num_classes, name="dense2")(self.drop(x, keys_B, 2, train))

    def drop(self, x_BxC: jax.Array, keys_B: jax.Array | None, layer: int, train: bool) -> jax.Array:
        """Dropout with a key per row, so that it does not depend on how the batch is split."""
        if not train or not self.dropout:
            return x_BxC
        keep = 1 - self.dropout
        kept_BxC = jax.vmap(lambda key, x: jax.random.bernoulli(jax.random.fold_in(key, layer), keep, x.shape))(
            keys_B, x_BxC
        )
        return jnp.where(kept_BxC, x_BxC / keep, 0)


class ActionClassifier:
    """The method (vivi_jax/methods/base.py): embeddings are logits, the loss is cross-entropy."""

    def __init__(self, network: ActionNetwork, *, color: str):
        self.network = network
        self.color = color

    def batch_spec(self, batch_size: int, data: Any) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"clips": uint8[B, K, T, H, W, 3], "label": int32[B]}."""
        clips = (batch_size, data.views, data.frames, data.image_size, data.image_size, 3)
        return {
            "clips": jax.ShapeDtypeStruct(clips, jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """Random parameters; `with_pretrained` then puts those of a checkpoint in their place."""
        clips = jnp.zeros((1, *batch["clips"].shape[1:]))
        return MethodState(*init_network(self.network, key, clips, jax.random.split(key, 1), train=True))

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, Tree, Tree]:
        """Logits float32[B, classes]. Each view of a clip has colours of its own, the same for all its frames."""
        clips, keys_B = batch["clips"], keys["clips"]
        batch_size, views = clips.shape[:2]
        color_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), views))(keys_B)  # [B, K]
        colored = augment_vdim.augment_clips(
            clips.reshape(-1, *clips.shape[2:]), color_keys.reshape(-1), color=self.color
        )
        logits, model_state = self.network.apply(
            {"params": params, **model_state},
            colored.reshape(clips.shape),
            keys_B,
            train=True,
            mutable=list(model_state),
        )
        return logits, model_state, target

    def loss(
        self, embeddings: jax.Array, batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """Cross-entropy of the logits."""
        logits_BxC = embeddings
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["label"]).mean()
        return loss, loss_state, {"train_top1": (logits_BxC.argmax(axis=-1) == batch["label"]).mean()}


@dataclasses.dataclass(frozen=True)
class ClassProbabilities:
    """The trained network as an encoder whose features are class probabilities, for
    encoders.extract_features.

    Trained on Lab of which a channel was always missing, it is shown all three such versions of a test clip and the
    probabilities are averaged: all channels together it has never seen. The paper does not say what it does.
    """

    network: ActionNetwork
    color: str

    def apply(self, variables: dict, clips_BxKxTxHxWx3: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        versions = [clips_BxKxTxHxWx3]
        if self.color == "lab":
            versions = [augment_vdim.lab_without(clips_BxKxTxHxWx3, channel) for channel in range(3)]
        first, *others = [
            jax.nn.softmax(jnp.asarray(self.network.apply(variables, clips, None, train=train))) for clips in versions
        ]
        return sum(others, start=first) / len(versions), {}


def optimizer(
    schedule: optax.Schedule,
    *,
    b1: Decay,
    b2: Decay,
    weight_decay: NonNegative,
    frozen_epochs: NonNegative,
    steps_per_epoch: float,
) -> optax.GradientTransformation:
    """Adam; for the first `frozen_epochs` the encoder's parameters do not change, nor does its Adam state.

    Its gradient is computed during these steps too, and then thrown away: one compiled step serves both phases.
    """
    frozen_steps = round(frozen_epochs * steps_per_epoch)
    if not frozen_steps:
        return optim.adam(schedule, b1=b1, b2=b2, weight_decay=weight_decay)

    def part_of(params: Tree) -> Tree:
        return {
            name: jax.tree.map(lambda _: "encoder" if name == "encoder" else "classifier", tree)  # noqa: B023
            for name, tree in params.items()
        }

    adam = optax.scale_by_adam(b1=b1, b2=b2)
    late = optax.conditionally_mask(adam, lambda step, **_: jnp.asarray(step) >= frozen_steps)
    return optax.chain(
        optax.partition({"encoder": late, "classifier": adam}, part_of),
        optax.add_decayed_weights(weight_decay, optim.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
