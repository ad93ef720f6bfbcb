"""VDIM's encoder and training step in plain PyTorch: what benchmarks.vdim and benchmarks.gpu measure ours against.

Same network, pairs of layers and loss as vivi_jax/methods/vdim.py without temporal difference. Not for training. Clips
are [B, T, H, W, C] in memory throughout, so that a convolution in space and one in time are both 2-D convolutions of
views of it in channels_last, without a copy.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_step import TorchStep
from vivi_jax.models.vdim_encoder import TABLES, ConvRow


def over_space(operation, x: torch.Tensor) -> torch.Tensor:
    """A function of images [N, C, H, W] on all frames of [B, T, H, W, C]."""
    y = operation(x.flatten(0, 1).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def over_time(operation, x: torch.Tensor) -> torch.Tensor:
    """A function of [N, C, T, 1 or more] on [B, T, H, W, C]."""
    y = operation(x.flatten(2, 3).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])


class ConvBlock(nn.Module):
    def __init__(self, c: int, row: ConvRow):
        super().__init__()
        self.pad = row.pad
        self.space = nn.Conv2d(c, row.channels, row.k_s, row.s_s)
        self.time = nn.Conv2d(row.channels, row.channels, (row.k_t, 1), (row.s_t, 1), padding=(row.pad, 0))

    def forward(self, x):
        pad = self.pad
        x = over_space(lambda y: self.space(F.pad(y, (pad,) * 4, mode="reflect") if pad else y), x)
        return F.relu(over_time(self.time, F.relu(x)))


class ResUnit(nn.Module):
    def __init__(self, c: int, d: int, k_s: int, s_s: int, k_t: int, s_t: int):
        super().__init__()
        self.space = nn.Conv2d(c, d, k_s, s_s, bias=False)
        self.time = nn.Conv2d(d, d, (k_t, 1), (s_t, 1), bias=False)
        self.pool_space = nn.AvgPool2d(k_s, s_s) if k_s > 1 else nn.Identity()
        self.pool_time = nn.AvgPool2d((k_t, 1), (s_t, 1)) if k_t > 1 else nn.Identity()
        nn.init.zeros_(self.time.weight)

    def forward(self, x):
        y = over_time(self.time, F.relu(over_space(self.space, x)))
        x = over_time(self.pool_time, over_space(self.pool_space, x))
        return y + F.pad(x, (0, y.shape[-1] - x.shape[-1]))


class Phi(nn.Module):
    """[N, C] -> [N, D]: N are places of all clips."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(c, d, bias=False), nn.Linear(d, d, bias=False)
        self.shortcut = nn.Linear(c, d)
        self.norm1, self.norm2 = nn.BatchNorm1d(d), nn.BatchNorm1d(d)

    def forward(self, x):
        return self.norm2(self.out(F.relu(self.norm1(self.hidden(x)))) + self.shortcut(x))


class TorchVdim(nn.Module):
    """Two views [B, T, H, W, 3] -> of each {layer: phi's output [B, locations, D]}."""

    def __init__(self, table: str, embed_dim: int):
        super().__init__()
        self.rows, self.blocks, self.phi, c = TABLES[table], nn.ModuleList(), nn.ModuleDict(), 3
        for row in self.rows:
            if isinstance(row, ConvRow):
                self.blocks.append(ConvBlock(c, row))
            else:
                first = ResUnit(c, row.channels, row.k_s, row.s_s, row.k_t, row.s_t)
                rest = [ResUnit(row.channels, row.channels, 1, 1, 1, 1) for _ in range(row.n)]
                self.blocks.append(nn.Sequential(first, *rest))
            c = row.channels
            if row.view:
                self.phi["phi_" + row.view] = Phi(c, embed_dim)
        self.norm = nn.BatchNorm1d(c)

    def forward(self, view1, view2):
        x, batch = torch.cat([view1, view2]), len(view1)
        views = {}, {}
        for row, block in zip(self.rows, self.blocks, strict=True):
            x = block(x)
            if row.view == "global":
                x = self.norm(x.flatten(0, 3)).unflatten(0, x.shape[:4])
            if row.view:
                phi = self.phi["phi_" + row.view]
                for features, half in zip(views, x.split(batch), strict=True):  # apart, for BatchNorm
                    features[row.view] = phi(half.flatten(0, 3)).float().unflatten(0, (batch, -1))
        return views


def nce(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """losses.deep_infomax_nce with its penalty."""
    raw = torch.einsum("bnd,cmd->bncm", a, c) / a.shape[-1] ** 0.5
    scores, clip = 20 * torch.tanh(raw / 20), torch.arange(len(a), device=a.device)
    positives = scores[clip, :, clip]  # [B, N, M]
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)[:, None, :, None]
    negatives = scores.masked_fill(own, -torch.inf).flatten(2).logsumexp(2, keepdim=True)
    return F.softplus(negatives - positives).mean() + 0.05 * raw.square().mean()


class VdimStep(TorchStep):
    """Call: two views [B, 3, T, H, W], normalised -> loss; the network changes in place."""

    def __init__(self, table: str, embed_dim: int, *, device: str = "cpu", bfloat16: bool = False):
        super().__init__(device, bfloat16)
        self.network = TorchVdim(table, embed_dim).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-4, fused=True)

    def embed(self, view1: torch.Tensor, view2: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        with self.autocast():
            one, two = self.network(*(view.permute(0, 2, 3, 4, 1) for view in (view1, view2)))
        return {"view1": one, "view2": two}

    def loss(self, embeddings: dict, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        one, two = embeddings["view1"], embeddings["view2"]
        return sum(nce(one[name], two["global"]) + nce(one["global"], two[name]) for name in one)
