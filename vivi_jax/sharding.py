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


def check_batch_size(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of examples in every micro-batch."""
    share = mesh.size * micro_batches
    if batch_size <= 0 or batch_size % share:
        nearest = max(share, batch_size // share * share)
        raise ConfigError(
            f"config.batch_size={batch_size} does not divide over {mesh.size} device(s) x {micro_batches} "
            f"micro-batch(es); the nearest that does is {nearest}")
