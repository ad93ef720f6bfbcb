"""Writes a pretrained encoder under the names other people's code knows, and reads such files back.

    python -m vivi_jax.export --checkpoint=RUN --format=torchvision --out=FILE.safetensors     ResNet v1 (VITO)
    python -m vivi_jax.export --checkpoint=RUN --format=timm --out=FILE.safetensors            ResNet v2 (VIVI)

and, where torch and torchvision or timm are:

    model = torchvision.models.resnet50()
    model = timm.create_model("resnetv2_50x1_bit", num_classes=0)  # what to call is printed, and in the file's metadata
    model.load_state_dict(safetensors.torch.load_file("FILE.safetensors"))

The file loads strictly where the library has the model (torch_names.py). torchvision's always has a classifier: an
encoder without one gets an `fc` of zeros for 1000 classes. timm's does without, by num_classes=0. The encoder here
normalises its input itself, theirs do not: input_mean and input_std are in the file's metadata.

timm's BiT models add 1e-8 to the variance of a kernel, ours 1e-10 as BiT's own code; on kernels of the usual size (1e-3
and more) features agree to 1e-4. timm's plain resnetv2_50 pads its max-pool with -inf and ours, as VIVI's code, with
zeros: it must be built with stem_type="fixed", which is in the metadata too.

Swin transformers go into both formats. RUN may also be a file of weights from elsewhere (docs/weights.md).

FILE.safetensors.sha256 lies beside it (`sha256sum -c` reads it), because safetensors does not notice flipped bits.
"""

import argparse

from vivi_jax import checkpoint, command_line
from vivi_jax.errors import ConfigError
from vivi_jax.export import EXPORTERS, export_encoder, is_weight_file, load_encoder
from vivi_jax.models import build_encoder


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("vivi_jax.export", __doc__)
    parser.add_argument(
        "--checkpoint",
        "--workdir",
        required=True,
        help="run directory, whose newest good checkpoint is exported, or file of weights",
    )
    parser.add_argument("--format", default="torchvision", choices=sorted(EXPORTERS))
    parser.add_argument("--out", required=True, help="file to write, usually NAME.safetensors")
    command_line.run_parser(export, parser, argv)


def export(options: argparse.Namespace) -> None:
    """Writes the file and says what is in it."""
    load = load_encoder if is_weight_file(options.checkpoint) else checkpoint.load_encoder
    config, variables = load(options.checkpoint)
    try:
        metadata = export_encoder(options.format, build_encoder(**config), variables, options.out)
    except OSError as error:
        raise ConfigError(f"cannot write {options.out}: {error}") from error
    print(f"wrote {options.out} and {options.out}.sha256")
    for key, value in metadata.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
