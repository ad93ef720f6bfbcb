"""Weights as other projects leave them: which part of a file is the encoder, and BiT's and haiku's names for it.

Of a tree of containers, the encoder's names are found by those of its first layers; what stands before them is the
project's prefix. Nothing is dropped but what is known to stand beside an encoder: heads, other networks, queues.

Sources: MoCo (facebookresearch/moco, moco-v3: module.encoder_q, module.base_encoder), SimSiam (module.encoder), DINO
(teacher: module.backbone), VFS (mmaction's backbone.conv1.conv), BYOL and DetCon (haiku's hk.nets.ResNet), BiT
(google-research/big_transfer, .npz).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax.config import without_name
from vivi_jax.errors import CheckpointError
from vivi_jax.export.torch_names import abstract_leaves, check_entries
from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD
from vivi_jax.models.resnet import DEPTHS, ResNet

State = dict[str, np.ndarray]

# Of a checkpoint with several entries the first of these. DINO evaluates the teacher, BYOL the online network.
CONTAINERS = ("teacher", "state_dict", "model_state", "model", "network", "experiment_state")
PARAMS_AND_STATE = (("params", "state"), ("online_params", "online_state"))
# Names of layers that only an encoder begins with: (the first one, another that must be there).
ANCHORS = (
    ("conv1.weight", "layer1.0.conv1.weight"),
    ("conv1.conv.weight", "layer1.0.conv1.conv.weight"),
    ("stem.conv.weight", "stem.conv.weight"),
    ("patch_embed.proj.weight", "patch_embed.proj.weight"),
    ("features.0.0.weight", "features.1.0.attn.qkv.weight"),
)
BESIDE = re.compile(  # what stands beside an encoder
    r"(module\.|model\.)*(encoder_k|momentum_encoder|target_encoder|queue|queue_ptr|predictor|projector|projection|"
    r"head|img_head|cls_head|classifier|dino_head)(\.|_|$)"
)
CONTRASTIVE = ("encoder_q.", "base_encoder.", "encoder.")  # encoders whose classifier was replaced by a projector


# ---- Which part of a tree -------------------------------------------------------------------------------------------


def state_dict(tree: Any) -> State:
    """The entries of the encoder, in its library's names without prefix; of haiku and BiT all, by module/parameter.

    Raises:
      CheckpointError: there is no encoder known here, or several, or entries that belong to nothing known.
    """
    tree = inner(tree)
    if not isinstance(tree, dict):
        raise CheckpointError("it holds no dict of weights")
    flat = {name: array for name, array in flatten_dict(tree, sep="/").items() if isinstance(array, np.ndarray)}
    if any("/" in name for name in flat):
        return flat
    return without_prefix(flat)


def inner(tree: Any) -> Any:
    """The part of a checkpoint that has the weights; haiku's parameters and state as one dict of modules."""
    if isinstance(tree, list) and len(tree) == 2 and all(isinstance(part, dict) for part in tree):
        return joined(*tree)
    if not isinstance(tree, dict):
        return tree
    for params, state in PARAMS_AND_STATE:
        if isinstance(tree.get(params), dict) and isinstance(tree.get(state), dict):
            return joined(tree[params], tree[state])
    for name in CONTAINERS:
        if isinstance(tree.get(name), (dict, list)):
            return inner(tree[name])
    return tree


def joined(params: dict, state: dict) -> dict:
    flat = [flatten_dict(part, sep="/") for part in (params, state)]
    if twice := sorted(flat[0].keys() & flat[1].keys()):
        raise CheckpointError(f"parameters and state both have {twice[0]}")
    return flat[0] | flat[1]


def without_prefix(flat: State) -> State:
    """The entries of the one encoder among torch's, under their own names."""
    found = [
        name.removesuffix(first)
        for first, other in ANCHORS
        for name in flat
        if name.endswith(first) and name.removesuffix(first) + other in flat
    ]
    found = [p for p in dict.fromkeys(found) if (p == "" or p.endswith(".")) and not BESIDE.match(p)]
    if not found:
        return flat  # says of itself what it is, or that it is nothing known
    if len(found) > 1:
        raise CheckpointError(f"it holds several encoders, under {' and '.join(found)}: leave one in it")
    (prefix,) = found
    own = {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}
    left = [name for name in flat if not name.startswith(prefix) and not BESIDE.match(name)]
    if left:
        some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise CheckpointError(
            f"{len(left)} entries belong neither to the encoder, {prefix}*, nor to a known head: {some}"
        )
    if prefix.endswith(CONTRASTIVE):
        own = {name: array for name, array in own.items() if not name.startswith(("fc.", "head."))}
    return {mmaction_name(name): array for name, array in own.items()} if "conv1.conv.weight" in own else own


