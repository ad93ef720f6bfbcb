"""Whether a training state that several devices hold copies of is the same on all of them, bit for bit."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from vivi_jax.errors import CopiesDiffer


def check_alike(state, step: int) -> None:
    """Raises CopiesDiffer if a device's copy of an array, or of a part of one, has other bits than the others'.

    A step computes all copies alike, so a bit that flips in one device's memory, or a core that computes wrong, shows
    nowhere else: each device goes on with its own parameters. Reads every copy once, where it is; what travels are
    4 bytes per array and device. With several processes all must call it.

    Args:
      state: tree of arrays on one mesh (distributed/sharding.py).
      step: that it is the state of, for the message.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    if leaves[0].sharding.num_devices == 1:
        return
    mesh = leaves[0].sharding.mesh
    sums = _sums_of_bits(mesh, tuple(leaf.sharding.spec for leaf in leaves))(list(leaves))
    by_device = np.asarray(multihost_utils.process_allgather(sums, tiled=True))
    devices = list(mesh.devices.flat)
    for number, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        holders = collections.defaultdict(list)  # part of the array -> rows of by_device
        parts = leaf.sharding.devices_indices_map(leaf.shape)
        for row, device in enumerate(devices):
            holders[str(parts[device])].append(row)
        for rows in holders.values():
            values = by_device[rows, number].tolist()
            most, count = collections.Counter(values).most_common(1)[0]
            if count == len(rows):
                continue
            odd = [row for row, value in zip(rows, values, strict=True) if value != most]
            named = odd if count > len(odd) else rows  # of two that differ nobody knows which is right
            suspects = [f"{devices[row]} of process {devices[row].process_index}" for row in named[:4]]
            raise CopiesDiffer(
                f"after step {step} the copies of {jax.tree_util.keystr(path, simple=True, separator='.')} on the "
                f"{len(rows)} devices that hold it differ: look at {', '.join(suspects)}. "
                "A bit flipped in a memory, or a device computes wrong. Nothing of this step is saved; the same "
                "command goes on from the checkpoint before. Where it comes again, leave that device out"
            )


@functools.cache
def _sums_of_bits(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    """What gives, for the leaves of a state, uint32 [devices, leaves]: each device's own sum, whatever others hold."""

    # check_vma would take for granted that copies are alike. No sum over devices: the compiler may take it so as well.
    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(list(specs),),
        out_specs=PartitionSpec(tuple(mesh.axis_names)),
        check_vma=False,
    )
    def sums(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([_sum_of_bits(leaf) for leaf in leaves])[None]

    return sums


def _sum_of_bits(array: jax.Array) -> jax.Array:
    """uint32[]: sum of the elements' bits modulo 2^32, which each change of one of them changes."""
    bits = array if array.dtype == jnp.bool_ else array.view(f"uint{8 * array.dtype.itemsize}")
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
