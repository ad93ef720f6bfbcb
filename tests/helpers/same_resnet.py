"""A ResNet v1 with TensorFlow's padding in plain PyTorch, and its weights as haiku names them: a reference."""

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.torch_resnet import TorchResNet


def same(x: torch.Tensor, size: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Padded so that ceil(side / stride) windows fit, the odd row and column last."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def features(network: TorchResNet, images: torch.Tensor) -> torch.Tensor:
    """What `network`'s weights make of normalised images [B, 3, H, W] where all layers are padded "SAME": [B, C]."""

    def conv(layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(same(x, layer.kernel_size[0], layer.stride[0]), layer.weight, stride=layer.stride)

    x = torch.relu(network.bn1(conv(network.conv1, images)))
    x = F.max_pool2d(same(x, 3, 2, value=-torch.inf), 3, 2)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            shortcut = x if block.downsample is None else block.downsample[1](conv(block.downsample[0], x))
            y = torch.relu(block.bn1(conv(block.conv1, x)))
            y = block.bn2(conv(block.conv2, y))
            if block.bottleneck:
                y = block.bn3(conv(block.conv3, torch.relu(y)))
            x = torch.relu(shortcut + y)
    return x.mean(dim=(2, 3))


def haiku_trees(network: TorchResNet) -> tuple[dict, dict]:
    """(parameters, state) as hk.nets.ResNet has them: dm-haiku 0.0.17's names and shapes, and BYOL's heads beside."""
    params: dict = {"byol/projector/linear": {"w": np.zeros((3, 3), np.float32)}}
    state: dict = {}

    def put(name: str, conv: torch.nn.Conv2d, norm_name: str, norm: torch.nn.BatchNorm2d) -> None:
        def channels(values: torch.Tensor) -> np.ndarray:
            return values.detach().numpy().reshape(1, 1, 1, -1)

        params[name] = {"w": conv.weight.detach().numpy().transpose(2, 3, 1, 0)}
        params[norm_name] = {"scale": channels(norm.weight), "offset": channels(norm.bias)}
        for moment, values in (("mean_ema", norm.running_mean), ("var_ema", norm.running_var)):
            assert values is not None
            average = channels(values)
            state[f"{norm_name}/~/{moment}"] = {"counter": np.int32(5), "hidden": 2 * average, "average": average}

    root = "res_net/~"
    put(f"{root}/initial_conv", network.conv1, f"{root}/initial_batchnorm", network.bn1)
    for i, stage in enumerate((network.layer1, network.layer2, network.layer3, network.layer4)):
        for j, block in enumerate(stage):
            where = f"{root}/block_group_{i}/~/block_{j}/~"
            for k in range(3 if block.bottleneck else 2):
                conv, norm = getattr(block, f"conv{k + 1}"), getattr(block, f"bn{k + 1}")
                put(f"{where}/conv_{k}", conv, f"{where}/batchnorm_{k}", norm)
            if block.downsample is not None:
                put(f"{where}/shortcut_conv", block.downsample[0], f"{where}/shortcut_batchnorm", block.downsample[1])
    return params, state