def mmaction_name(name: str) -> str:
    """layer1.0.conv2.bn.bias -> layer1.0.bn2.bias, layer1.0.downsample.conv.weight -> layer1.0.downsample.0.weight."""
    name = re.sub(r"conv(\d)\.conv\.", r"conv\1.", name)
    name = re.sub(r"conv(\d)\.bn\.", r"bn\1.", name)
    return name.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")


# ---- Readers of names that are not torch's --------------------------------------------------------------------------


def read_renamed(config: dict[str, Any], state: State, name_of: Callable[[tuple[str, ...]], str]) -> tuple[dict, dict]:
    """(config, variables) of a ResNet from arrays with our order of axes under other names; every one must be used."""
    leaves = abstract_leaves(ResNet(**without_name(config)))
    expected = {name_of(path): leaf.shape for path, leaf in leaves.items()}
    check_entries({name: array.shape for name, array in state.items()}, expected)
    return config, unflatten_dict({path: np.array(state[name_of(path)], np.float32) for path in leaves})


def resnet_config(state: State, stem: str, block: str, first: int, third: str, **kind: Any) -> dict[str, Any]:
    """Arguments of build_encoder, by the stem's shape and the blocks' names.

    Args:
      stem: name of its kernel [7, 7, 3, C].
      block: pattern with the numbers of stage and block, the stages from `first`.
      third: what a name ends with where blocks have three convolutions.

    Raises:
      CheckpointError: no depth has these blocks.
    """
    found = {(int(m[1]), int(m[2])) for m in map(re.compile(block).match, state) if m}
    blocks = tuple(sum(stage == s + first for stage, _ in found) for s in range(4))
    bottleneck = any(name.endswith(third) for name in state)
    depth = next((depth for depth, known in DEPTHS.items() if known == (blocks, bottleneck)), None)
    if depth is None:
        raise CheckpointError(f"{blocks} blocks per stage: no ResNet known here")
    kernel = state[stem]
    small = kernel.shape[0] == 3
    return {
        "name": "resnet",
        "depth": depth,
        "width": kernel.shape[-1] / 64,
        "stem": "small" if small else "imagenet",
    } | kind


def with_classifier(config: dict, state: State, kernel: str, bias: str) -> State:
    """The state with the classifier as a matrix, or without one that is all zeros; sets num_classes of `config`."""
    if kernel not in state:
        return state
    if not state[kernel].any():
        return {name: array for name, array in state.items() if name not in (kernel, bias)}
    features, classes = state[kernel].shape[-2:]
    config["num_classes"] = classes
    return state | {kernel: state[kernel].reshape(features, classes)}


BIT_STEM = "root_block/standardized_conv2d/kernel"


def is_bit(state: Mapping) -> bool:
    """Whether these are BiT's arrays."""
    return any(name.endswith(BIT_STEM) for name in state)


def bit_name(path: tuple[str, ...]) -> str:
    """("params", "stage1_block2", "conv3", "kernel") -> "block1/unit02/c/standardized_conv2d/kernel"."""
    *modules, leaf = path[1:]
    if modules[0] in ("stem_conv", "final_norm", "classifier"):
        where = {"stem_conv": "root_block/standardized_conv2d", "final_norm": "group_norm", "classifier": "head/conv2d"}
        names = [where[modules[0]]]
    else:
        stage, block = re.findall(r"\d+", modules[0])
        part = "a/proj" if modules[1] == "proj_conv" else "abc"[int(modules[1][-1]) - 1]
        layer = "group_norm" if "norm" in modules[1] else "standardized_conv2d"
        names = [f"block{stage}/unit{int(block):02}/{part}/{layer}"]
    norm = {"scale": "gamma", "bias": "beta"} if names[0].endswith("group_norm") else {}
    return "/".join([*names, norm.get(leaf, leaf)])


