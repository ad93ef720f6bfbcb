"""Is a step in PyTorch the same work as ours? Asked before the two are timed: parameters, outputs and FLOPs."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

SEED = 0
NOT_TIMED = "not the same work, so not timed: "
# PyTorch counts products with padding, the more the smaller the maps: the second is for images of a few dozen pixels.
FLOPS_TOLERANCE, QUICK_FLOPS_TOLERANCE = 0.1, 0.6


class OurStep(NamedTuple):
    """A step and the shapes (jax.ShapeDtypeStruct) that it takes."""

    step: Callable  # (state, batch) -> (state, metrics with "loss")
    state: Any
    batch: dict
    params: Any  # those that are trained, out of `state`
    outputs: dict  # name -> shape, what the loss sees


def our_method_step(config: ml_collections.ConfigDict) -> tuple[OurStep, Any]:
    """The step, and the method."""
    import jax

    from vivi_jax.build import build
    from vivi_jax.train_step import create, example_keys

    experiment = build(config)
    method, batch = experiment.method, dict(experiment.batch_spec)
    state = jax.eval_shape(lambda: create(method, experiment.optimizer, batch, SEED))

    def embed(state, batch):
        keys = example_keys(SEED, state.step, batch)
        return method.embed(state.params, state.model_state, state.target, batch, keys)[0]

    outputs = {
        ".".join(str(entry.key) for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(embed, state, batch))
    }
    return OurStep(experiment.train_step, state, batch, state.params, outputs), method


def of_ours(ours: OurStep) -> dict:
    """{"parameters", "outputs", "flops_per_step"}; FLOPs are the compiler's count before it optimises."""
    import jax

    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours.params)),
        "outputs": {name: list(shape) for name, shape in ours.outputs.items()},
        "flops_per_step": jax.jit(ours.step).lower(ours.state, ours.batch).cost_analysis()["flops"],
    }


def of_peer(step, inputs: tuple) -> dict:
    """The same of a torch_step.TorchStep, which takes two steps' forward passes and one backward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        outputs = {name: list(z.shape) for name, z in _flat(step.embed(*inputs)).items()}
    with FlopCounterMode(display=False) as counter:
        step(*inputs)
    return {"parameters": step.parameters(), "outputs": outputs, "flops_per_step": counter.get_total_flops()}


def check(ours: dict, theirs: dict, quick: bool) -> None:
    """Ends the process with one line unless the peer has our parameters, outputs and, within the tolerance, FLOPs."""
    for name in ("parameters", "outputs"):
        if theirs[name] != ours[name]:
            sys.exit(f"{NOT_TIMED}{name} {theirs[name]}, ours are {ours[name]}")
    flops, tolerance = theirs["flops_per_step"], QUICK_FLOPS_TOLERANCE if quick else FLOPS_TOLERANCE
    if abs(flops / ours["flops_per_step"] - 1) > tolerance:
        sys.exit(f"{NOT_TIMED}{flops:.3g} FLOPs a step, ours has {ours['flops_per_step']:.3g}")


def _flat(outputs: dict, prefix: str = "") -> dict:
    """{"view1": {"global": z}} -> {"view1.global": z}."""
    found = {}
    for name, value in outputs.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
