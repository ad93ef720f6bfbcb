"""Run directories of the protocols that train: what they were begun for, and pretrained weights as their first step."""

import contextlib
import json
import pathlib

import jax

from vivi_jax import checkpoint
from vivi_jax.build import Experiment
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.train_step import TrainState, create


def write_first_checkpoint(
    experiment: Experiment, directory: pathlib.Path, pretrained: dict, *, seed: int, keep: int
) -> None:
    """Step 0 of a new run is a checkpoint with the pretrained weights in it; train() goes on from there."""
    if checkpoint.newest_good_step(directory / "checkpoints") is not None:
        return
    mesh = sharding.make_mesh()
    state = jax.jit(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, seed))()
    params, model_state = with_pretrained(state.params, state.model_state, pretrained)
    state = jax.device_put(
        TrainState(state.step, params, model_state, state.target, state.opt_state), sharding.replicated(mesh)
    )
    with contextlib.closing(Checkpoints(str(directory), keep=keep)) as checkpoints:
        checkpoints.restore(state, mesh)  # there is none; moves aside what an interrupted start left
        checkpoints.save(0, state)


def with_pretrained(params: dict, model_state: dict, pretrained: dict) -> tuple[dict, dict]:
    """Puts pretrained {"params": {part: tree}, "batch_stats": {part: tree}} over random ones.

    Parts are the encoder and phi; leaves that only the checkpoint has (an image classifier, say) are left out.

    Raises:
      CheckpointError: a leaf is missing or has another shape.
    """

    def overwrite(tree: dict, loaded: dict, where: str) -> dict:
        def leaf(path, old):
            new = loaded
            for entry in path:
                new = new.get(entry.key) if isinstance(new, dict) else None
            if new is None or new.shape != old.shape:
                raise CheckpointError(
                    f"{where}{jax.tree_util.keystr(path)} has the shape {old.shape} here and "
                    f"{'is missing' if new is None else new.shape} in the checkpoint"
                )
            return new

        return {
            **tree,
            **{
                part: jax.tree_util.tree_map_with_path(leaf, {part: tree[part]})[part]
                for part in loaded
                if part in tree
            },
        }

    params = overwrite(params, pretrained.get("params", {}), "params")
    statistics = pretrained.get("batch_stats", {})
    return params, {name: overwrite(tree, statistics, name) for name, tree in model_state.items()}


def config_identity(config) -> dict:
    """What decides the result; config.run does not."""
    return {key: value for key, value in json.loads(config.to_json()).items() if key != "run"}


def claim(directory: pathlib.Path, identity: dict) -> None:
    """Notes in a new folder what it is for; refuses one that was begun for something else."""
    path = directory / "evaluation.json"
    if path.exists():
        there = json.loads(path.read_text())
        flat = [{**tree, **tree["config"], "config": None} for tree in (there, identity)]
        if different := [
            f"{key}: {flat[0].get(key)!r} there, {flat[1].get(key)!r} here"
            for key in sorted(flat[0] | flat[1])
            if flat[0].get(key) != flat[1].get(key)
        ]:
            raise ConfigError(
                f"{directory} was begun with other values ({'; '.join(different)}); use another --workdir"
            )
    elif jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(identity, indent=1) + "\n")


def write(path: pathlib.Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.rename(path)
