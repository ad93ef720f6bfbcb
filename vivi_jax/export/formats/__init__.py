"""Every format that an encoder is written in: which encoders it holds, how it is written, and how it is tried.

An export is written beside its place, called once in the format's own runtime, compared with the encoder here, and only
then moved to its place. A format is one line of FORMATS.
"""

import functools
import importlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vivi_jax import files
from vivi_jax.errors import CheckpointError, ConfigError, lookup
from vivi_jax.export import resnet, safetensors_files, swin, torch_names, vit
from vivi_jax.export.formats import hub, npz, onnx_graph, programs
from vivi_jax.export.formats.hub import About
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.swin import SwinTransformer
from vivi_jax.models.vdim_encoder import VdimEncoder
from vivi_jax.models.vit import VisionTransformer

TOLERANCE = 1e-4  # of features, relative to the largest one
WEIGHTS = "model.safetensors"
Path = pathlib.Path


class Format(NamedTuple):
    """A format.

    Attributes:
      kinds: encoders it has.
      problem: (encoder) -> why it cannot hold this one, or None.
      write: (encoder, variables, path, about) -> metadata; the path is a new file, or an empty folder.
      call: (path, images float32[B, H, W, 3] in [0, 1], encoder) -> float[B, C], by the format's runtime.
      runtime: modules that `call` imports; the last one is named.
      folder: the export is a folder.
    """

    kinds: tuple[type[Encoder], ...]
    problem: Callable[[Any], str | None]
    write: Callable[[Any, dict, Path, About], dict[str, str]]
    call: Callable[[Path, np.ndarray, Any], np.ndarray]
    runtime: tuple[str, ...]
    folder: bool


