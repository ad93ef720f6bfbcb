"""VIVI's training step in plain PyTorch, and those of plain classification: what benchmarks.gpu measures ours against.

Same network, losses and optimizer as vivi_jax/methods/vivi.py; heads and losses in float32. Not for training.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_resnet import TorchResNetV2
from benchmarks.torch_step import TorchStep, decayed_groups


class Lstm(nn.Module):
    """flax's OptimizedLSTMCell over [N, T, C] -> [N, T, hidden]; nn.LSTM has a second, redundant bias."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.of_input, self.of_state = nn.Linear(channels, 4 * hidden, bias=False), nn.Linear(hidden, 4 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = cell = x.new_zeros(len(x), self.hidden)
        states = []
        for x_t in self.of_input(x).unbind(1):
            i, f, g, o = (x_t + self.of_state(state)).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states, dim=1)


class ViviStep(TorchStep):
    """VIVI-Ex(K), K > 2. Call: frames [N * K * M, 3, H, W], normalised -> loss; the network changes in place.

    Args:
      shots, frames: K and M.
      method: config.method, of which it takes the sizes of heads and the losses' numbers.
    """

    def __init__(
        self,
        depth: int,
        width: float,
        *,
        shots: int,
        frames: int,
        method,
        learning_rate: float,
        weight_decay: float,
        device: str = "cpu",
        bfloat16: bool = False,
    ):
        super().__init__(device, bfloat16)
        self.shots, self.frames, self.method = shots, frames, method
        self.encoder = TorchResNetV2(depth, width, norm="group").to(memory_format=torch.channels_last)
        channels = self.encoder.norm.num_channels
        layers = [method.shot_dim, *[method.predictor_hidden] * method.lstm_layers]
        self.heads = nn.ModuleDict(
            {
                "exemplars": nn.Linear(channels, method.exemplar_dim),
                "shots": nn.Linear(channels, method.shot_dim),
                "lstm": nn.Sequential(*(Lstm(a, b) for a, b in zip(layers[:-1], layers[1:], strict=True))),
                "phi1": nn.Linear(layers[-1], method.predictor_hidden, bias=False),
                "phi2": nn.Linear(layers[0], method.predictor_hidden, bias=False),
            }
        )
        self.network = nn.ModuleList([self.encoder, self.heads]).to(device).train()
        self.optimizer = torch.optim.SGD(
            decayed_groups(self.network, weight_decay), lr=learning_rate, momentum=0.9, fused=True
        )

    def compile(self, **options) -> None:
        self.encoder.compile(dynamic=False, **options)

    def embed(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.autocast():
            features, _ = self.encoder(frames)
        f_NxKxMxC = features.float().unflatten(0, (-1, self.shots, self.frames))
        pooled_NxKxC = f_NxKxMxC.mean(dim=2)
        e_NxKxE = self.heads["shots"](pooled_NxKxC)
        return {
            "exemplars": self.heads["exemplars"](f_NxKxMxC),
            "pooled": pooled_NxKxC[:, 0],
            "predicted": self.heads["phi1"](self.heads["lstm"](e_NxKxE[:, :-1])),
            "shots": self.heads["phi2"](e_NxKxE),
        }

    def loss(self, embeddings: dict[str, torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
        triplets = semi_hard_triplet(
            embeddings["exemplars"].flatten(0, 1), margin=self.method.triplet_margin, groups=self.method.triplet_groups
        )
        return triplets + self.method.lambda_video * shot_info_nce(embeddings["predicted"], embeddings["shots"])


class ClassifierStep(TorchStep):
    """A ResNet v2 with a linear classifier. Call: images [B, 3, H, W], normalised, labels int64[B] -> loss."""

    def __init__(
        self,
        depth: int,
        width: float,
        *,
        norm: str,
        num_classes: int,
        learning_rate: float,
        weight_decay: float,
        device: str = "cpu",
        bfloat16: bool = False,
    ):
        super().__init__(device, bfloat16)
        self.network = TorchResNetV2(depth, width, norm, num_classes)
        self.network = self.network.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            decayed_groups(self.network, weight_decay), lr=learning_rate, momentum=0.9, fused=True
        )

    def embed(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.autocast():
            _, logits = self.network(images)
        return {"class_logits": logits.float()}

    def loss(self, embeddings: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(embeddings["class_logits"], labels)


def semi_hard_triplet(exemplars_SxMxD: torch.Tensor, *, margin: float, groups: int) -> torch.Tensor:
    """losses.semi_hard_triplet."""
    shots, exemplars, _ = exemplars_SxMxD.shape
    z_GxAxD = F.normalize(exemplars_SxMxD.flatten(0, 1), dim=1).unflatten(0, (groups, -1))
    distance_GxAxA = 2 - 2 * z_GxAxD @ z_GxAxD.mT
    anchors = z_GxAxD.shape[1]
    shot_A = torch.arange(anchors, device=z_GxAxD.device) // exemplars
    negative_AxA = shot_A[:, None] != shot_A[None]
    own_AxM = shot_A[:, None] * exemplars + torch.arange(exemplars, device=z_GxAxD.device)
    positive_GxAxM = distance_GxAxA.gather(2, own_AxM.expand(groups, -1, -1))
    with torch.no_grad():
        farthest_GxA = distance_GxAxA.masked_fill(~negative_AxA, -torch.inf).argmax(dim=2)
        mined = []
        for positive_GxA in positive_GxAxM.unbind(2):
            semi_hard_GxAxA = negative_AxA & (distance_GxAxA > positive_GxA[..., None])
            nearest_GxA = distance_GxAxA.masked_fill(~semi_hard_GxAxA, torch.inf).argmin(dim=2)
            mined.append(torch.where(semi_hard_GxAxA.any(dim=2), nearest_GxA, farthest_GxA))
    hinge_GxAxM = F.relu(margin + positive_GxAxM - distance_GxAxA.gather(2, torch.stack(mined, dim=2)))
    is_pair_AxM = ~torch.eye(exemplars, dtype=torch.bool, device=z_GxAxD.device).repeat(shots // groups, 1)
    return (hinge_GxAxM * is_pair_AxM).sum() / (shots * exemplars * (exemplars - 1))


def shot_info_nce(predicted_NxPxD: torch.Tensor, shots_NxKxD: torch.Tensor) -> torch.Tensor:
    """losses.shot_info_nce."""
    (videos, predictions, _), shots = predicted_NxPxD.shape, shots_NxKxD.shape[1]
    logits_RxC = predicted_NxPxD.flatten(0, 1) @ shots_NxKxD.flatten(0, 1).T
    row_R = torch.arange(videos * predictions, device=logits_RxC.device)
    own_R = row_R // predictions * shots + shots - predictions + row_R % predictions
    column_C = torch.arange(videos * shots, device=logits_RxC.device)
    left_out_RxC = (column_C[None] // shots == row_R[:, None] // predictions) & (column_C[None] != own_R[:, None])
    return F.cross_entropy(logits_RxC.masked_fill(left_out_RxC, -torch.inf), own_R)
