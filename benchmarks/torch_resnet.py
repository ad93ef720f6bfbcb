"""ResNets in plain PyTorch: references of the parity tests, and the encoders of the steps that ours are timed against.

`TorchResNet` is v1.5 with torchvision's names of modules, `TorchResNetV2` is v2 with timm's, so that neither package is
needed: `state_dict` has their names, shapes and count of entries.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = {  # depth -> (blocks per stage, bottleneck?)
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class TorchResNet(nn.Module):
    """Call: images float32 [B, 3, H, W], already normalised -> (pooled [B, C], [four feature maps [B, c, h, w]])."""

    def __init__(self, depth: int = 50, width: float = 1, num_classes: int = 1000):
        super().__init__()
        stage_blocks, bottleneck = DEPTHS[depth]
        channels = round(64 * width)
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels_in = channels
        for stage, num_blocks in enumerate(stage_blocks, 1):
            blocks = []
            for j in range(num_blocks):
                stride = 2 if stage > 1 and j == 0 else 1
                blocks.append(Block(channels_in, channels * 2 ** (stage - 1), stride, bottleneck))
                channels_in = blocks[-1].channels_out
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels_in, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            stages.append(x)
        return x.mean(dim=(2, 3)), stages


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 (with the stride), 1x1 with four times the channels."""

    def __init__(self, channels_in: int, channels: int, stride: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        self.channels_out = 4 * channels if bottleneck else channels
        sizes = (1, 3, 1) if bottleneck else (3, 3)
        widths = (channels_in, channels, channels) + ((self.channels_out,) if bottleneck else ())
        for i, size in enumerate(sizes, 1):
            step = stride if i == (2 if bottleneck else 1) else 1
            setattr(self, f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], size, step, size // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.downsample = None
        if stride != 1 or channels_in != self.channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, self.channels_out, 1, stride, bias=False), nn.BatchNorm2d(self.channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(shortcut + y)


class StandardizedConv(nn.Conv2d):
    """Each output channel's kernel has mean 0 and variance 1; the epsilon is that of timm's BiT models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-8), None, self.stride, self.padding)


class TorchResNetV2(nn.Module):
    """Call: images float32 [B, 3, H, W], already normalised -> (pooled [B, C], logits [B, num_classes] or pooled).

    Written from the papers: He et al. 2016; Kolesnikov et al. 2020 (BiT: GroupNorm and weight standardisation).
    """

    def __init__(self, depth: int = 50, width: float = 1, norm: str = "group", num_classes: int = 0):
        super().__init__()
        conv_type = StandardizedConv if norm == "group" else nn.Conv2d
        self.make_conv = lambda *sizes: conv_type(*sizes, bias=False)
        self.make_norm = (lambda c: nn.GroupNorm(math.gcd(32, c), c)) if norm == "group" else nn.BatchNorm2d
        stage_blocks, bottleneck = DEPTHS[depth]
        channels = round(64 * width)
        self.stem = nn.ModuleDict({"conv": self.make_conv(3, channels, 7, 2, 3)})
        channels_in = channels
        self.stages = nn.ModuleList()
        for stage, num_blocks in enumerate(stage_blocks):
            blocks = nn.ModuleList()
            for j in range(num_blocks):
                stride = 2 if stage > 0 and j == 0 else 1
                blocks.append(BlockV2(self, channels_in, channels * 2**stage, stride, bottleneck))
                channels_in = channels * 2**stage * (4 if bottleneck else 1)
            self.stages.append(nn.ModuleDict({"blocks": blocks}))
        self.norm = self.make_norm(channels_in)
        self.head = nn.ModuleDict({"fc": nn.Conv2d(channels_in, num_classes, 1)} if num_classes else {})

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.max_pool2d(F.pad(self.stem["conv"](images), (1, 1, 1, 1)), 3, 2)  # of signed values, padded with zeros
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
        pooled = torch.relu(self.norm(x)).mean(dim=(2, 3))
        return pooled, self.head["fc"](pooled[:, :, None, None])[:, :, 0, 0] if len(self.head) else pooled


class BlockV2(nn.Module):
    """Pre-activation block, the shortcut's projection after the first norm."""

    def __init__(self, network: "TorchResNetV2", channels_in: int, channels: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:  # (kernel size, stride, channels)
            convs = ((1, 1, channels), (3, stride, channels), (1, 1, 4 * channels))
        else:
            convs = ((3, stride, channels), (3, 1, channels))
        self.downsample = None
        if stride != 1 or channels_in != convs[-1][2]:
            self.downsample = nn.ModuleDict({"conv": network.make_conv(channels_in, convs[-1][2], 1, stride)})
        self.count = len(convs)
        for i, (size, step, channels_out) in enumerate(convs, 1):
            setattr(self, f"norm{i}", network.make_norm(channels_in))
            setattr(self, f"conv{i}", network.make_conv(channels_in, channels_out, size, step, size // 2))
            channels_in = channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample["conv"](y)
        y = self.conv1(y)
        for i in range(2, self.count + 1):
            y = getattr(self, f"conv{i}")(torch.relu(getattr(self, f"norm{i}")(y)))
        return shortcut + y
