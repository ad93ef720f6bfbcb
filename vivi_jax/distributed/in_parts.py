"""A step whose bits are the same on any number of devices: programs of one device each, run part by part.

Sums of rounded numbers depend on their order. A batch that is split over other devices is summed in another order, and
even the same rows are not computed alike: a compiler orders and joins operations by all that is in a program, and a
program for two devices is another one than that for one. So here all arithmetic is in programs of a single device,
which know nothing of the others; between them arrays are only moved. The batch has a fixed number of parts, consecutive
rows, and what is found of each is put together in the order of the parts.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError

Tree = Any  # nested dict of arrays
Step = Callable[[Tree, Tree], tuple[Tree, Tree]]


class Programs(NamedTuple):
    """What a step computes, as functions of arrays of one device.

    Attributes:
      embed: (state, rows of a part, its number int32[]) -> (their embeddings, statistics).
      cotangents: (state, labels of the batch, its embeddings) -> (the gradient by the embeddings, anything else).
      pull_back: (state, rows of a part, its number, the gradient by its embeddings) -> gradient by the parameters.
      update: (state, statistics of all parts [P, ...], gradients of all parts [P, ...], anything else) -> (state,
        metrics).
    """

    embed: Callable[[Tree, Tree, jax.Array], tuple[Tree, Tree]]
    cotangents: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    pull_back: Callable[[Tree, Tree, jax.Array, Tree], Tree]
    update: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]


class StepInParts(NamedTuple):
    """A step that is to be run in `parts` parts."""

    programs: Programs
    parts: int

    def on(self, mesh: Mesh, state: Tree, batch_spec: dict[str, jax.ShapeDtypeStruct], options: dict | None) -> Step:
        """Compiles the programs for this process's devices; returns what makes a step over those of all.

        Args:
          state: arrays, or their shapes.
          batch_spec: of the global batch. Its uint8 arrays are pixels, which the loss does not get.
          options: of the compiler.

        Raises:
          ConfigError: devices, parts and rows do not divide, or the state is to be in parts itself.
        """
        if mesh.shape["fsdp"] > 1:
            raise ConfigError(
                f"config.run.fsdp={mesh.shape['fsdp']}: with config.reproducible every device holds the whole state"
            )
        for name, spec in batch_spec.items():
            if self.parts % mesh.size or spec.shape[0] % self.parts:
                raise ConfigError(
                    f"config.reproducible={self.parts}: it must be a multiple of the {mesh.size} device(s), and a "
                    f"divisor of the {spec.shape[0]} rows of {name!r} in a batch"
                )
        return _StepOnMesh(self, mesh, state, batch_spec, options)


class _StepOnMesh:
    """Called with the state, whole on every device, and the batch, split over them."""

    def __init__(self, step: StepInParts, mesh: Mesh, state: Tree, batch_spec: dict, options: dict | None):
        self._mesh, self._parts, self._here = mesh, step.parts, step.parts // mesh.size
        self._labels = [name for name, spec in batch_spec.items() if spec.dtype != jnp.uint8]
        self._devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            of_device = functools.partial(
                _compile_for, step=step, state=state, batch_spec=batch_spec, labels=self._labels, options=options
            )
            self._compiled = list(pool.map(of_device, self._devices))
        order = list(mesh.devices.flat)
        self._numbers = [
            [jax.device_put(jnp.int32(order.index(device) * self._here + i), device) for i in range(self._here)]
            for device in self._devices
        ]
        self._everywhere = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        states = self._of_each_device(state)
        rows = [_in_parts(tree, self._here) for tree in self._of_each_device(batch)]
        devices = list(zip(self._compiled, states, rows, self._numbers, strict=True))

        embedded = [[run.embed(s, x, n) for x, n in zip(xs, ns, strict=True)] for run, s, xs, ns in devices]
        gathered = self._gather(embedded)
        labels = self._gather([[{name: x[name] for name in self._labels} for x in xs] for xs in rows])
        found = [
            run.cotangents(s, _joined(label), _joined(embeddings))
            for (run, s, _, _), label, (embeddings, _) in zip(devices, labels, gathered, strict=True)
        ]
        pulled = [
            [run.pull_back(s, x, n, _part(cotangents, self._parts, int(n))) for x, n in zip(xs, ns, strict=True)]
            for (run, s, xs, ns), (cotangents, _) in zip(devices, found, strict=True)
        ]
        updated = [
            run.update(s, statistics, gradients, rest)
            for (run, s, _, _), (_, statistics), gradients, (_, rest) in zip(
                devices, gathered, self._gather(pulled), found, strict=True
            )
        ]
        return self._whole(updated)

    def _of_each_device(self, tree: Tree) -> list[Tree]:
        """What each of this process's devices holds of the arrays."""
        leaves, structure = jax.tree.flatten(tree)
        held = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
        return [jax.tree.unflatten(structure, [data[device] for data in held]) for device in self._devices]

    def _gather(self, of_parts: list[list[Tree]]) -> list[Tree]:
        """Trees of each part, by device -> of each device: those of all parts of all devices, [P, ...]."""
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in of_parts]

        def of_all(*arrays: jax.Array) -> jax.Array:
            shape = (self._parts, *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding.batch_sharding(self._mesh), arrays)

        return self._of_each_device(self._everywhere(jax.tree.map(of_all, *stacked)))

    def _whole(self, trees: list[Tree]) -> Tree:
        """Arrays that every device has computed alike, as one that is whole on all."""

        def one(*arrays: jax.Array) -> jax.Array:
            return jax.make_array_from_single_device_arrays(arrays[0].shape, sharding.replicated(self._mesh), arrays)

        return jax.tree.map(one, *trees)


