"""What a method is: the contract between a method and the step, the plan and the evaluations.

A method takes examples to embeddings (`embed`) and embeddings to a loss (`loss`). `embed` holds all that has parameters
and treats rows separately, BatchNorm apart; `loss` sees the whole global batch. That cut lets a batch of any size run
on one device (train_step.micro_batched_gradients), and keeps collectives to the embeddings.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import linen as nn

from vivi_jax.models.base import CLASSIFIER, Encoder

Tree = Any  # nested dict of arrays
Batch = dict[str, jax.Array]  # leading axis = examples; uint8 pixels [B, ..., H, W, 3], int32 labels [B], ...
BatchSpec = dict[str, jax.ShapeDtypeStruct]
Keys = dict[str, jax.Array]  # array of the batch -> a random key for each of its rows
Metrics = dict[str, jax.Array]  # name -> float32 scalar
NOISE = 0x6E6F6973  # what `noise` folds into an example's key


class Network(Protocol):
    """A method's network. Its image encoder is `encoder`, also in the trees of parameters and statistics."""

    @property
    def encoder(self) -> Encoder: ...


class MethodState(NamedTuple):
    """All that a method starts from.

    Attributes:
      params: float32, trained by the optimizer.
      model_state: other collections of the network, such as BatchNorm's running statistics, {collection: {part: tree}}.
      target: {} or {"params", "model_state"} of the network whose parameters follow `params` by moving average. It has
        the parts of `params` that it needs, not always all: a predictor, say, has no average.
      loss_state: what the loss keeps from step to step over the global batch: queues, centres; or {}.
    """

    params: Tree
    model_state: Tree
    target: Tree = {}
    loss_state: Tree = {}


class Traffic(NamedTuple):
    """What a step must at least send between devices; for planning.

    Attributes:
      embeddings: numbers that each device must at least be sent of the embeddings, and of their gradients.
      batch_norm_passes: how often a step goes through each BatchNorm, forwards or backwards, in all networks.
      compute_dtype_parts: parts of `params` whose kernels have gradients in the encoder's dtype, not float32.
    """

    embeddings: int
    batch_norm_passes: int
    compute_dtype_parts: tuple[str, ...]


class Method(Protocol):
    """What vivi_jax.loop needs, of pretraining and of fine-tuning alike."""

    @property
    def network(self) -> nn.Module: ...

    def batch_spec(self, batch_size: int, data: Any) -> BatchSpec:
        """Shapes and dtypes of the global batch, from config.data. Arrays may differ in size: global and local views.

        Raises:
          ConfigError: values that do not go together.
        """
        ...

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """The state at step 0. Only the shapes of `batch` matter."""
        ...

    def embed(self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys) -> tuple[Tree, Tree, Tree]:
        """Returns (embeddings, new model_state, new target); of the target only statistics change here."""
        ...

    def loss(
        self, embeddings: Tree, batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """Returns (scalar loss, new loss_state, metrics) of the whole global batch at `step` (int32 scalar, from 0)."""
        ...


@runtime_checkable
class HasViews(Protocol):
    """A method whose examples can be shown as its network is given them; its `embed` takes them from `views`."""

    def views(self, batch: Batch, keys: Keys) -> dict[str, jax.Array]:
        """Array of pixels of the batch -> float32 [B, ..., H, W, 3], augmented; RGB in [0, 1] where the method has it.

        Args:
          batch, keys: as in Method.embed.
        """
        ...


@runtime_checkable
class HasAttention(Protocol):
    """A method whose pooling, or whose encoder, attends to places."""

    def attention_masks(self, params: Tree, model_state: Tree, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
        """Feature map -> mask float32 [B, h, w], >= 0, its sum over space 1; {} if this configuration has none.

        Args:
          images_BxHxWx3: float32 in [0, 1].
        """
        ...


@runtime_checkable
class HasTraffic(Protocol):
    """A method that `python -m vivi_jax.plan` can tell the least traffic of."""

    def traffic(self, embeddings: Tree, devices: int) -> Traffic:
        """What a step sends over `devices` devices, from the shapes of its embeddings."""
        ...


def init_network(network: nn.Module, key: jax.Array, *inputs: Any, train: bool = False) -> tuple[Tree, Tree]:
    """Random (params, model_state) of a network; only the shapes of its inputs matter."""
    variables = dict(network.init(key, *inputs, train=train))
    return variables.pop("params"), variables


def noise(keys_B: jax.Array, view: int) -> Tree:
    """The collection "noise", from which an encoder draws what it leaves out in training (models.swin), as a variable.

    Args:
      keys_B: a key per example, of which other things may be drawn too.
      view: number of the view, each of which has noise of its own.
    """
    keys_B = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, NOISE), view))(keys_B)
    return {"noise": {"encoder": {"keys": keys_B}}}


def encoder_variables(params: dict, model_state: dict) -> dict:
    """The image encoder's part of a method's parameters and statistics, ready for `encoder.apply`.

    A collection without an "encoder" is of the heads alone.
    """
    of_encoder = {name: tree["encoder"] for name, tree in model_state.items() if "encoder" in tree}
    return {"params": params["encoder"], **of_encoder}


def classified_encoder(config: dict, params: dict, model_state: dict) -> tuple[dict, dict]:
    """(config.encoder, variables) of the image encoder, with the classifier that the method put on top, if it did.

    Args:
      config: arguments of models.build_encoder. A method's part "classifier" is a linear map of the pooled features.
    """
    variables = encoder_variables(params, model_state)
    if CLASSIFIER not in params:
        return config, variables
    variables["params"] = variables["params"] | {CLASSIFIER: params[CLASSIFIER]}
    return {**config, "num_classes": params[CLASSIFIER]["bias"].size}, variables
