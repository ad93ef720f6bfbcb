"""Folders as the Hugging Face Hub has them: for transformers, and for timm.

    model.safetensors  config.json  preprocessor_config.json  README.md (model card)  SHA256SUMS

Both libraries load from such a folder without a network. transformers fills what it does not find with random numbers
and only logs that it did: so the names are exactly those it looks for, and the export loads the folder once.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import pathlib
import re
import subprocess
from typing import Any

import numpy as np

from vivi_jax import files
from vivi_jax.checkpoint import state_sha256
from vivi_jax.errors import CheckpointError, ConfigError, DataError
from vivi_jax.export import resnet, swin, torch_names, vit
from vivi_jax.export.formats.npz import name_of
from vivi_jax.export.safetensors_files import ENCODER, SOURCE, save_safetensors
from vivi_jax.export.torch_names import encoder_json
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import DEPTHS, ResNet
from vivi_jax.models.swin import MLP_RATIO, SwinTransformer
from vivi_jax.models.vit import EPS, VisionTransformer

_LOG = logging.getLogger(__name__)
SUMS = "SHA256SUMS"
PAPERS = {  # by config.method.name
    "vito": "arXiv:2210.06433",
    "vivi": "arXiv:1912.02783",
    "vdim": "arXiv:2007.13278",
    "moco_v3": "arXiv:2104.02057",
}


@dataclasses.dataclass(frozen=True)
class About:
    """What an export is told beside the encoder.

    Attributes:
      image_size: pixels of a side, for formats of one size and for what is said of the input.
      source: the run directory or file of weights that the encoder is from; None: nothing is known.
      licence: of the weights, as the Hub spells it ("apache-2.0").
    """

    image_size: int = 224
    source: pathlib.Path | None = None
    licence: str = "unknown"

    def extra(self) -> dict[str, str]:
        """What of this goes into a file's metadata."""
        return {} if self.source is None else {SOURCE: self.source.resolve().name}


# ---- timm -----------------------------------------------------------------------------------------------------------


def timm_spec(encoder: Encoder) -> tuple[str, dict] | None:
    """timm's name of the model of this encoder, and its arguments; None: it has none of these sizes."""
    if isinstance(encoder, ResNet):
        return resnet.timm_spec(encoder)
    if isinstance(encoder, SwinTransformer):
        return swin.timm_spec(encoder)
    return vit.timm_spec(encoder) if isinstance(encoder, VisionTransformer) else None


def timm_problem(encoder: Encoder) -> str | None:
    """Why there is no folder of timm's for an encoder; None: there is."""
    if timm_spec(encoder) is None:
        return "has no model of these sizes (--out=NAME.safetensors writes its names alone)"
    return None


def write_timm(encoder: Encoder, variables: dict, folder: pathlib.Path, about: About) -> dict[str, str]:
    """Writes the folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads; returns the metadata."""
    if problem := timm_problem(encoder):
        raise ConfigError(f"format timm {problem}")
    spec = timm_spec(encoder)
    assert spec is not None
    architecture, arguments = spec
    write: dict[type, Any] = {
        ResNet: resnet.export_timm,
        SwinTransformer: swin.export_timm,
        VisionTransformer: vit.export_timm,
    }
    metadata = write[type(encoder)](encoder, variables, folder / "model.safetensors", about.extra())
    size = encoder.image_size if isinstance(encoder, VisionTransformer) else about.image_size
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": encoder.num_classes or 0,
        "pretrained_cfg": {
            "num_classes": encoder.num_classes or 0,
            "input_size": [3, size, size],
            "fixed_input_size": isinstance(encoder, VisionTransformer),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(encoder.input_mean),
            "std": list(encoder.input_std),
        },
    }
    if arguments:
        config["model_args"] = arguments
    files.write_json(folder / "config.json", config, indent=2)
    load = (
        'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)  # False leaves random weights'
        "\nfeatures = model(images)  # float [B, 3, H, W], normalised by input_mean and input_std"
    )
    finish(encoder, variables, folder, about, "timm", load)
    return metadata


# ---- transformers ---------------------------------------------------------------------------------------------------


