"""VITO's training step in plain PyTorch: what benchmarks.step measures ours against. Not for training.

Same network, loss, optimizer and target as vivi_jax/methods/vito.py with the paper's options, written the way a PyTorch
user would: channels_last, multi-tensor (foreach) updates. The photometric augmentation is left out.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_resnet import TorchResNet

TEMPERATURE, WEIGHT_DECAY, MOMENTUM, TRUST, EMA_DECAY = 0.1, 1e-6, 0.9, 1e-3, 0.99


class VitoNetwork(nn.Module):
    """ResNet-50, attention pooling of its last two stages, projector: images [B, 3, H, W] -> [B, 256]."""

    def __init__(self):
        super().__init__()
        self.encoder = TorchResNet(depth=50)
        self.encoder.fc = nn.Identity()
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 512, 1), nn.ReLU(), nn.Conv2d(512, 1, 1)) for c in (1024, 2048)
        )
        self.projector = nn.Sequential(
            nn.Linear(3072, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 256, bias=False)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        _, stages = self.encoder(images)
        pooled = []
        for attend, x in zip(self.attention, stages[2:], strict=True):
            mask = attend(x).flatten(1).softmax(dim=1)  # [B, h * w]
            pooled.append((x.flatten(2) * mask[:, None]).sum(dim=2))
        z = self.projector(torch.cat(pooled, dim=1))
        return F.normalize(z, dim=1) / TEMPERATURE**0.5


class VitoStep:
    """Call: views [V, B, 3, H, W], normalised -> loss; online and target networks and the momentum change in place."""

    def __init__(self):
        self.online, self.target = (VitoNetwork().to(memory_format=torch.channels_last).train() for _ in range(2))
        self.params = list(self.online.parameters())
        self.decayed = [i for i, p in enumerate(self.params) if p.ndim > 1]  # kernels; not biases and norms
        self.momentum = [torch.zeros_like(p) for p in self.params]

    def __call__(self, views: torch.Tensor, learning_rate: float = 0.01) -> float:
        views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        with torch.no_grad():
            keys = [self.target(v) for v in views]
        queries = [self.online(v) for v in views]
        labels = torch.arange(len(queries[0]))
        loss = sum(
            F.cross_entropy(q @ k.T, labels) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j
        )
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            self._lars([g.clone() for g in grads], learning_rate)
            torch._foreach_lerp_(list(self.target.parameters()), self.params, 1 - EMA_DECAY)
        return loss.item()

    def _lars(self, grads: list[torch.Tensor], learning_rate: float) -> None:
        params, decayed = ([tensors[i] for i in self.decayed] for tensors in (self.params, grads))
        torch._foreach_add_(decayed, params, alpha=WEIGHT_DECAY)
        norms = zip(torch._foreach_norm(params), torch._foreach_norm(decayed), strict=True)
        torch._foreach_mul_(decayed, [TRUST * w / g if w > 0 and g > 0 else torch.tensor(1.0) for w, g in norms])
        torch._foreach_mul_(self.momentum, MOMENTUM)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_add_(self.params, self.momentum, alpha=-learning_rate)
