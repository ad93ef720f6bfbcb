"""The device mesh, and where arrays live on it."""
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vivi_jax.errors import ConfigError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One data-parallel axis over all devices of all processes.

    Auto axes: with JAX's default (Explicit) a product of two batch-sharded operands, as in every contrastive loss, is
    an error instead of a collective.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices, all others whole."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_sizes(batch_spec: dict[str, jax.ShapeDtypeStruct], micro_batches: int, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of rows in every micro-batch."""
    share = mesh.size * micro_batches
    for name, spec in batch_spec.items():
        rows = spec.shape[0]
        if rows <= 0 or rows % share:
            nearest = max(share, rows // share * share)
            raise ConfigError(
                f"{rows} rows of {name!r} in a batch do not divide over {mesh.size} device(s) x {micro_batches} "
                f"micro-batch(es); the nearest number that does is {nearest}: set the batch size in the config to it")
