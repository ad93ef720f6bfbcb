"""MoCo v3's training step with a ViT in plain PyTorch: what benchmarks.gpu measures ours against. Not for training.

Same network, loss, optimizer and target as vivi_jax/methods/moco_v3.py; attention is PyTorch's fused one.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_step import TorchStep, decayed_groups

EMA_DECAY = 0.99


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Images [B, 3, H, W] -> class token [B, C]."""

    def __init__(self, *, patch: int, width: int, depth: int, heads: int, image_size: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch).requires_grad_(False)  # frozen, as in the paper
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sine_cosine(image_size // patch, width))
        self.blocks, self.norm = nn.Sequential(*(Block(width, heads) for _ in range(depth))), nn.LayerNorm(width, 1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        x = x + self.positions.to(x.dtype)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.norm(self.blocks(x)[:, 0])


def sine_cosine(side: int, width: int) -> torch.Tensor:
    """models.vit.positions: [side * side, width]."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


def head(layers: int, channels: int, hidden: int, out: int) -> nn.Sequential:
    modules = []
    for i in range(1, layers + 1):
        last = i == layers
        modules += [nn.Linear(channels, out if last else hidden, bias=False)]
        modules += [nn.BatchNorm1d(out, affine=False)] if last else [nn.BatchNorm1d(hidden), nn.ReLU()]
        channels = hidden
    return nn.Sequential(*modules)


class MocoV3Network(nn.Module):
    """f_q, and without the predictor f_k: images [B, 3, H, W] -> [B, out]."""

    def __init__(self, encoder: dict, hidden: int, out: int, predict: bool):
        super().__init__()
        self.encoder, self.projector = Vit(**encoder), head(3, encoder["width"], hidden, out)
        self.predictor = head(2, out, hidden, out) if predict else nn.Identity()  # last: the target has all before it

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.predictor(self.projector(self.encoder(images)))


class MocoV3Step(TorchStep):
    """Call: views [2, B, 3, H, W], normalised -> loss; network, momentum encoder and optimizer change in place.

    Args:
      encoder: of Vit; the others are config.method's and the optimizer's.
    """

    def __init__(
        self,
        encoder: dict,
        *,
        hidden: int,
        out: int,
        temperature: float,
        learning_rate: float,
        weight_decay: float,
        device: str = "cpu",
        bfloat16: bool = False,
    ):
        super().__init__(device, bfloat16)
        self.temperature = temperature

        self.network, self.target = (
            MocoV3Network(encoder, hidden, out, predict).to(device).train() for predict in (True, False)
        )
        self.target.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(decayed_groups(self.network, weight_decay), lr=learning_rate, fused=True)

    def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.autocast():
            with torch.no_grad():
                keys = [self.target(view) for view in views]
            queries = [self.network(view) for view in views]
        scale = self.temperature**-0.5
        return {
            name: scale * F.normalize(torch.stack(z, dim=1).float(), dim=2)
            for name, z in (("queries", queries), ("keys", keys))
        }

    def loss(self, embeddings: dict[str, torch.Tensor], views: torch.Tensor) -> torch.Tensor:
        (q1, q2), (k1, k2) = (embeddings[name].unbind(1) for name in ("queries", "keys"))
        own = torch.arange(len(q1), device=self.device)
        return 2 * self.temperature * (F.cross_entropy(q1 @ k2.T, own) + F.cross_entropy(q2 @ k1.T, own))

    def update_target(self) -> None:
        target = list(self.target.parameters())
        torch._foreach_lerp_(target, list(self.network.parameters())[: len(target)], 1 - EMA_DECAY)
