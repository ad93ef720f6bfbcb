"""Writes a pretrained encoder under the names other people's code knows, and reads such files back.

    python -m vivi_jax.export --workdir=RUN --format=torchvision --out=FILE.safetensors

and, where torch and torchvision are:

    model = torchvision.models.resnet50()
    model.load_state_dict(safetensors.torch.load_file("FILE.safetensors"))

The file of a plain ResNet (width 1, 7x7 stem) loads strictly, so it holds every entry torchvision has: an encoder
without a classifier gets an `fc` of zeros for 1000 classes. The encoder here normalises its input itself, torchvision's
does not: input_mean and input_std are in the file's metadata. FILE.safetensors.sha256 lies beside it (`sha256sum -c`
reads it), because safetensors does not notice flipped bits.
"""
import argparse
import hashlib
import json
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.models import build_encoder
from vivi_jax.models.resnet import DEPTHS, IMAGENET_MEAN, IMAGENET_STD, ResNet

MODULES = {
    "stem_conv": "conv1", "stem_norm": "bn1", "classifier": "fc",
    "conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "norm1": "bn1", "norm2": "bn2", "norm3": "bn3",
    "proj_conv": "downsample.0", "proj_norm": "downsample.1",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"  # an entry of every BatchNorm of torch; written as 0, which torch's default never reads
# ndim -> order of the axes in torch: kernels [kh, kw, C, C'] -> [C', C, kh, kw], dense kernels [C, C'] -> [C', C].
TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
FC = ("fc.weight", "fc.bias")


# ---- The name map ---------------------------------------------------------------------------------------------------
def to_torchvision(encoder: ResNet, variables: dict) -> dict[str, np.ndarray]:
    """Returns the `state_dict` of torchvision's ResNet with the weights of ours: float32, and int64 counters.

    Args:
      encoder: version 1 with BatchNorm; depth as torchvision's, any width and stem.
      variables: {"params", "batch_stats"} of the encoder.

    Raises:
      ConfigError: an architecture torchvision does not have.
      CheckpointError: variables that are not this encoder's.
    """
    check_architecture(encoder)
    shapes = expected_shapes(encoder)
    state = {torchvision_name(path): to_torch_layout(np.asarray(leaf, np.float32))
             for path, leaf in flatten_dict(variables).items()}
    state |= {name: np.zeros((), np.int64) for name in shapes if name.endswith(COUNTER)}
    if encoder.num_classes is None:
        state = {name: np.zeros(shapes[name], np.float32) for name in FC} | state
    check_entries({name: array.shape for name, array in state.items()}, shapes)
    return state


def from_torchvision(encoder: ResNet, state_dict: dict) -> dict:
    """The inverse: returns {"params", "batch_stats"} as float32 NumPy arrays, copies of the entries.

    Args:
      encoder: version 1 with BatchNorm. One without a classifier drops `fc`, whatever its size.
      state_dict: name -> array or CPU tensor, under torchvision's names; every name of the encoder and no other.

    Raises:
      ConfigError: an architecture torchvision does not have.
      CheckpointError: entries that are missing, unexpected, or of another shape; all are listed.
    """
    check_architecture(encoder)
    state = {name: np.asarray(array) for name, array in state_dict.items()}
    shapes = expected_shapes(encoder)
    if encoder.num_classes is None:
        state, shapes = ({n: value for n, value in entries.items() if n not in FC} for entries in (state, shapes))
    check_entries({name: array.shape for name, array in state.items()}, shapes)
    paths = flatten_dict(abstract_variables(encoder))
    return unflatten_dict({path: from_torch_layout(state[torchvision_name(path)]) for path in paths})


def torchvision_name(path: tuple[str, ...]) -> str:
    """("params", "stage1_block2", "conv3", "kernel") -> "layer1.1.conv3.weight"."""
    _, *modules, leaf = path
    names = [re.sub(r"^stage(\d)_block(\d+)$", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", name) for name in modules]
    return ".".join([MODULES.get(name, name) for name in names] + [LEAVES.get(leaf, leaf)])


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """An array of ours with its axes in torch's order (TORCH_AXES)."""
    # Contiguous, because safetensors writes the buffer of a transposed view in its old order.
    return np.ascontiguousarray(array.transpose(TORCH_AXES[array.ndim]))


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`; always a float32 copy, as torch changes the statistics of a model in place."""
    return np.array(array.transpose(np.argsort(TORCH_AXES[array.ndim])), np.float32, order="C")


def abstract_variables(encoder: ResNet) -> dict:
    """The encoder's variables as ShapeDtypeStructs."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: encoder.init(key, x, train=False), jax.random.key(0), image)


def expected_shapes(encoder: ResNet) -> dict[str, tuple[int, ...]]:
    """Every entry of torchvision's state_dict for this encoder; where it has no classifier, for 1000 classes."""
    with_classifier = encoder.clone(num_classes=encoder.num_classes or 1000)
    shapes = {}
    for path, leaf in flatten_dict(abstract_variables(with_classifier)).items():
        name = torchvision_name(path)
        shapes[name] = tuple(leaf.shape[axis] for axis in TORCH_AXES[leaf.ndim])
        if name.endswith("running_var"):
            shapes[name.replace("running_var", COUNTER)] = ()
    return shapes


def check_architecture(encoder: ResNet) -> None:
    """Raises ConfigError unless torchvision has this kind of ResNet."""
    found = (encoder.version, encoder.norm, encoder.weight_standardization)
    if found != (1, "batch", False):
        raise ConfigError("format torchvision holds ResNet version=1 with norm='batch' and no weight standardization; "
                          "this encoder has version={}, norm={!r}, weight_standardization={}".format(*found))


def check_entries(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises one CheckpointError that lists every difference between two {name: shape}."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [f"{name} has shape {found[name]}, not {expected[name]}"
                 for name in expected if name in found and found[name] != expected[name]]
    if problems:
        raise CheckpointError(f"{len(problems)} entries do not fit the encoder: {'; '.join(problems)}")


# ---- Files ----------------------------------------------------------------------------------------------------------
def save_safetensors(path: str, state_dict: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, and PATH.sha256 beside it; an older file of that name is replaced as a whole."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum, unfinished = checksum_path(path), path.with_name(path.name + ".tmp")
    safetensors.numpy.save_file(state_dict, unfinished, metadata)
    digest = sha256(unfinished)
    checksum.unlink(missing_ok=True)  # first: a kill in between must not leave a new file beside an old checksum
    os.replace(unfinished, path)
    checksum.write_text(f"{digest}  {path.name}\n")


def load_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (state_dict, metadata) of a safetensors file.

    Raises:
      CheckpointError: no such file, not a safetensors file, or a content other than PATH.sha256 says (where it exists).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file {path}; python -m vivi_jax.export writes one from a run")
    checksum = checksum_path(path)
    if checksum.is_file() and checksum.read_text().split()[:1] != [sha256(path)]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {checksum}; export it again")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def checksum_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".sha256")


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_encoder(path: str) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables) of a safetensors file in torchvision's names.

    Depth, width and stem follow from the entries, also in a file that was not written here. A missing or all-zero
    classifier is left out. Input statistics come from the metadata; without them they are ImageNet's.

    Raises:
      CheckpointError: as load_safetensors and from_torchvision; or no depth has these blocks.
    """
    state, metadata = load_safetensors(path)
    if "conv1.weight" not in state:
        raise CheckpointError(f"{path} has no entry conv1.weight: it is not a ResNet in torchvision's names")
    blocks = tuple(len({n.split(".")[1] for n in state if n.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4))
    kind = (blocks, "layer1.0.conv3.weight" in state)
    depth = next((depth for depth, known in DEPTHS.items() if known == kind), None)
    if depth is None:
        raise CheckpointError(f"{path} has {blocks} blocks per stage: no ResNet known here")
    classifier = state.get("fc.weight", np.zeros((0, 0)))
    config = {
        "name": "resnet", "depth": depth, "width": state["conv1.weight"].shape[0] / 64,
        "stem": "imagenet" if state["conv1.weight"].shape[-1] == 7 else "small",
        "num_classes": len(classifier) if classifier.any() else None,
        "input_mean": json.loads(metadata.get("input_mean", json.dumps(IMAGENET_MEAN))),
        "input_std": json.loads(metadata.get("input_std", json.dumps(IMAGENET_STD))),
    }
    return config, from_torchvision(build_encoder(**config), state)


def export_torchvision(encoder: ResNet, variables: dict, path: str) -> dict[str, str]:
    """Writes the encoder's safetensors file; returns the metadata it carries."""
    plain = encoder.width == 1 and encoder.stem == "imagenet" and encoder.depth != 200
    loads = f"torchvision.models.resnet{encoder.depth}" if plain else "no model of torchvision as it is"
    metadata = {
        "format": "pt",
        "loads_strictly_into": loads + ("" if encoder.num_classes is None else f"(num_classes={encoder.num_classes})"),
        "width": str(encoder.width), "stem": encoder.stem,
        "classifier": "none: fc is all zeros" if encoder.num_classes is None else "fc",
        "input_mean": json.dumps(encoder.input_mean), "input_std": json.dumps(encoder.input_std),
    }
    save_safetensors(path, to_torchvision(encoder, variables), metadata)
    return metadata


EXPORTERS = {"torchvision": export_torchvision}


def main(argv: list[str] | None = None) -> None:
    from vivi_jax import checkpoint  # here: reading an export needs no Orbax

    parser = argparse.ArgumentParser(prog="python -m vivi_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="run directory; its newest good checkpoint is exported")
    parser.add_argument("--format", default="torchvision", choices=sorted(EXPORTERS))
    parser.add_argument("--out", required=True, help="file to write, usually NAME.safetensors")
    args = parser.parse_args(argv)
    try:
        config, variables = checkpoint.load_encoder(args.workdir)
        metadata = EXPORTERS[args.format](build_encoder(**config), variables, args.out)
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out} and {args.out}.sha256")
    for key, value in metadata.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
