"""Swin transformers in plain PyTorch, with torchvision's names of modules: the reference of the parity tests.

Written window by window and without masks: a window is cut out of the shifted map in the up to nine parts that are
neighbours in the image, and each part attends to itself. So it shares neither code nor method with the encoder.
"""

import torch
from torch import nn
from torch.nn import functional as F


class TorchSwin(nn.Module):
    """Call: normalised images float32 [B, 3, H, W] -> (logits, pooled [B, C], [map [B, h, w, c] of each stage])."""

    def __init__(self, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, patch=4, num_classes=1000):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, width, patch, patch), ToChannelsLast(), nn.LayerNorm(width))
        ]
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if i:
                layers.append(Merge(width * 2 ** (i - 1)))
            blocks = [Block(width * 2**i, count, window, window // 2 if j % 2 else 0) for j in range(depth)]
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(8 * width)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images):
        x, maps = images, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                maps.append(x)
        maps[-1] = self.norm(x)
        pooled = maps[-1].mean(dim=(1, 2))
        return self.head(pooled), pooled, maps


class ToChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # down first, then right
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class Block(nn.Module):
    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = Attention(channels, heads, window, shift)
        hidden = nn.Linear(channels, 4 * channels)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.arange(window**2)
        rows, columns = place // window, place % window
        index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
        self.register_buffer("relative_position_index", index.flatten())

    def forward(self, x):
        _, height, width, _ = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        out = torch.zeros_like(x)
        for top, bottom in self.spans(x.shape[1]):
            for left, right in self.spans(x.shape[2]):
                out[:, top:bottom, left:right] = self.attend(x[:, top:bottom, left:right], top, left, x.shape)
        return out[:, :height, :width]

    def spans(self, length):
        """[start, end) of the parts of windows along an axis: the first and last are cut where windows are shifted."""
        shift = self.shift if length > self.window else 0
        edges = sorted({0, length, *range(shift, length, self.window)})
        return list(zip(edges, edges[1:], strict=False))

    def attend(self, part, top, left, shape):
        batch, height, width, channels = part.shape
        q, k, v = self.qkv(part).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        row = torch.arange(height).repeat_interleave(width)
        column = torch.arange(width).repeat(height)
        span = 2 * self.window - 1
        offset = (row[:, None] - row + self.window - 1) * span + column[:, None] - column + self.window - 1
        bias = self.relative_position_bias_table[offset].permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) / (channels // self.heads) ** 0.5 + bias).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, height, width, channels))
