"""The weights of a ResNet under the names, shapes and order of axes of PyTorch libraries, strict both ways.

A library is one Naming. torchvision has the v1 ResNets with BatchNorm, timm (its ResNetV2) the v2 ones: `resnetv2_50`
with BatchNorm, and BiT's `resnetv2_50x1_bit`, `resnetv2_50x3_bit` with GroupNorm and weight standardisation.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import DEPTHS, ResNet

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# An entry of every BatchNorm of torch, batches seen in training; written as 0, which torch's default never reads. Torch
# itself loads files without it (written before PyTorch 0.4.1), and as an array of one element: it is never looked at.
EPS = 1e-5  # of the libraries' norms
COUNTER = "num_batches_tracked"
# ndim -> order of the axes in torch: kernels [kh, kw, C, C'] -> [C', C, kh, kw], dense kernels [C, C'] -> [C', C].
TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a library names the entries of its ResNets.

    Attributes:
      library: its name, for messages.
      kinds: (version, norm, weight_standardization) of the encoders it has.
      modules: ours -> theirs; a module that is not here has the same name.
      block: theirs, with places for the numbers of stage and block.
      first: number of the first stage; blocks count from 0.
      classifier: name of the module.
      classifier_always: an encoder without a classifier gets one of zeros for 1000 classes, as the library's model
        always has one; otherwise the entries are left out.
      classifier_is_conv: a 1x1 convolution, [K, C, 1, 1].
    """

    library: str
    kinds: tuple[tuple[int, str, bool], ...]
    modules: Mapping[str, str]
    block: str
    first: int
    classifier: str
    classifier_always: bool
    classifier_is_conv: bool

    def name(self, path: tuple[str, ...]) -> str:
        """("params", "stage1_block2", "conv3", "kernel") -> "layer1.1.conv3.weight"."""
        _, *modules, leaf = path
        return ".".join([self._module(module) for module in modules] + [LEAVES.get(leaf, leaf)])

    def _module(self, module: str) -> str:
        if match := re.fullmatch(r"stage(\d)_block(\d+)", module):
            return self.block.format(int(match[1]) - 1 + self.first, int(match[2]) - 1)
        return self.classifier if module == "classifier" else self.modules.get(module, module)

    def blocks(self, names: list[str]) -> tuple[int, ...]:
        """Number of blocks in each of the four stages, told from the names of the entries."""
        pattern = re.compile(re.escape(self.block).replace(r"\{\}", r"(\d+)") + r"\.")
        found = {(int(m[1]), int(m[2])) for m in map(pattern.match, names) if m}
        return tuple(sum(stage == s + self.first for stage, _ in found) for s in range(4))

    def is_classifier(self, name: str) -> bool:
        return name.startswith(f"{self.classifier}.")


TORCHVISION = Naming(
    library="torchvision",
    kinds=((1, "batch", False),),
    modules={
        "stem_conv": "conv1",
        "stem_norm": "bn1",
        "norm1": "bn1",
        "norm2": "bn2",
        "norm3": "bn3",
        "proj_conv": "downsample.0",
        "proj_norm": "downsample.1",
    },
    block="layer{}.{}",
    first=1,
    classifier="fc",
    classifier_always=True,
    classifier_is_conv=False,
)
TIMM = Naming(
    library="timm",
    kinds=((2, "batch", False), (2, "group", True)),
    modules={"stem_conv": "stem.conv", "final_norm": "norm", "proj_conv": "downsample.conv"},
    block="stages.{}.blocks.{}",
    first=0,
    classifier="head.fc",
    classifier_always=False,
    classifier_is_conv=True,
)


def to_torch(naming: Naming, encoder: ResNet, variables: dict) -> dict[str, np.ndarray]:
    """Returns the library's `state_dict` with the weights of ours: float32, and int64 counters.

    Args:
      encoder: of a kind the library has, with any depth, width and stem.
      variables: {"params"} and, with BatchNorm, {"batch_stats"} of the encoder.

    Raises:
      ConfigError: an architecture the library does not have.
      CheckpointError: variables that are not this encoder's.
    """
    check_architecture(naming, encoder)
    shapes = expected_shapes(naming, encoder)
    state = {
        naming.name(path): to_torch_layout(naming, np.asarray(leaf, np.float32))
        for path, leaf in flatten_dict(variables).items()
    }
    # The libraries' BatchNorm adds EPS to a variance, ours norm_eps; at inference only their sum counts.
    for name in (name for name in state if name.endswith("running_var")):
        state[name] = state[name] + np.float32(encoder.norm_eps - EPS)
    state |= {name: np.zeros((), np.int64) for name in shapes if name.endswith(COUNTER)}
    if encoder.num_classes is None:
        state = {
            name: np.zeros(shape, np.float32) for name, shape in shapes.items() if naming.is_classifier(name)
        } | state
    check_entries({name: array.shape for name, array in state.items()}, shapes)
    return state


