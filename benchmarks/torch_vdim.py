"""VDIM's encoder and training step in plain PyTorch: what benchmarks.vdim measures ours against. Not for training.

Same network, pairs of layers and loss as vivi_jax/methods/vdim.py without temporal difference, colours left out.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vivi_jax.models.vdim_encoder import TABLES, ConvRow


def over_space(c: int, d: int, k: int, stride: int, bias: bool = False) -> nn.Conv3d:
    return nn.Conv3d(c, d, (1, k, k), (1, stride, stride), bias=bias)


def over_time(c: int, k: int, stride: int, bias: bool = False) -> nn.Conv3d:
    return nn.Conv3d(c, c, (k, 1, 1), (stride, 1, 1), bias=bias)


class ConvBlock(nn.Module):
    def __init__(self, c: int, row: ConvRow):
        super().__init__()
        self.pad = row.pad
        self.space = over_space(c, row.channels, row.k_s, row.s_s, bias=True)
        self.time = over_time(row.channels, row.k_t, row.s_t, bias=True)

    def forward(self, x):
        pad = self.pad
        x = F.relu(self.space(F.pad(x, (pad, pad, pad, pad, 0, 0), mode="reflect") if pad else x))
        return F.relu(self.time(F.pad(x, (0, 0, 0, 0, pad, pad))))


class ResUnit(nn.Module):
    def __init__(self, c: int, d: int, k_s: int, s_s: int, k_t: int, s_t: int):
        super().__init__()
        self.space, self.time = over_space(c, d, k_s, s_s), over_time(d, k_t, s_t)
        self.pool = nn.AvgPool3d((k_t, k_s, k_s), (s_t, s_s, s_s))
        nn.init.zeros_(self.time.weight)

    def forward(self, x):
        y = self.time(F.relu(self.space(x)))
        return y + F.pad(self.pool(x), (0, 0, 0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


class Phi(nn.Module):
    def __init__(self, c: int, d: int):
        super().__init__()
        self.hidden, self.out = nn.Conv3d(c, d, 1, bias=False), nn.Conv3d(d, d, 1, bias=False)
        self.shortcut = nn.Conv3d(c, d, 1)
        self.norm1, self.norm2 = nn.BatchNorm3d(d), nn.BatchNorm3d(d)

    def forward(self, x):
        return self.norm2(self.out(F.relu(self.norm1(self.hidden(x)))) + self.shortcut(x))


class TorchVdim(nn.Module):
    """Clips [B, 3, T, H, W] -> {layer: phi's output [B, locations, D]}."""

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
        self.norm = nn.BatchNorm3d(c)

    def forward(self, x):
        features = {}
        for row, block in zip(self.rows, self.blocks, strict=True):
            x = block(x)
            x = self.norm(x) if row.view == "global" else x
            if row.view:
                features[row.view] = self.phi["phi_" + row.view](x).flatten(2).transpose(1, 2)
        return features


def nce(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """losses.deep_infomax_nce with its penalty."""
    raw = torch.einsum("bnd,cmd->bncm", a, c) / a.shape[-1] ** 0.5
    scores, clip = 20 * torch.tanh(raw / 20), torch.arange(len(a))
    positives = scores[clip, :, clip]  # [B, N, M]
    own = torch.eye(len(a), dtype=torch.bool)[:, None, :, None]
    negatives = scores.masked_fill(own, -torch.inf).flatten(2).logsumexp(2, keepdim=True)
    return F.softplus(negatives - positives).mean() + 0.05 * raw.square().mean()


class VdimStep:
    """Call: two views [B, 3, T, H, W], normalised -> loss; the network changes in place."""

    def __init__(self, table: str, embed_dim: int):
        self.network = TorchVdim(table, embed_dim).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-4, foreach=True)

    def __call__(self, view1: torch.Tensor, view2: torch.Tensor) -> float:
        both = self.network(torch.stack([view1, view2], 1).flatten(0, 1))
        one, two = ({name: f[v::2] for name, f in both.items()} for v in (0, 1))
        loss = sum(nce(one[name], two["global"]) + nce(one["global"], two[name]) for name in one)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