def transformers_problem(encoder: Encoder) -> str | None:
    """Why transformers has no model that computes as an encoder does; None: it has one."""
    if not isinstance(encoder, ResNet):
        return None
    channels = round(64 * encoder.width)
    if encoder.padding != "torch":
        return "has no such encoder: its models pad symmetrically, this encoder has padding='same'"
    if encoder.stem != "imagenet":
        return "has no such encoder: its ResNets have the stem of ImageNet, this encoder stem='small'"
    kind = (encoder.version, encoder.norm, encoder.weight_standardization)
    if kind not in ((1, "batch", False), (2, "group", True)):
        return (
            "has no such encoder: its ResNets are v1 with BatchNorm, or v2 with GroupNorm and standardised kernels; "
            "this one has "
            f"version={kind[0]}, norm={kind[1]!r}, weight_standardization={kind[2]}"
        )
    if encoder.version == 2 and (not DEPTHS[encoder.depth][1] or channels % 32):
        return "has no such encoder: its BiT has bottlenecks (depth 50 or more), and channels that 32 divides"
    torch_names.check_architecture(resnet.TIMM_V1 if encoder.version == 1 else torch_names.TIMM, encoder)
    return None


def write_huggingface(encoder: Encoder, variables: dict, folder: pathlib.Path, about: About) -> dict[str, str]:
    """Writes the folder that transformers.AutoModel.from_pretrained(FOLDER) loads; returns the metadata.

    pooler_output is the pooled feature. A classifier is left out.

    Raises:
      ConfigError: transformers has no such model.
    """
    if problem := transformers_problem(encoder):
        raise ConfigError(f"format huggingface {problem}")
    encoder = encoder.clone(num_classes=None)
    params = {name: tree for name, tree in variables["params"].items() if name != "classifier"}
    variables = variables | {"params": params}
    writers: dict[type, Any] = {ResNet: hf_resnet, SwinTransformer: hf_swin, VisionTransformer: hf_vit}
    config, state = writers[type(encoder)](encoder, variables)
    metadata = {
        "format": "pt",
        "loads_into": f"transformers.{config['architectures'][0]}",
        ENCODER: encoder_json(name_of(encoder), encoder),
        "input_mean": json.dumps(encoder.input_mean),
        "input_std": json.dumps(encoder.input_std),
        **about.extra(),
    }
    save_safetensors(folder / "model.safetensors", state, metadata)
    (folder / "model.safetensors.sha256").unlink()  # it is among SHA256SUMS
    files.write_json(folder / "config.json", {**config, "torch_dtype": "float32"}, indent=2)
    size = encoder.image_size if isinstance(encoder, VisionTransformer) else about.image_size
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / 0.875)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.input_mean),
        "image_std": list(encoder.input_std),
    }
    files.write_json(folder / "preprocessor_config.json", processor, indent=2)
    load = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'model, processor = AutoModel.from_pretrained("FOLDER"), AutoImageProcessor.from_pretrained("FOLDER")\n'
        'features = model(**processor(images, return_tensors="pt")).pooler_output.flatten(1)'
    )
    finish(encoder, variables, folder, about, "transformers", load)
    return metadata