def read_bit(state: State, metadata: Mapping[str, str]) -> tuple[dict, dict]:
    """Returns (arguments of build_encoder, variables) of a ResNet of Big Transfer."""
    prefix = next(name for name in state if name.endswith(BIT_STEM)).removesuffix(BIT_STEM)
    state = {name.removeprefix(prefix): array for name, array in state.items()}
    config = resnet_config(
        state, BIT_STEM, r"block(\d)/unit(\d+)/", 1, "/c/standardized_conv2d/kernel",
        version=2, norm="group", weight_standardization=True, kernel_eps=1e-10,
        input_mean=(0.5,) * 3, input_std=(0.5,) * 3,  # its code's images are in [-1, 1]
    )  # fmt: skip
    return read_renamed(config, with_classifier(config, state, "head/conv2d/kernel", "head/conv2d/bias"), bit_name)


HAIKU_STEM = "initial_conv/w"
HAIKU_BESIDE = re.compile(r"(\w+/)*(projector|predictor|classifier|target_network)\w*/")
HAIKU_MODULES = {
    "stem_conv": "initial_conv", "stem_norm": "initial_batchnorm", "classifier": "logits",
    "proj_conv": "shortcut_conv", "proj_norm": "shortcut_batchnorm",
}  # fmt: skip
HAIKU_LEAVES = {"kernel": "w", "scale": "scale", "bias": "offset", "mean": "mean_ema/average", "var": "var_ema/average"}


def is_haiku(state: Mapping) -> bool:
    """Whether these are the arrays of a hk.nets.ResNet."""
    return any(name.endswith(f"/{HAIKU_STEM}") for name in state)


def haiku_name(path: tuple[str, ...]) -> str:
    """("batch_stats", "stage1_block2", "norm3", "mean") -> "block_group_0/block_1/batchnorm_2/mean_ema/average"."""
    *modules, leaf = path[1:]

    def module(name: str) -> str:
        if match := re.fullmatch(r"stage(\d)_block(\d+)", name):
            return f"block_group_{int(match[1]) - 1}/block_{int(match[2]) - 1}"
        if match := re.fullmatch(r"(conv|norm)(\d)", name):
            return f"{'conv' if match[1] == 'conv' else 'batchnorm'}_{int(match[2]) - 1}"
        return HAIKU_MODULES[name]

    names = [module(name) for name in modules]
    return "/".join([*names, "b" if names == ["logits"] and leaf == "bias" else HAIKU_LEAVES[leaf]])


def read_haiku(state: State, metadata: Mapping[str, str]) -> tuple[dict, dict]:
    """Returns (arguments of build_encoder, variables) of haiku's ResNet v1, as BYOL and DetCon have it.

    Its convolutions are padded "SAME". Of a moving average haiku keeps three numbers, of which `average` is read.
    """
    state = {name.replace("~/", ""): array for name, array in state.items()}
    prefixes = {name.removesuffix(HAIKU_STEM) for name in state if name.endswith(f"/{HAIKU_STEM}")}
    if len(prefixes) > 1:
        raise CheckpointError(f"it holds several encoders, under {' and '.join(sorted(prefixes))}: leave one in it")
    (prefix,) = prefixes
    if left := [n for n in state if not n.startswith(prefix) and not HAIKU_BESIDE.match(n)]:
        raise CheckpointError(
            f"{len(left)} entries belong neither to {prefix} nor to a known head: {', '.join(left[:3])}"
        )
    state = {
        name.removeprefix(prefix): array.reshape(-1) if "batchnorm" in name else array  # [1, 1, 1, C]
        for name, array in state.items()
        if name.startswith(prefix) and not name.endswith(("_ema/counter", "_ema/hidden"))
    }
    config = resnet_config(
        state, HAIKU_STEM, r"block_group_(\d)/block_(\d+)/", 0, "/conv_2/w",
        padding="same", input_mean=IMAGENET_MEAN, input_std=IMAGENET_STD,
    )  # fmt: skip
    return read_renamed(config, with_classifier(config, state, "logits/w", "logits/b"), haiku_name)