def _compile_for(
    device: Any, step: StepInParts, state: Tree, batch_spec: Tree, labels: list[str], options: dict | None
) -> Programs:
    """The four programs for one device: each device has its own, of the same text."""
    here = SingleDeviceSharding(device)

    def spec(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    def compiled(function: Callable, *arguments: Tree) -> tuple[Callable, Tree]:
        lowered = jax.jit(function).lower(*arguments)
        return lowered.compile(options), spec(lowered.out_info)

    def of_all(tree: Tree) -> Tree:
        return spec(jax.tree.map(lambda x: jax.ShapeDtypeStruct((step.parts, *x.shape), x.dtype), tree))

    def sized(tree: Tree, factor: float) -> Tree:
        return spec(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((int(x.shape[0] * factor), *x.shape[1:]), x.dtype), tree)
        )

    programs, state = step.programs, spec(state)
    rows, number = sized(batch_spec, 1 / step.parts), spec(jax.ShapeDtypeStruct((), jnp.int32))
    embed, (embeddings, statistics) = compiled(programs.embed, state, rows, number)
    cotangents, (_, rest) = compiled(
        programs.cotangents, state, spec({name: batch_spec[name] for name in labels}), sized(embeddings, step.parts)
    )
    pull_back, gradients = compiled(programs.pull_back, state, rows, number, embeddings)
    update, _ = compiled(programs.update, state, of_all(statistics), of_all(gradients), rest)
    return Programs(embed, cotangents, pull_back, update)


def _in_parts(tree: Tree, parts: int) -> list[Tree]:
    """Arrays [B, ...] -> for each of `parts` parts its arrays [B / parts, ...]."""
    return [_part(tree, parts, i) for i in range(parts)]


def _part(tree: Tree, parts: int, number: int) -> Tree:
    return jax.tree.map(lambda x: jnp.split(x, parts)[number], tree)


def _joined(tree: Tree) -> Tree:
    """[P, B / P, ...] -> [B, ...]"""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def sum_in_order(x: jax.Array) -> jax.Array:
    """x[0] + x[1] + ..., in this order, which a sum along an axis does not promise."""
    total = x[0]
    for part in x[1:]:
        total += part
    return total


def mean_in_order(x: jax.Array) -> jax.Array:
    """The mean along the first axis; of whole numbers, which all parts count alike, the first."""
    return sum_in_order(x) / len(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]