def hf_resnet(encoder: ResNet, variables: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, entries) of ResNetModel, or of BitModel."""
    blocks, bottleneck = DEPTHS[encoder.depth]
    channels = round(64 * encoder.width)
    sizes = [channels * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    common = {"num_channels": 3, "embedding_size": channels, "hidden_sizes": sizes, "depths": list(blocks)}
    if encoder.version == 1:
        state = torch_names.to_torch(resnet.TIMM_V1, encoder, variables)
        config = {
            "model_type": "resnet", "architectures": ["ResNetModel"], **common, "hidden_act": "relu",
            "layer_type": "bottleneck" if bottleneck else "basic", "downsample_in_bottleneck": False,
            "downsample_in_first_stage": False,
        }  # fmt: skip
        return config, {resnet_name(name): array for name, array in state.items()}
    state = torch_names.to_torch(torch_names.TIMM, encoder, variables)
    # Neither "global_padding" nor "embedding_dynamic_padding": both would make it another function.
    config = {
        "model_type": "bit", "architectures": ["BitModel"], **common, "hidden_act": "relu", "num_groups": 32,
        "layer_type": "preactivation", "output_stride": 32,
    }  # fmt: skip
    return config, {bit_name(name): array for name, array in state.items()}


def resnet_name(name: str) -> str:
    """layer2.0.bn1.weight -> encoder.stages.1.layers.0.layer.0.normalization.weight."""
    name = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    if not name.startswith("encoder."):
        stem = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
        return re.sub(r"^(conv1|bn1)", lambda m: stem[m[1]], name)
    name = name.replace("downsample.0.", "shortcut.convolution.").replace("downsample.1.", "shortcut.normalization.")
    name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
    return re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)


def bit_name(name: str) -> str:
    """stages.0.blocks.1.conv1.weight -> encoder.stages.0.layers.1.conv1.weight."""
    name = re.sub(r"^stages\.(\d)\.blocks\.", r"encoder.stages.\1.layers.", name)
    return name.replace("stem.conv.", "embedder.convolution.")


def qkv(name: str, array: np.ndarray, places: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """The three parts of an entry of queries, keys and values."""
    parts = np.split(array, 3)
    return {name.replace("attn.qkv", place): part.copy() for place, part in zip(places, parts, strict=True)}


ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
SWIN_ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value")


def hf_swin(encoder: SwinTransformer, variables: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, entries) of SwinModel."""
    found = swin.to_state(swin.TORCHVISION, encoder.clone(num_classes=1), with_classifier(variables, 8 * encoder.width))
    state: dict[str, np.ndarray] = {}
    for name, array in found.items():
        if name.startswith("head."):
            continue
        name = re.sub(
            r"^features\.(\d)\.(\d+)\.",
            lambda m: f"encoder.layers.{int(m[1]) // 2}.blocks.{m[2]}." if int(m[1]) % 2 else m[0],
            name,
        )
        name = re.sub(r"^features\.(2|4|6)\.", lambda m: f"encoder.layers.{int(m[1]) // 2 - 1}.downsample.", name)
        name = name.replace("features.0.0.", "embeddings.patch_embeddings.projection.")
        name = name.replace("features.0.2.", "embeddings.norm.").replace("mlp.0.", "intermediate.dense.")
        name = name.replace("mlp.3.", "output.dense.").replace("attn.proj.", "attention.output.dense.")
        name = re.sub(r"\.norm1\.", ".layernorm_before.", name)
        name = re.sub(r"\.norm2\.", ".layernorm_after.", name)
        name = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            state |= qkv(name, array, SWIN_ATTENTION)
        elif name.endswith(swin.INDEX):
            side = encoder.window**2
            state[name.replace("attn.", "attention.self.")] = array.reshape(side, side)
        else:
            state[name.replace("attn.", "attention.self.")] = array
    config = {
        "model_type": "swin", "architectures": ["SwinModel"], "image_size": 224, "patch_size": encoder.patch,
        "num_channels": 3, "embed_dim": encoder.width, "depths": list(encoder.depths),
        "num_heads": list(encoder.heads), "window_size": encoder.window, "mlp_ratio": float(MLP_RATIO),
        "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_absolute_embeddings": False,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
    }  # fmt: skip
    return config, state


