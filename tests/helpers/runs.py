"""Run directories: as training leaves them, and the flags of a training of seconds."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from configs import vito
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.rendered.shapes import write_videos
from vivi_jax import checkpoint
from vivi_jax.build import build
from vivi_jax.train_step import create

STEPS, CHECKPOINT_EVERY = 120, 7
SMALL = [
    "--config.batch_size=8",
    "--config.data.image_size=32",
    "--config.encoder.width=0.125",
    "--config.method.projector_hidden=16",
    "--config.method.attention_hidden=8",
    "--config.run.log_every=1",
    f"--config.run.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.schedule.examples_per_epoch=8",
    f"--config.schedule.epochs={STEPS}.0",
]


def small_vito(store, workdir) -> list[str]:
    """Flags of vivi_jax.main: a VITO of few channels that takes STEPS steps on a store."""
    return ["--config=configs/vito.py:demo,views=2", f"--workdir={workdir}", f"--config.data.path={store}", *SMALL]


def logged_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the whole lines of metrics.jsonl, in their order."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def make_run(directory: pathlib.Path, variant: str, **data) -> pathlib.Path:
    """A run directory as training leaves it, at step 7, of a network of a few channels with random weights."""
    config = vito.get_config(variant)
    config.encoder.width = 0.0625
    config.data.update(dict(image_size=32) | data)
    return write_run(directory, config)


def write_run(directory: pathlib.Path, config) -> pathlib.Path:
    """A run directory of any config, at step 7, with random weights: without the time that initialising compiles."""
    experiment = build(config)
    shapes = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        plain = re.search(r"(var|scale)..$", jax.tree_util.keystr(path))  # 1 keeps activations about as they are
        return jnp.asarray(np.ones(leaf.shape) if plain else rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    state = jax.tree_util.tree_map_with_path(value, shapes).replace(step=jnp.int32(7))
    checkpoints = checkpoint.Checkpoints(str(directory), keep=1)
    checkpoints.save(7, state)
    checkpoints.close()
    (directory / "config.json").write_text(config.to_json())
    return directory


def make_store(directory: pathlib.Path, videos: int = 8) -> pathlib.Path:
    """Frame stores train/ (of 8 videos 6) and test/ (2) of two classes, from rendered videos."""
    folder = directory / "videos"
    write_videos(folder, videos=videos, seed=0, size=32, seconds=1.2, classes=("ring", "star"), workers=1)
    for split in ("train", "test"):
        prepare(
            str(folder / split), str(directory / "store" / split), Settings(short_side=32), labels="folder", workers=1
        )
    return directory / "store"
