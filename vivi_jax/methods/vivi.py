"""VIVI (Tschannen et al. 2020, arXiv:1912.02783): losses on frames, shots and videos, and on labelled images beside.

Read beside Section 3 of the paper (x^i_k,l: frame l of shot k of video i, augmented):

    frames     f(x^i_k,l)                                 the encoder
    shots      e^i_k = p(f(x^i_k,1), ..., f(x^i_k,L))     p: mean over frames, then a linear map
    L_S        frame_loss "rotation": which of four rotations each frame was given (§3.2, approach i)
               shot_loss "triplet": frames of a shot close, all others far (§3.2, approach ii; the exemplar models)
    L_V        video_loss "info_nce": predict shots from those before (Eq. 2); "order": are they reversed? (§3.3)
    L_SSL      L_S + lambda L_V
    total      L_SSL + gamma L_SUP                        L_SUP: cross-entropy of a linear classifier on f(image)

Sums over examples are means here. With lambda = 0 no critic is trained: video_loss "none". Images instead of videos are
shots of one frame cut several times; without videos the method is plain supervised training.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax import losses
from vivi_jax.augment import vivi as augment_vivi
from vivi_jax.config import Chance, Count, NonNegative, OneOf
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Traffic, Tree, init_network
from vivi_jax.models.base import Encoder
from vivi_jax.models.video_heads import ShotOrder, ShotPredictor

OPTIONS = {
    "frame_loss": ("none", "rotation"),
    "shot_loss": ("none", "triplet", "batch_hard"),
    "video_loss": ("none", "info_nce", "order"),
}


class ViviNetwork(nn.Module):
    """f, p and g of the paper's Figure 1, and what the losses need on top of f. Heads no loss asks for do not exist."""

    encoder: Encoder
    frame_loss: str
    shot_loss: str
    video_loss: str
    exemplar_dim: int
    shot_dim: int
    predictor_hidden: int
    predictor_out: int
    lstm_layers: int
    order_hidden: int
    num_classes: int

    def setup(self):
        self.rotation_head = nn.Dense(4)
        self.exemplar_head = nn.Dense(self.exemplar_dim)
        self.shot_head = nn.Dense(self.shot_dim)
        self.predictor = ShotPredictor(self.predictor_hidden, self.predictor_out, self.lstm_layers)
        self.order = ShotOrder(self.order_hidden)
        self.classifier = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)  # zeros: BiT's code

    def __call__(
        self,
        frames_NxKxMxHxWx3: jax.Array | None,
        reversed_N: jax.Array | None,
        images_BxHxWx3: jax.Array | None,
        *,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Either stream may be None. Returns the embeddings that Vivi.loss takes."""
        embeddings = {}
        if frames_NxKxMxHxWx3 is not None and reversed_N is not None:
            embeddings |= self.videos(frames_NxKxMxHxWx3, reversed_N, train)
        if images_BxHxWx3 is not None:  # apart from the frames: BatchNorm must not mix the two (paper §4)
            features_BxC, _ = self.encoder(images_BxHxWx3, train=train)
            embeddings["class_logits"] = self.classifier(features_BxC)
        return embeddings

    def videos(self, frames_NxKxMxHxWx3: jax.Array, reversed_N: jax.Array, train: bool) -> dict[str, jax.Array]:
        embeddings = {}
        x_NxKxMxRxHxWx3 = frames_NxKxMxHxWx3[:, :, :, None]
        if self.frame_loss == "rotation":
            x_NxKxMxRxHxWx3 = rotations(frames_NxKxMxHxWx3)
        features, _ = self.encoder(x_NxKxMxRxHxWx3.reshape(-1, *x_NxKxMxRxHxWx3.shape[4:]), train=train)
        f_NxKxMxRxC = features.reshape(*x_NxKxMxRxHxWx3.shape[:4], -1)
        if self.frame_loss == "rotation":
            embeddings["rotation_logits"] = self.rotation_head(f_NxKxMxRxC)

        f_NxKxMxC = f_NxKxMxRxC[:, :, :, 0]  # upright frames only from here on; the paper does not say
        if self.shot_loss != "none":
            embeddings["exemplars"] = self.exemplar_head(f_NxKxMxC)

        pooled_NxKxC = f_NxKxMxC.mean(axis=2)
        embeddings["pooled"] = pooled_NxKxC[:, 0]  # the first shot's, for the signs of collapse
        if self.video_loss == "info_nce":
            embeddings["predicted"], embeddings["shots"] = self.predictor(self.shot_head(pooled_NxKxC))
        elif self.video_loss == "order":
            embeddings["order_logits"] = self.order(self.shot_head(pooled_NxKxC), reversed_N)
            embeddings["reversed"] = reversed_N.astype(jnp.float32)  # not bool: gradients pass through all embeddings
        return embeddings


class Vivi:
    """The method: how examples become embeddings, and embeddings a loss."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        frame_loss: str,
        shot_loss: str,
        video_loss: str,
        triplet_margin: NonNegative,
        triplet_groups: Count,
        lambda_video: NonNegative,
        gamma: NonNegative,
        exemplar_dim: Count,
        shot_dim: Count,
        predictor_hidden: Count,
        predictor_out: Count,
        lstm_layers: Count,
        order_hidden: Count,
        num_classes: Count,
        color: Annotated[str, OneOf(augment_vivi.COLORS)],
        labelled_color: Annotated[str, OneOf(augment_vivi.COLORS)],
        hsv: bool,
        grey_prob: Chance,
        standardize: bool,
    ):
        for option, value in (("frame_loss", frame_loss), ("shot_loss", shot_loss), ("video_loss", video_loss)):
            lookup(f"config.method.{option}", value, dict.fromkeys(OPTIONS[option]))
        self.network = ViviNetwork(
            encoder,
            frame_loss,
            shot_loss,
            video_loss,
            exemplar_dim,
            shot_dim,
            predictor_hidden,
            predictor_out,
            lstm_layers,
            order_hidden,
            num_classes,
        )
        self.train_network = self.network.clone(encoder=encoder.on_cast_kernels())  # of `embed`'s cast parameters
        self.triplet_margin, self.triplet_groups = triplet_margin, triplet_groups
        self.lambda_video, self.gamma = lambda_video, gamma
        self.frame_augmentation = dict(color=color, hsv=hsv, grey_prob=grey_prob)
        self.image_augmentation = dict(color=labelled_color, hsv=hsv, grey_prob=0.0)
        self.standardize = standardize

    def batch_spec(self, batch_size: int, data) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"shots": uint8[N, K, M, H, W, 3]} if there are videos (or
        images without labels), {"image": uint8[B, H, W, 3], "label": int32[B]} if there are labelled images.

        Raises:
          ConfigError: losses without their data, or data without a loss.
        """
        net, image = self.network, (data.image_size, data.image_size, 3)
        if (data.unlabelled != "none") != ((net.frame_loss, net.shot_loss, net.video_loss) != ("none",) * 3):
            raise ConfigError(
                f"config.data.unlabelled={data.unlabelled!r} does not go with config.method's frame_loss="
                f"{net.frame_loss!r}, shot_loss={net.shot_loss!r} and video_loss={net.video_loss!r}"
            )
        spec = {}
        if data.unlabelled != "none":
            spec["shots"] = jax.ShapeDtypeStruct((batch_size, data.shots, data.frames, *image), jnp.uint8)
        if data.labelled_batch_size:
            spec["image"] = jax.ShapeDtypeStruct((data.labelled_batch_size, *image), jnp.uint8)
            spec["label"] = jax.ShapeDtypeStruct((data.labelled_batch_size,), jnp.int32)
        if not spec:
            raise ConfigError("nothing to train on: set config.data.unlabelled or config.data.labelled_batch_size")
        return spec

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """There is no target network."""
        frames = jnp.zeros((1, *batch["shots"].shape[1:])) if "shots" in batch else None
        images = jnp.zeros((1, *batch["image"].shape[1:])) if "image" in batch else None
        return MethodState(*init_network(self.network, key, frames, jnp.zeros(1, bool), images))

    def views(self, batch: Batch, keys: Keys) -> dict[str, jax.Array]:
        """Each frame and each labelled image with a draw of colours of its own; upright, the network turns them.

        Returns:
          {"shots": float32[N, K, M, H, W, 3], "image": float32[B, H, W, 3]}, those that are in the batch; in [0, 1],
          or with `standardize` frames of mean 0 and deviation 1 in the encoder's units.
        """
        views = {}
        if "shots" in batch:
            augment_keys, _ = augment_and_order_keys(keys["shots"])
            views["shots"] = augment(batch["shots"], augment_keys, **self.frame_augmentation)
            if self.standardize:
                views["shots"] = augment_vivi.standardized(views["shots"], self.network.encoder)
        if "image" in batch:
            views["image"] = augment(batch["image"], keys["image"], **self.image_augmentation)
        return views

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[dict[str, jax.Array], Tree, Tree]:
        """Augments, reverses the order of the shots of every other video or so, and applies the network.

        Args:
          batch: what batch_spec says; `keys` has a key per video and per image.

        Returns:
          (embeddings, new model_state, {}), the embeddings being those of these losses and streams that are in use:
          rotation_logits [N, K, M, 4, 4], exemplars [N, K, M, D], pooled [N, C], predicted [N, P, D], shots [N, K, D],
          order_logits [N, 2], reversed [N] (1.0: they were), class_logits [B, classes]; all float32.
        """
        views, reversed_N = self.views(batch, keys), None
        if "shots" in batch:
            _, order_keys = augment_and_order_keys(keys["shots"])
            reversed_N = jax.vmap(jax.random.bernoulli)(order_keys)
        encoder = self.network.encoder.cast_kernels(params["encoder"])  # once, for both streams
        embeddings, model_state = self.train_network.apply(
            {"params": params | {"encoder": encoder}, **model_state},
            views.get("shots"),
            reversed_N,
            views.get("image"),
            train=True,
            mutable=list(model_state),
        )
        return embeddings, model_state, target

    def loss(
        self, embeddings: dict[str, jax.Array], batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """L_S + lambda L_V + gamma L_SUP on the global batch, each of them, and accuracies of the pretext tasks."""
        total, metrics = jnp.float32(0), {}

        def add(name: str, weight: float, loss_and_metrics: tuple[jax.Array, dict[str, jax.Array]]) -> None:
            nonlocal total
            loss, details = loss_and_metrics
            total += weight * loss
            metrics.update({name: loss, **details})

        if "rotation_logits" in embeddings:
            logits = embeddings["rotation_logits"]
            add(
                "frame_loss",
                1.0,
                losses.cross_entropy(logits, jnp.broadcast_to(jnp.arange(4), logits.shape[:-1]), "rotation"),
            )
        if "exemplars" in embeddings:
            add("shot_loss", 1.0, self.shot_loss(embeddings["exemplars"]))
        if "predicted" in embeddings:
            add("video_loss", self.lambda_video, losses.shot_info_nce(embeddings["predicted"], embeddings["shots"]))
        if "order_logits" in embeddings:
            add(
                "video_loss",
                self.lambda_video,
                losses.cross_entropy(embeddings["order_logits"], embeddings["reversed"].astype(jnp.int32), "order"),
            )
        if "class_logits" in embeddings:
            add("labelled_loss", self.gamma, losses.cross_entropy(embeddings["class_logits"], batch["label"], "class"))
        if "pooled" in embeddings:
            metrics |= losses.collapse_indicators(jax.lax.stop_gradient(embeddings["pooled"]))
        return total, loss_state, metrics

    def shot_loss(self, exemplars_NxKxMxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of all shots of the batch; the other shots of a video are negatives like any (paper §3.2)."""
        exemplars_SxMxD = exemplars_NxKxMxD.reshape(-1, *exemplars_NxKxMxD.shape[2:])
        if self.network.shot_loss == "batch_hard":
            return losses.batch_hard_triplet(exemplars_SxMxD, groups=self.triplet_groups)
        return losses.semi_hard_triplet(exemplars_SxMxD, margin=self.triplet_margin, groups=self.triplet_groups)

    def traffic(self, embeddings: dict[str, jax.Array], devices: int) -> Traffic:
        """Of two factors of a matrix of scores the smaller goes to all devices, and its gradient comes back."""
        sent = 0
        if "predicted" in embeddings:
            sent += 2 * min(embeddings["predicted"].size, embeddings["shots"].size)
        if "exemplars" in embeddings and self.triplet_groups % devices:  # else each group is mined on one device
            sent += 2 * embeddings["exemplars"].size
        streams = ("pooled" in embeddings) + ("class_logits" in embeddings)
        return Traffic(sent, 2 * streams, ("encoder",))


def augment_and_order_keys(keys_N: jax.Array) -> tuple[jax.Array, ...]:
    """Of a video's key one for its colours, and one for whether its shots are reversed."""
    return jnp.unstack(jax.vmap(jax.random.split)(keys_N), axis=1)


def augment(images: jax.Array, keys_N: jax.Array, **options) -> jax.Array:
    """uint8[N, ..., H, W, 3] -> float32 in [0, 1], each image in its own way, from a key per example."""
    per_example = images[0, ..., 0, 0, 0].size
    keys = jax.vmap(lambda key: jax.random.split(key, per_example))(keys_N).reshape(-1)
    return augment_vivi.augment(images.reshape(-1, *images.shape[-3:]), keys, **options).reshape(images.shape)


def rotations(images: jax.Array) -> jax.Array:
    """[..., H, W, 3] -> [..., 4, H, W, 3]: turned by 0, 90, 180 and 270 degrees."""
    return jnp.stack([jnp.rot90(images, turns, axes=(-3, -2)) for turns in range(4)], axis=-4)
