"""VITO's training step in plain PyTorch: what benchmarks.step and benchmarks.gpu measure ours against.

Same network, loss, optimizer and target as vivi_jax/methods/vito.py with the paper's options, written the way a PyTorch
user would: channels_last, multi-tensor (foreach) updates. Colours are torch_color.py's, before the step. Not
for training.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_resnet import TorchResNet
from benchmarks.torch_step import TorchStep

TEMPERATURE, WEIGHT_DECAY, MOMENTUM, TRUST, EMA_DECAY = 0.1, 1e-6, 0.9, 1e-3, 0.99


class VitoNetwork(nn.Module):
    """ResNet, attention pooling of its last two stages, projector: images [B, 3, H, W] -> [B, 256]."""

    def __init__(self, depth: int = 50, width: float = 1):
        super().__init__()
        self.encoder = TorchResNet(depth, width)
        last = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 512, 1), nn.ReLU(), nn.Conv2d(512, 1, 1)) for c in (last // 2, last)
        )
        self.projector = nn.Sequential(
            nn.Linear(last // 2 + last, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 256, bias=False)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        _, stages = self.encoder(images)
        pooled = []
        for attend, x in zip(self.attention, stages[2:], strict=True):
            mask = attend(x).flatten(1).float().softmax(dim=1)  # [B, h * w]
            pooled.append((x.flatten(2) * mask[:, None]).sum(dim=2))
        z = self.projector(torch.cat(pooled, dim=1))
        return F.normalize(z.float(), dim=1) / TEMPERATURE**0.5


class VitoStep(TorchStep):
    """Call: views [V, B, 3, H, W], normalised -> loss; online and target networks and the momentum change in place."""

    def __init__(self, depth: int = 50, width: float = 1, *, device: str = "cpu", bfloat16: bool = False):
        super().__init__(device, bfloat16)
        self.network, self.target = (
            VitoNetwork(depth, width).to(device, memory_format=torch.channels_last).train() for _ in range(2)
        )
        self.target.requires_grad_(False)
        self.optimizer = Lars(list(self.network.parameters()), learning_rate=0.01)

    def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        with self.autocast():
            with torch.no_grad():
                keys = [self.target(v) for v in views]
            queries = [self.network(v) for v in views]
        return {"online": torch.stack(queries, dim=1), "target": torch.stack(keys, dim=1)}

    def loss(self, embeddings: dict[str, torch.Tensor], views: torch.Tensor) -> torch.Tensor:
        queries, keys = (embeddings[name].unbind(1) for name in ("online", "target"))
        own = torch.arange(len(queries[0]), device=self.device)
        return sum(F.cross_entropy(q @ k.T, own) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j)

    def update_target(self) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.network.parameters()), 1 - EMA_DECAY)


class Lars:
    """optim.lars: decay, trust ratio, momentum, learning rate; by multi-tensor updates, without waiting for a GPU."""

    def __init__(self, params: list[nn.Parameter], learning_rate: float):
        self.params, self.learning_rate = params, learning_rate
        self.decayed = [i for i, p in enumerate(params) if p.ndim > 1]  # kernels; not biases and norms
        self.momentum = [torch.zeros_like(p) for p in params]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        params, decayed = ([tensors[i] for i in self.decayed] for tensors in (self.params, grads))
        torch._foreach_add_(decayed, params, alpha=WEIGHT_DECAY)
        w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, decayed))
        torch._foreach_mul_(decayed, list(torch.where((w > 0) & (g > 0), TRUST * w / g, 1.0).unbind()))
        torch._foreach_mul_(self.momentum, MOMENTUM)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_add_(self.params, self.momentum, alpha=-self.learning_rate)