def from_torch(naming: Naming, encoder: ResNet, state_dict: dict) -> dict:
    """The inverse: returns the encoder's variables as float32 NumPy arrays, copies of the entries.

    Args:
      encoder: of a kind the library has. One without a classifier drops the entries of one, whatever its size.
      state_dict: name -> array or CPU tensor of any float type, under the library's names; every name of the encoder
        and no other, apart from counters of batches, which may be missing.

    Raises:
      ConfigError: an architecture the library does not have.
      CheckpointError: entries that are missing, unexpected, or of another shape; all are listed.
    """
    check_architecture(naming, encoder)
    state = {name: np.asarray(x) for name, x in state_dict.items() if not name.endswith(f".{COUNTER}")}
    shapes = {name: shape for name, shape in expected_shapes(naming, encoder).items() if not name.endswith(COUNTER)}
    if encoder.num_classes is None:
        state = {name: array for name, array in state.items() if not naming.is_classifier(name)}
        shapes = {name: shape for name, shape in shapes.items() if not naming.is_classifier(name)}
    check_entries({name: array.shape for name, array in state.items()}, shapes)
    leaves = abstract_leaves(encoder)
    flat = {path: from_torch_layout(state[naming.name(path)], leaf.ndim) for path, leaf in leaves.items()}
    for path in (path for path in flat if path[-1] == "var"):
        flat[path] -= np.float32(encoder.norm_eps - EPS)  # the inverse of to_torch
    return unflatten_dict(flat)


def to_torch_layout(naming: Naming, array: np.ndarray) -> np.ndarray:
    """An array of ours with its axes in torch's order (TORCH_AXES)."""
    array_torch = array.transpose(TORCH_AXES[array.ndim])
    if array.ndim == 2 and naming.classifier_is_conv:
        array_torch = array_torch[:, :, None, None]
    # Contiguous, because safetensors writes the buffer of a transposed view in its old order.
    return np.ascontiguousarray(array_torch)


def from_torch_layout(array: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse of `to_torch_layout`; always a float32 copy, as torch changes the statistics of a model in place."""
    array = array.reshape(array.shape[:ndim])  # the classifier's 1x1 convolution
    return np.array(array.transpose(np.argsort(TORCH_AXES[ndim])), np.float32, order="C")


def encoder_json(name: str, encoder: Encoder) -> str:
    """The arguments of models.build_encoder as JSON, which exports carry."""
    fields = (f for f in dataclasses.fields(encoder) if f.name not in ("parent", "name"))
    arguments = {field.name: getattr(encoder, field.name) for field in fields}
    return json.dumps({"name": name} | arguments, default=str)


def timm_call(spec: tuple[str, dict] | None, num_classes: int | None) -> str:
    """timm's call for a model's name and arguments; "" if there is none."""
    if spec is None:
        return ""
    arguments = {"num_classes": num_classes or 0} | spec[1]
    return f"timm.create_model({spec[0]!r}, {', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def abstract_variables(encoder: Encoder) -> dict:
    """The encoder's variables as ShapeDtypeStructs."""
    image = jax.ShapeDtypeStruct((1, 160, 160, 3), jnp.float32)  # VDIM's encoder takes nothing smaller than 131
    variables: Any = jax.eval_shape(lambda key, x: encoder.init(key, x, train=False), jax.random.key(0), image)
    return variables


def abstract_leaves(encoder: Encoder) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path of each of the encoder's variables -> its shape and dtype."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(encoder))
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def expected_shapes(naming: Naming, encoder: ResNet) -> dict[str, tuple[int, ...]]:
    """Every entry of the library's state_dict for this encoder."""
    if naming.classifier_always and encoder.num_classes is None:
        encoder = encoder.clone(num_classes=1000)
    shapes = {}
    for path, leaf in abstract_leaves(encoder).items():
        name = naming.name(path)
        shapes[name] = to_torch_layout(naming, np.broadcast_to(np.float32(0), leaf.shape)).shape
        if name.endswith("running_var"):
            shapes[name.replace("running_var", COUNTER)] = ()
    return shapes


def depth_of(naming: Naming, state: dict) -> int:
    """The depth whose blocks a state_dict has.

    Raises:
      CheckpointError: no depth has these.
    """
    blocks = naming.blocks(list(state))
    kind = (blocks, f"{naming.block.format(naming.first, 0)}.conv3.weight" in state)
    depth = next((depth for depth, known in DEPTHS.items() if known == kind), None)
    if depth is None:
        raise CheckpointError(f"{blocks} blocks per stage: no ResNet known here")
    return depth


def check_architecture(naming: Naming, encoder: ResNet) -> None:
    """Raises ConfigError unless the library has this kind of ResNet, and computes as it does."""
    if encoder.norm_eps < EPS or (encoder.norm == "group" and encoder.norm_eps != EPS):
        raise ConfigError(
            f"format {naming.library} has norms of eps={EPS}, this encoder of norm_eps={encoder.norm_eps}"
        )
    if encoder.padding != "torch":
        raise ConfigError(
            f"format {naming.library} pads symmetrically, this encoder as TensorFlow and haiku do (padding="
            f"{encoder.padding!r}): under its names the weights would be another function at even sizes"
        )
    found = (encoder.version, encoder.norm, encoder.weight_standardization)
    if found not in naming.kinds:
        known = " or ".join(f"version={v}, norm={n!r}, weight_standardization={w}" for v, n, w in naming.kinds)
        raise ConfigError(
            f"format {naming.library} holds ResNet {known}; this encoder has version={found[0]}, "
            f"norm={found[1]!r}, weight_standardization={found[2]}"
        )


def check_entries(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises one CheckpointError that lists every difference between two {name: shape}."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, not {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise CheckpointError(f"{len(problems)} entries do not fit the encoder: {'; '.join(problems)}")