def with_classifier(variables: dict, width: int) -> dict:
    """With a classifier of one class, so that a library's names of the rest need not be told apart from a new one's."""
    zeros = {"kernel": np.zeros((width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    return variables | {"params": variables["params"] | {"classifier": zeros}}


def hf_vit(encoder: VisionTransformer, variables: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, entries) of ViTModel, whose pooler is the identity: pooler_output is the class token."""
    state: dict[str, np.ndarray] = {}
    for name, array in vit.timm_state(encoder, variables).items():
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        name = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(name, name)
        name = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace("mlp.fc1.", "intermediate.dense.").replace("mlp.fc2.", "output.dense.")
        name = name.replace("attn.proj.", "attention.output.dense.")
        state |= qkv(name, array, ATTENTION) if "attn.qkv" in name else {name: array}
    state["pooler.dense.weight"] = np.eye(encoder.width, dtype=np.float32)
    state["pooler.dense.bias"] = np.zeros(encoder.width, np.float32)
    config = {
        "model_type": "vit", "architectures": ["ViTModel"], "image_size": encoder.image_size,
        "patch_size": encoder.patch, "num_channels": 3, "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "intermediate_size": 4 * encoder.width, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": EPS,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_act": "linear",
        "pooler_output_size": encoder.width,
    }  # fmt: skip
    return config, state


# ---- The model card -------------------------------------------------------------------------------------------------


def finish(encoder: Encoder, variables: dict, folder: pathlib.Path, about: About, library: str, load: str) -> None:
    """Writes the card, and the hashes of all files."""
    (folder / "model.safetensors.sha256").unlink(missing_ok=True)  # among SHA256SUMS
    files.write_text(folder / "README.md", card(encoder, variables, about, library, load))
    write_sums(folder)


def write_sums(folder: pathlib.Path) -> None:
    """SHA256SUMS of all files of a folder: `sha256sum -c SHA256SUMS` compares them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{files.sha256(path)}  {path.relative_to(folder)}\n" for path in paths]
    files.write_text(folder / SUMS, "".join(lines))


def card(encoder: Encoder, variables: dict, about: About, library: str, load: str) -> str:
    """A model card in the Hub's form, of what the run's files say; what they do not say is not in it."""
    facts = {
        "encoder": encoder_json(name_of(encoder), encoder),
        "input": f"RGB in [0, 1], normalised by mean {list(encoder.input_mean)} and std {list(encoder.input_std)}",
        "image size": f"{about.image_size} pixels",
        "sha256 of the parameters": state_sha256(variables),
        "exported by": f"vivi_jax {importlib.metadata.version('vivi_jax')}, commit {commit()}",
    }
    if about.source is not None:
        facts |= facts_of(about.source)
    rows = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    return f"""---
license: {about.licence}
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- vivi_jax
- self-supervised
- video
---

# {facts.get("config", type(encoder).__name__)}

An image encoder from vivi_jax. Licence of the weights: {about.licence}.

```python
{load}
```

| What | Value |
| --- | --- |
{rows}
"""


def facts_of(source: pathlib.Path) -> dict[str, Any]:
    """What the files of a run say of it, and its last scores; of a file of weights its name and hash."""
    if source.is_file():
        return {"from the file": source.name, "sha256 of the file": files.sha256(source)}
    facts: dict[str, Any] = {}
    config = read_json(source / "config.json")
    if config:
        data = config.get("data", {})
        digests = {k.partition("=")[0]: digest for k, digest in read_json(source / "data.json").items()}
        digest = digests.get("config.data.path")
        facts |= {
            "config": config.get("name"),
            "trained on": pathlib.Path(str(data.get("path") or data.get("source") or "unknown")).name
            + (f" (its content has the digest {digest})" if digest else ""),
            "batch size": config.get("batch_size"),
            "seed": config.get("seed"),
        }
        if paper := PAPERS.get(config.get("method", {}).get("name")):
            facts["paper"] = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
        facts |= {f"config.{part}": json.dumps(config[part]) for part in ("method", "schedule") if part in config}
    summary = read_json(source / "summary.json")
    facts |= {name: summary[name] for name in ("step", "state_sha256") if name in summary}
    scores: dict[str, Any] = {}
    try:
        lines = files.read_json_lines(source / "metrics.jsonl", keys=("step",))
    except DataError as error:  # the weights are good all the same
        _LOG.warning("%s; the card is written without scores", error)
        lines = []
    for line in lines:
        scores |= {name: (line[name], line.get("step")) for name in ("knn_top1", "linear_top1", "loss") if name in line}
    return facts | {name: f"{value:.4g} at step {step}" for name, (value, step) in scores.items()}


def commit() -> str:
    """The commit of this code, with a "+" where files differ from it; "unknown" outside a git checkout."""
    here = pathlib.Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return described.stdout.strip() or "unknown"


def read_json(path: pathlib.Path) -> dict:
    """A file's JSON object; {} without the file.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


# ---- Loaded once ----------------------------------------------------------------------------------------------------


def call_transformers(folder: pathlib.Path, normalised_BxHxWx3: np.ndarray) -> np.ndarray:
    """pooler_output [B, C] of the folder's model.

    Raises:
      CheckpointError: the report of its loading names entries that are missing, left over or of another shape.
    """
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(str(folder), output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(level)
    if wrong := {name: sorted(map(str, entries))[:3] for name, entries in report.items() if entries}:
        raise CheckpointError(f"transformers {transformers.__version__} does not find its entries in {folder}: {wrong}")
    transformers.AutoImageProcessor.from_pretrained(str(folder))
    with torch.no_grad():
        images = torch.from_numpy(np.ascontiguousarray(normalised_BxHxWx3.transpose(0, 3, 1, 2)))
        return model.eval()(pixel_values=images).pooler_output.flatten(1).numpy()


def call_timm(folder: pathlib.Path, normalised_BxHxWx3: np.ndarray) -> np.ndarray:
    """Pooled features [B, C] of the folder's model."""
    timm = importlib.import_module("timm")
    torch = importlib.import_module("torch")

    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    with torch.no_grad():
        images = torch.from_numpy(np.ascontiguousarray(normalised_BxHxWx3.transpose(0, 3, 1, 2)))
        return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1).numpy()
