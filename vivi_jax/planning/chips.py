"""Data sheets of accelerators, per device as JAX counts them (a core of TPU v3, else a chip), and topologies."""

import dataclasses
import math

from vivi_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device; decimal units."""

    flops: float  # bfloat16, per second
    memory: float  # bytes
    bandwidth: float  # bytes/s to memory
    links: float  # bytes/s to other devices, one way, all links of the device together
    clock: float  # Hz of the unit in which the TPU compiler counts cycles; 0: the compiler gives none
    devices_per_chip: int = 1
    compiled_as: str = "default"  # the TPU compiler's name of how the cores of a chip form devices


# Sources: flops, memory and bandwidth, docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, per chip; links, jax-ml
# "How to Scale Your Model", chapter on TPUs (one way per link: 100, 45, 45, 90, 90 GB/s; 4 links in a plane, 6 in
# space); clock, v3 and v4 Jouppi et al. 2023 (arXiv:2304.01433) table 4, the others peak / (2 x multipliers of the
# matrix units). GPUs: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and H200 SXM, dense bfloat16, NVLink one way.
CHIPS = {
    "v3": Chip(flops=61.5e12, memory=16 * 2**30, bandwidth=450e9, links=200e9, clock=940e6, devices_per_chip=2),
    "v4": Chip(flops=275e12, memory=32 * 2**30, bandwidth=1200e9, links=270e9, clock=1050e6, compiled_as="megacore"),
    "v5e": Chip(flops=197e12, memory=16 * 2**30, bandwidth=819e9, links=180e9, clock=1503e6),
    "v5p": Chip(flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=540e9, clock=1751e6),
    "v6e": Chip(flops=918e12, memory=32 * 2**30, bandwidth=1640e9, links=360e9, clock=1751e6),
    "a100": Chip(flops=312e12, memory=80e9, bandwidth=2039e9, links=300e9, clock=0),
    "h100": Chip(flops=989e12, memory=80e9, bandwidth=3350e9, links=450e9, clock=0),
    "h200": Chip(flops=989e12, memory=141e9, bandwidth=4800e9, links=450e9, clock=0),
}
GPUS = ("a100", "h100", "h200")
# Seconds a message needs to the next chip ("How to Scale Your Model": about 1 us), and between GPUs (assumed: 10 us).
HOP_SECONDS, GPU_SECONDS = 1e-6, 10e-6
_PLANES = "2x2 2x4 4x4 4x8 8x8 8x16 16x16"
TOPOLOGIES = {  # generation -> shapes in chips, as the TPU compiler and Google Cloud name them
    "v3": "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32".split(),
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split(),
    "v5e": _PLANES.split(),
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split(),
    "v6e": _PLANES.split(),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str  # as given
    chip: Chip
    devices: int
    shape: tuple[int, ...]  # in chips; (devices,) for GPUs

    @property
    def is_tpu(self) -> bool:
        return self.chip.clock > 0

    def message_seconds(self, extent: tuple[int, ...]) -> float:
        """Lower bound on the latency of an all-to-all within a box of `extent` chips along each axis, in seconds.

        Along an axis that the box spans, messages go half way round the ring; along others from end to end. (A
        plane has a third axis of 1.)
        """
        if not self.is_tpu:
            return GPU_SECONDS
        return HOP_SECONDS * sum(n // 2 if n == whole else n - 1 for n, whole in zip(extent, self.shape, strict=False))


def parse_topology(name: str) -> Topology:
    """ "v3:8x8" (chips) or "gpu:h100x8" (devices) -> Topology.

    Raises:
      ConfigError: there is no such topology; the message has those there are.
    """
    kind, _, shape = name.partition(":")
    if kind == "gpu":
        gpu, _, count = shape.rpartition("x")
        if gpu in GPUS and count.isdigit() and int(count) > 0:
            return Topology(name, CHIPS[gpu], int(count), (int(count),))
    elif shape in TOPOLOGIES.get(kind, ()):
        sizes = tuple(map(int, shape.split("x")))
        return Topology(name, CHIPS[kind], math.prod(sizes) * CHIPS[kind].devices_per_chip, sizes)
    known = TOPOLOGIES.get(kind)
    if known:
        raise ConfigError(f"--topology={name!r} does not exist; {kind} has {', '.join(known)} (chips)")
    ranges = ", ".join(f"{generation}:{shapes[0]} to {shapes[-1]}" for generation, shapes in TOPOLOGIES.items())
    raise ConfigError(
        f"--topology={name!r} does not exist; there are {ranges} (chips), and gpu:NAMExN with NAME one "
        f"of {', '.join(GPUS)}"
    )
