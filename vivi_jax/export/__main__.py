"""Writes a pretrained encoder in the form that other people's code reads, and tries it there before it says so.

    python -m vivi_jax.export --checkpoint=RUN --format=torchvision --out=FILE.safetensors     ResNet v1, Swin
    python -m vivi_jax.export --checkpoint=RUN --format=timm --out=FOLDER                      what timm has
    python -m vivi_jax.export --checkpoint=RUN --format=huggingface --out=FOLDER --licence=cc-by-4.0
    python -m vivi_jax.export --checkpoint=RUN --format=onnx --out=FILE.onnx                   any encoder
    python -m vivi_jax.export --checkpoint=RUN --format=stablehlo --out=FOLDER                 or savedmodel, or npz

What loads each, and what differs, is in docs/exports.md. RUN may also be a file of weights from elsewhere
(docs/weights.md). `--format=timm --out=FILE.safetensors` writes the file alone.

Encoders here normalise their input themselves; the models of torchvision, timm and transformers do not: input_mean and
input_std are in the file's metadata, and in the folders' configs.
"""

import argparse
import pathlib

from vivi_jax import checkpoint, command_line
from vivi_jax.buckets.local import written
from vivi_jax.errors import ConfigError
from vivi_jax.export import FORMATS, About, is_weight_file, load_encoder, save
from vivi_jax.export.pretrained import EXPORT_IMAGE_SIZE
from vivi_jax.models import build_encoder


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("vivi_jax.export", __doc__)
    parser.add_argument(
        "--checkpoint",
        "--workdir",
        required=True,
        help="run directory, whose newest good checkpoint is exported, or file of weights",
    )
    parser.add_argument("--format", default="torchvision", choices=sorted(FORMATS))
    parser.add_argument(
        "--out", required=True, help="file or folder to write, also in a bucket; an earlier export is replaced"
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help=f"pixels of a side: of onnx, stablehlo and savedmodel, which take one size; by default what the run was "
        f"trained at, or {EXPORT_IMAGE_SIZE} for a file",
    )
    parser.add_argument("--licence", default="unknown", help="of the weights, for the model card: apache-2.0, ...")
    command_line.run_parser(export, parser, argv, remote=["checkpoint", "out"])


def export(options: argparse.Namespace) -> None:
    """Writes the export, and says what is in it and how it was tried."""
    options.checkpoint = checkpoint.local_copy(options.checkpoint)
    of_file = is_weight_file(options.checkpoint)
    config, variables = (load_encoder if of_file else checkpoint.load_encoder)(options.checkpoint)
    size = options.image_size
    if size is None:
        size = EXPORT_IMAGE_SIZE if of_file else checkpoint.load_config(options.checkpoint)["data"]["image_size"]
    if size < 1:
        raise ConfigError(f"--image_size={size}: must be 1 or more")
    about = About(size, pathlib.Path(options.checkpoint), options.licence)
    with written(options.out) as out:
        metadata, tried = save(options.format, build_encoder(**config), variables, out, about)
        beside = "" if pathlib.Path(out).is_dir() else f" and {options.out}.sha256"
    print(f"wrote {options.out}{beside}")
    for key, value in metadata.items():
        print(f"  {key}: {value}")
    print(tried)


if __name__ == "__main__":
    main()
