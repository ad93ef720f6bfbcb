"""The device mesh, and where arrays live on it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vivi_jax.errors import ConfigError

# Smaller arrays (in numbers) stay whole on every device: gathering them would cost more than the memory they take.
SMALLEST_SHARDED = 2**14


def make_mesh(devices: Sequence | None = None, fsdp: int = 1) -> Mesh:
    """All devices of all processes, as copies of the training state ("data") x parts of one copy ("fsdp").

    The batch is split over both axes. Devices are ordered by process, so that each process holds the rows which its
    input pipeline produced, and the parts of a copy are near each other. Auto axes: with JAX's default (Explicit) a
    product of two batch-sharded operands, as in every contrastive loss, is an error instead of a collective.

    Args:
      devices: of jax.devices(); None: all.
      fsdp: devices that share one copy of the state.

    Raises:
      ConfigError: the devices do not divide into copies of `fsdp` parts.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(devices) % fsdp:
        raise ConfigError(
            f"config.run.fsdp={fsdp} does not divide the {len(devices)} device(s): set it to 1 (the "
            "state whole on every device) or to a divisor"
        )
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices, all others whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(state, mesh: Mesh):
    """A sharding for every array of a training state (or of its shapes).

    Whole on every device if the mesh's "fsdp" axis is 1. Otherwise each large array, of parameters, optimizer or
    target alike, is split along its longest axis that divides.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
        if parts == 1 or not axes or math.prod(leaf.shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, state)


def replicate_params(tree):
    """Inside a step: gathers the arrays of a state that is split over devices; nothing to do where it is whole.

    Without it the compiler may split layers over the channels of their kernels, and then send activations instead.
    """
    mesh = jax.sharding.get_abstract_mesh()  # train.compile_step sets it
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def check_batch_sizes(batch_spec: dict[str, jax.ShapeDtypeStruct], micro_batches: int, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of rows in every micro-batch."""
    share = mesh.size * micro_batches
    for name, spec in batch_spec.items():
        rows = spec.shape[0]
        if rows <= 0 or rows % share:
            nearest = max(share, rows // share * share)
            raise ConfigError(
                f"{rows} rows of {name!r} in a batch do not divide over {mesh.size} device(s) x {micro_batches} "
                f"micro-batch(es); the nearest number that does is {nearest}: set the batch size in the config to it"
            )
