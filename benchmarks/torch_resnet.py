"""A plain PyTorch ResNet v1.5 with torchvision's module names: reference of the parity tests and of benchmarks.step.

It is here so that neither needs torchvision; `state_dict` has torchvision's names, shapes and count of entries.
"""

import torch
from torch import nn

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
