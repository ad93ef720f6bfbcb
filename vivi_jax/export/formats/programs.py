"""Encoders as programs that need no code of ours: StableHLO for JAX, and TensorFlow's SavedModel of the same program.

The weights are arguments. One program serves batches of any size on CPU, CUDA, ROCm and TPU. It is written in an old
version of StableHLO: programs of jax 0.11 and newer are else beyond jax 0.10, and beyond every TensorFlow so far, which
both say only when the program is called.
"""

import dataclasses
import importlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxlib.mlir.dialects import stablehlo

from vivi_jax import files
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
STABLEHLO_VERSION = "1.9.0"
PROGRAM = "encoder.stablehlo"
SIGNATURE = "serving_default"


def flat(variables: dict) -> dict[str, np.ndarray]:
    """The variables by name: {"params/stem_conv/kernel": array}."""
    return {"/".join(path): np.asarray(leaf, np.float32) for path, leaf in flatten_dict(variables).items()}


def outputs(encoder: Encoder, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    """{"features": float32[B, C], and "logits" if there is a classifier} of float images in [0, 1]."""
    found: Any = encoder.apply(variables, images, train=False)
    pooled, maps = found
    return {"features": pooled} | {name: maps[name] for name in ("logits",) if name in maps}


def exported(encoder: Encoder, variables: dict, shape: tuple[int, ...]) -> export.Exported:
    """The program ({name: array}, images float32 [b, ...]) -> outputs.

    Args:
      shape: of the images; the first axis is of any length.
    """

    def program(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        tree = unflatten_dict({tuple(name.split("/")): array for name, array in weights.items()})
        return outputs(encoder, tree, images)

    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat(variables).items()}
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *shape[1:]), jnp.float32)
    made = export.export(jax.jit(program), platforms=PLATFORMS)(weights, images)
    portable = stablehlo.serialize_portable_artifact_str(made.mlir_module(), STABLEHLO_VERSION)
    return dataclasses.replace(made, mlir_module_serialized=portable)


def write_stablehlo(encoder: Encoder, variables: dict, shape: tuple[int, ...], path: files.Path) -> None:
    """Writes jax.export's file of the program."""
    files.write_bytes(path, bytes(exported(encoder, variables, shape).serialize()))


def call_stablehlo(program: files.Path, weights: dict[str, np.ndarray], images: np.ndarray) -> dict[str, Any]:
    """What a program makes of images."""
    loaded = export.deserialize(bytearray(pathlib.Path(program).read_bytes()))
    found: Any = loaded.call(weights, images)
    return found


def tensorflow() -> Any:
    """TensorFlow, which leaves accelerators alone.

    Raises:
      ConfigError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        tf = importlib.import_module("tensorflow")
    except ImportError:
        raise ConfigError("--format=savedmodel needs TensorFlow: pip install tensorflow-cpu") from None
    tf.config.set_visible_devices([], "GPU")
    return tf


def write_saved_model(encoder: Encoder, variables: dict, shape: tuple[int, ...], folder: files.Path) -> None:
    """Writes a SavedModel whose signature takes images float32 [b, ...] and gives the outputs by name."""
    tf = tensorflow()
    xla = importlib.import_module("tensorflow.compiler.tf2xla.python.xla")
    program, weights = exported(encoder, variables, shape), flat(variables)
    module = tf.Module()
    names = sorted(weights)  # the order in which a dict's leaves become arguments; those never read are left out
    kept = [name for number, name in enumerate(names) if number in program.module_kept_var_idx]
    module.weights = [tf.Variable(weights[name], trainable=False, name=name) for name in kept]
    results = sorted(jax.tree.unflatten(program.out_tree, program.out_avals).items())

    @tf.function(input_signature=[tf.TensorSpec((None, *shape[1:]), tf.float32, name="images")], autograph=False)
    def serve(images):
        found = xla.call_module(
            [*module.weights, images],
            version=program.calling_convention_version,
            module=program.mlir_module_serialized,
            Tout=[tf.float32] * len(results),
            Sout=[tf.TensorShape([None, *aval.shape[1:]]) for _, aval in results],
            platforms=[platform.upper() for platform in program.platforms],
            has_token_input_output=False,
            disabled_checks=[],
        )
        return {name: tensor for (name, _), tensor in zip(results, found, strict=True)}

    module.serve = serve
    tf.saved_model.save(module, os.fspath(folder), signatures={SIGNATURE: serve})


def call_saved_model(folder: files.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """What a SavedModel makes of images."""
    tf = tensorflow()
    loaded = tf.saved_model.load(os.fspath(folder))
    return {name: tensor.numpy() for name, tensor in loaded.signatures[SIGNATURE](images=tf.constant(images)).items()}