def save(name: str, encoder: Encoder, variables: dict, out: files.Path, about: About) -> tuple[dict[str, str], str]:
    """Writes an encoder in a format, and tries it.

    Args:
      out: file or folder. A folder that is there must be an export; it is replaced.

    Returns:
      (metadata, one line on how it was tried)

    Raises:
      ConfigError: the format has no such encoder, or `out` cannot be written.
      CheckpointError: weights that no encoder could use, or other features in the format's runtime.
    """
    target = Path(out)
    chosen = pick(name, target)
    encoder = encoder.clone(dtype="float32")
    check_before(name, chosen, encoder, variables)
    if target.is_dir() and (not chosen.folder or (any(target.iterdir()) and not (target / hub.SUMS).is_file())):
        raise ConfigError(f"{target} is a folder that is no earlier export: give another --out")
    if chosen.folder and target.is_file():
        raise ConfigError(f"{target} is a file, and --format={name} writes a folder: give another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            written = Path(beside, target.name)
            if chosen.folder:
                written.mkdir()
            metadata = chosen.write(encoder, variables, written, about)
            tried = check(name, chosen, written, encoder, variables, about)
            move(written, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}") from error
    return metadata, tried


def export_encoder(
    name: str, encoder: Encoder, variables: dict, path: files.Path, about: About | None = None
) -> dict[str, str]:
    """Writes an encoder in a format to `path`, and does not try it; returns the metadata. `save` does both.

    Raises:
      as `save`, and OSError: it cannot be written.
    """
    chosen = pick(name, Path(path))
    check_before(name, chosen, encoder, variables)
    if chosen.folder:
        Path(path).mkdir(parents=True, exist_ok=True)
    return chosen.write(encoder, variables, Path(path), about or About())


def check_before(name: str, chosen: Format, encoder: Encoder, variables: dict) -> None:
    """Raises ConfigError or CheckpointError if the format has no such encoder, or the weights are of no use."""
    refuse(name, chosen, encoder)
    check_weights(encoder, variables)


def pick(name: str, target: Path) -> Format:
    """The format of a name; timm's is a folder unless --out is a .safetensors file."""
    chosen = lookup("--format", name, FORMATS)
    return TIMM_FILE if name == "timm" and target.suffix == ".safetensors" else chosen


def refuse(name: str, chosen: Format, encoder: Encoder) -> None:
    """Raises ConfigError if the format has no such encoder, and names those that have."""
    if problem := problem_of(chosen, encoder):
        others = [other for other, entry in FORMATS.items() if other != name and problem_of(entry, encoder) is None]
        problem = problem.removeprefix(f"format {name} ")
        remedy = f"use --format={' or '.join(others)}" if others else "no format here has it"
        raise ConfigError(f"format {name} {problem}; {remedy}")


def problem_of(chosen: Format, encoder: Encoder) -> str | None:
    """Why a format cannot hold an encoder; None: it can."""
    if type(encoder) not in chosen.kinds:
        return f"has no {type(encoder).__name__}"
    try:
        return chosen.problem(encoder)
    except ConfigError as error:
        return str(error)


def move(written: Path, target: Path) -> None:
    """A file with the checksum beside it, or a folder, to its place; what is there is replaced as a whole."""
    if written.is_dir():
        old = written.with_name(f"{written.name}.old")
        if target.exists():
            os.replace(target, old)  # goes with the folder that both are in
        os.replace(written, target)
        shutil.rmtree(old, ignore_errors=True)
        return
    checksum = safetensors_files.checksum_path(target)
    checksum.unlink(missing_ok=True)  # first: a kill in between must not leave a new file beside an old checksum
    os.replace(written, target)
    os.replace(safetensors_files.checksum_path(written), checksum)


# ---- What no encoder could use --------------------------------------------------------------------------------------


def check_weights(encoder: Encoder, variables: dict) -> None:
    """Raises CheckpointError if weights or statistics of the input are not finite, or would be divided by zero."""
    mean, std = (np.asarray(values, np.float64).reshape(-1) for values in (encoder.input_mean, encoder.input_std))
    if mean.shape != (3,) or std.shape != (3,) or not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise CheckpointError(f"input_mean={encoder.input_mean}, input_std={encoder.input_std}: not 3 numbers each")
    if (std <= 0).any():
        raise CheckpointError(f"input_std={encoder.input_std} divides by zero: each must be above 0")
    leaves = {name: np.asarray(leaf) for name, leaf in programs.flat(variables).items()}
    if wrong := [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        raise CheckpointError(
            f"{len(wrong)} of {len(leaves)} arrays hold NaN or infinity, such as {wrong[0]}: its training "
            "diverged; take an earlier checkpoint"
        )
    if wrong := [name for name, leaf in leaves.items() if name.endswith("/var") and (leaf < 0).any()]:
        raise CheckpointError(f"{len(wrong)} variances are negative, such as {wrong[0]}")


# ---- Trying an export -----------------------------------------------------------------------------------------------


def check(name: str, chosen: Format, path: Path, encoder: Encoder, variables: dict, about: About) -> str:
    """Calls an export in its runtime; returns a line on how near its features are.

    Raises:
      CheckpointError: they are not the encoder's.
    """
    if problem := untried(name, encoder):
        return f"not tried: {problem}"
    try:
        module = [importlib.import_module(module) for module in chosen.runtime][-1]
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises a RuntimeError
        return _no_import(chosen, error)
    apply = jax.jit(functools.partial(encoder.apply, train=False))
    largest, scale = 0.0, 0.0
    shapes = shapes_of(name, encoder, about)
    for shape in shapes:
        images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
        expected = np.asarray(apply(variables, images)[0])
        try:
            found = np.asarray(chosen.call(path, images, encoder))
        except ImportError as error:  # transformers imports a model, and torchvision with it, when it is asked for
            return _no_import(chosen, error)
        if found.shape != expected.shape:
            raise CheckpointError(f"{path.name}: {chosen.runtime[-1]} gives {found.shape}, not {expected.shape}")
        difference = float(np.abs(found - expected).max())
        if not difference <= TOLERANCE * np.abs(expected).max():  # also if it is NaN
            raise CheckpointError(
                f"{path.name} gives other features in {chosen.runtime[-1]} {module.__version__} than here: they differ "
                f"by {difference:.2g} of {np.abs(expected).max():.2g} for input {shape}; nothing was written"
            )
        largest, scale = max(largest, difference), max(scale, float(np.abs(expected).max()))
    tried = " and ".join("x".join(map(str, shape)) for shape in shapes)
    return (
        f"checked in {chosen.runtime[-1]} {module.__version__}: largest difference {largest:.1e} of {scale:.3g}, "
        f"inputs {tried}"
    )


def _no_import(chosen: Format, error: Exception) -> str:
    return f"not tried: {chosen.runtime[-1]} cannot be imported here ({str(error).splitlines()[0]})"


def untried(name: str, encoder: Encoder) -> str | None:
    """Why an export cannot be tried; None: it can be."""
    if name == "torchvision" and torchvision_name(encoder) is None:
        return "torchvision has no model of these sizes"
    if name == "timm" and hub.timm_spec(encoder) is None:
        return "timm has no model of these sizes"
    return None


def shapes_of(name: str, encoder: Encoder, about: About) -> list[tuple[int, ...]]:
    """Inputs to try: with programs two batches, with libraries' models an even and an odd size where they take any."""
    side = about.image_size
    if name in ("torchvision", "timm", "huggingface"):
        if isinstance(encoder, SwinTransformer):  # where all libraries agree
            side = 8 * encoder.patch * encoder.window
        if isinstance(encoder, VisionTransformer):
            side = -(-encoder.image_size // encoder.patch) * encoder.patch
        return [(2, size, size, 3) for size in ((side, side + 1) if isinstance(encoder, ResNet) else (side,))]
    one = input_shape(encoder, about)
    return [(batch, *one[1:]) for batch in (1, 3)]


def input_shape(encoder: Encoder, about: About) -> tuple[int, ...]:
    """Of the input of programs; its first axis is any."""
    side = about.image_size
    return (1, encoder.frames, side, side, 3) if isinstance(encoder, VdimEncoder) else (1, side, side, 3)


def normalised(images: np.ndarray, encoder: Encoder) -> np.ndarray:
    mean, std = (np.array(values, np.float32) for values in (encoder.input_mean, encoder.input_std))
    return (images - mean) / std


# ---- torchvision's and timm's files ---------------------------------------------------------------------------------


def torchvision_problem(encoder: Encoder) -> None:
    if isinstance(encoder, ResNet):
        torch_names.check_architecture(torch_names.TORCHVISION, encoder)


def timm_problem(encoder: Encoder) -> None:
    if isinstance(encoder, ResNet):
        torch_names.check_architecture(torch_names.TIMM if encoder.version == 2 else resnet.TIMM_V1, encoder)


def timm_folder_problem(encoder: Encoder) -> str | None:
    timm_problem(encoder)
    return hub.timm_problem(encoder)


def write_torchvision(encoder: Any, variables: dict, path: Path, about: About) -> dict[str, str]:
    write: Any = resnet.export_torchvision if isinstance(encoder, ResNet) else swin.export_torchvision
    return write(encoder, variables, path, about.extra())


def write_timm_file(encoder: Any, variables: dict, path: Path, about: About) -> dict[str, str]:
    write: dict[type, Any] = {
        ResNet: resnet.export_timm,
        SwinTransformer: swin.export_timm,
        VisionTransformer: vit.export_timm,
    }
    return write[type(encoder)](encoder, variables, path, about.extra())


def torchvision_name(encoder: Encoder) -> str | None:
    """torchvision's model of an encoder's sizes."""
    if isinstance(encoder, SwinTransformer):
        return swin.model_name(encoder, 0)
    assert isinstance(encoder, ResNet)
    plain = encoder.width == 1 and encoder.stem == "imagenet" and encoder.depth != 200
    return f"resnet{encoder.depth}" if plain else None


def call_torchvision(path: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    load_file = importlib.import_module("safetensors.torch").load_file
    torch = importlib.import_module("torch")
    torchvision = importlib.import_module("torchvision")

    model = torchvision.models.get_model(
        torchvision_name(encoder), weights=None, num_classes=encoder.num_classes or 1000
    )
    model.load_state_dict(load_file(path), strict=True)
    if isinstance(encoder, ResNet):
        model.fc = torch.nn.Identity()
    else:
        model.head = torch.nn.Identity()
    with torch.no_grad():
        return model.eval()(torch.from_numpy(normalised(images, encoder).transpose(0, 3, 1, 2).copy())).numpy()


def call_timm_file(path: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    load_file = importlib.import_module("safetensors.torch").load_file
    timm = importlib.import_module("timm")
    torch = importlib.import_module("torch")

    spec = hub.timm_spec(encoder)
    assert spec is not None
    model = timm.create_model(spec[0], num_classes=encoder.num_classes or 0, **spec[1])
    model.load_state_dict(load_file(path), strict=True)
    model.eval()
    with torch.no_grad():
        x = torch.from_numpy(normalised(images, encoder).transpose(0, 3, 1, 2).copy())
        return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1).numpy()


# ---- Programs -------------------------------------------------------------------------------------------------------


def metadata_of(encoder: Encoder, about: About) -> dict[str, str]:
    return {
        "input": f"images: float32 [batch, {', '.join(map(str, input_shape(encoder, about)[1:]))}], RGB in [0, 1]",
        "outputs": "features" + (", logits" if encoder.num_classes else ""),
        **about.extra(),
        safetensors_files.ENCODER: torch_names.encoder_json(npz.name_of(encoder), encoder),
    }


def write_onnx(encoder: Any, variables: dict, path: Path, about: About) -> dict[str, str]:
    metadata = metadata_of(encoder, about)
    apply = functools.partial(programs.outputs, encoder, variables)
    onnx_graph.write_onnx(apply, input_shape(encoder, about), path, metadata)
    write_checksum(path)
    return metadata


def call_onnx(path: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    onnxruntime = importlib.import_module("onnxruntime")

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["features"], {"images": images})[0])


STABLEHLO_README = """# Encoder as StableHLO

```python
import jax.export
import safetensors.numpy

encoder = jax.export.deserialize(bytearray(open("encoder.stablehlo", "rb").read()))
outputs = encoder.call(safetensors.numpy.load_file("model.safetensors"), images)  # {{"features": [B, C]}}
```

{input}. One program for {platforms}, written by jax {jax} in StableHLO {version}; newer versions of jax read it for
about six months, as they say. The weights alone, and every other format, have no such limit.
"""


def write_stablehlo(encoder: Any, variables: dict, folder: Path, about: About) -> dict[str, str]:
    metadata = metadata_of(encoder, about)
    programs.write_stablehlo(encoder, variables, input_shape(encoder, about), folder / programs.PROGRAM)
    safetensors_files.save_safetensors(folder / WEIGHTS, programs.flat(variables), metadata)
    safetensors_files.checksum_path(folder / WEIGHTS).unlink()  # among SHA256SUMS
    text = STABLEHLO_README.format(
        input=metadata["input"], platforms=", ".join(programs.PLATFORMS), jax=jax.__version__,
        version=programs.STABLEHLO_VERSION,
    )  # fmt: skip
    files.write_text(folder / "README.md", text)
    hub.write_sums(folder)
    return metadata


def call_stablehlo(folder: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    weights, _ = safetensors_files.load_safetensors(folder / WEIGHTS)
    return programs.call_stablehlo(folder / programs.PROGRAM, weights, images)["features"]


SAVED_MODEL_README = """# Encoder as SavedModel

```python
import tensorflow as tf

encode = tf.saved_model.load("FOLDER").signatures["{signature}"]
outputs = encode(images=images)  # {{"features": [B, C]}}
```

{input}. Written by jax {jax} in StableHLO {version} with TensorFlow {tensorflow}, in which the export called it once.
Whether another TensorFlow can read it shows at the first call, not when it is loaded.
"""


def write_saved_model(encoder: Any, variables: dict, folder: Path, about: About) -> dict[str, str]:
    metadata = metadata_of(encoder, about)
    programs.write_saved_model(encoder, variables, input_shape(encoder, about), folder)
    text = SAVED_MODEL_README.format(
        signature=programs.SIGNATURE, input=metadata["input"], jax=jax.__version__,
        version=programs.STABLEHLO_VERSION, tensorflow=programs.tensorflow().__version__,
    )  # fmt: skip
    files.write_text(folder / "README.md", text)
    files.write_text(folder / "metadata.json", json.dumps(metadata, indent=1) + "\n")
    hub.write_sums(folder)
    return metadata


def call_saved_model(folder: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    return programs.call_saved_model(folder, images)["features"]


def write_npz(encoder: Any, variables: dict, path: Path, about: About) -> dict[str, str]:
    metadata = npz.write(encoder, programs.flat(variables), path)
    write_checksum(path)
    return metadata


def call_npz(path: Path, images: np.ndarray, encoder: Encoder) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        _, variables = npz.read(dict(archive), {})
    return np.asarray(encoder.apply(variables, images, train=False)[0])


def write_checksum(path: Path) -> None:
    files.write_text(safetensors_files.checksum_path(path), f"{files.sha256(path)}  {path.name}\n")


def anything(encoder: Encoder) -> None:
    return None


IMAGES = (ResNet, SwinTransformer, VisionTransformer)
TIMM_FILE = Format(IMAGES, timm_problem, write_timm_file, call_timm_file, ("torch", "timm"), False)
FORMATS: dict[str, Format] = {
    "torchvision": Format(
        (ResNet, SwinTransformer), torchvision_problem, write_torchvision, call_torchvision,
        ("torch", "torchvision"), False,
    ),
    "timm": Format(
        IMAGES, timm_folder_problem, hub.write_timm,
        lambda path, images, encoder: hub.call_timm(path, normalised(images, encoder)), ("torch", "timm"), True,
    ),
    "huggingface": Format(
        IMAGES, hub.transformers_problem, hub.write_huggingface,
        lambda path, images, encoder: hub.call_transformers(path, normalised(images, encoder)),
        ("torch", "transformers"), True,
    ),
    "onnx": Format((*IMAGES, VdimEncoder), anything, write_onnx, call_onnx, ("onnxruntime",), False),
    "stablehlo": Format((*IMAGES, VdimEncoder), anything, write_stablehlo, call_stablehlo, ("jax",), True),
    "savedmodel": Format(
        (*IMAGES, VdimEncoder), anything, write_saved_model, call_saved_model, ("tensorflow",), True
    ),
    "npz": Format((*IMAGES, VdimEncoder), anything, write_npz, call_npz, ("numpy",), False),
}  # fmt: skip
