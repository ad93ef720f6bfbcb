"""What the training steps in plain PyTorch share: float32 parameters, bfloat16 by autocast. For timing."""

from collections.abc import Iterable

import torch
from torch import nn


class TorchStep:
    """Call: what `embed` takes -> loss, a scalar tensor; networks and optimizer change in place.

    Attributes:
      network: what is trained.
      target: the network that follows it by moving average, or None.
      optimizer: of the network's parameters; anything with zero_grad() and step().
    """

    network: nn.Module
    target: nn.Module | None = None
    optimizer: torch.optim.Optimizer

    def __init__(self, device: str = "cpu", bfloat16: bool = False):
        self.device, self.bfloat16 = device, bfloat16

    def embed(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings with the names and shapes of our method's."""
        raise NotImplementedError

    def loss(self, embeddings: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def update_target(self) -> None:
        """The moving average, where there is one."""

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        loss = self.loss(self.embed(*inputs), *inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.update_target()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def compile(self, **options) -> None:
        """Compiles the networks; loss and optimizer are few, large operations anyway."""
        for network in filter(None, (self.network, self.target)):
            network.compile(dynamic=False, **options)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())


def decayed_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of torch.optim: weight decay for kernels, none for biases, norms and tokens."""
    params = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def normalised(images_NxHxWx3: torch.Tensor, mean: Iterable[float], std: Iterable[float]) -> torch.Tensor:
    """[N, H, W, 3] in [0, 1] -> [N, 3, H, W] in channels_last, as the networks take it."""
    mean, std = (torch.tensor(tuple(values), device=images_NxHxWx3.device) for values in (mean, std))
    return ((images_NxHxWx3 - mean) / std).contiguous().permute(0, 3, 1, 2)
