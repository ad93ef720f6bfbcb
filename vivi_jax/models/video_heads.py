"""Heads on top of VIVI's shot embeddings: the prediction functions g of Figure 1 (section 3.3, sizes of section 4).

Computed in float32: their cost is negligible beside the encoder's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax.errors import ConfigError


class MLP(nn.Module):
    """Dense - ReLU - Dense."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., out]."""
        return nn.Dense(self.out, name="dense2")(nn.relu(nn.Dense(self.hidden, name="dense1")(x)))


class ShotPredictor(nn.Module):
    """Predicts shot embeddings from those before: the factors of g(ehat, e) = phi1(ehat) . phi2(e) in Eq. 2.

    K = 2: two MLPs; the second shot from the first (the paper: "one from the other"). K > 2: an LSTM reads shots 1 to
    K - 1 and predicts the one that follows each; its outputs and the embeddings are mapped linearly to one size.

    Attributes:
      hidden: units of the MLPs and of the LSTM.
      out: width of the MLPs' output.
      lstm_layers: number of stacked LSTMs.
    """

    hidden: int = 256
    out: int = 128
    lstm_layers: int = 1

    @nn.compact
    def __call__(self, shots_NxKxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shot embeddings [N, K, E] -> (predictions of the last P shots [N, P, D], all shots [N, K, D]).

        Raises:
          ConfigError: a single shot, from which nothing can be predicted.
        """
        shots = shots_NxKxE.shape[1]
        if shots < 2:
            raise ConfigError("video_loss='info_nce' needs two shots of a video or more: raise config.data.shots")
        if shots == 2:
            return (
                MLP(self.hidden, self.out, name="phi1")(shots_NxKxE[:, :1]),
                MLP(self.hidden, self.out, name="phi2")(shots_NxKxE),
            )
        x_NxPxE = shots_NxKxE[:, :-1]
        for layer in range(1, self.lstm_layers + 1):
            _, x_NxPxE = nn.RNN(nn.OptimizedLSTMCell(self.hidden), return_carry=True, name=f"lstm{layer}")(x_NxPxE)
        return (
            nn.Dense(self.hidden, use_bias=False, name="phi1")(x_NxPxE),
            nn.Dense(self.hidden, use_bias=False, name="phi2")(shots_NxKxE),
        )


class ShotOrder(nn.Module):
    """Tells whether the order of the shots was reversed, from their concatenated embeddings: an MLP."""

    hidden: int = 512

    @nn.compact
    def __call__(self, shots_NxKxE: jax.Array, reversed_N: jax.Array) -> jax.Array:
        """Shot embeddings [N, K, E], bool[N] -> logits [N, 2] of "as they are" and "reversed".

        Raises:
          ConfigError: a single shot, which has no order.
        """
        if shots_NxKxE.shape[1] < 2:
            raise ConfigError("video_loss='order' needs two shots of a video or more: raise config.data.shots")
        shots_NxKxE = jnp.where(reversed_N[:, None, None], shots_NxKxE[:, ::-1], shots_NxKxE)
        return MLP(self.hidden, 2, name="mlp")(shots_NxKxE.reshape(len(shots_NxKxE), -1))
