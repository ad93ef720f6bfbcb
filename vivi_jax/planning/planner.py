"""Compiles the step of a config for hardware that is not at hand, and reads what it needs from the program."""

import dataclasses
import importlib.util
import os
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # before JAX, which would ask the metadata server of a TPU VM

import jax
import jax.numpy as jnp
import numpy as np

from vivi_jax.build import Experiment, build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.loop import compile_step
from vivi_jax.methods.base import HasTraffic
from vivi_jax.metrics import duration
from vivi_jax.planning import chips, hlo, work
from vivi_jax.train_step import create, example_keys


def plan(config, topology_name: str) -> dict:
    """The plan of one config on one topology, as JSON values.

    Raises:
      ConfigError: no such topology, a batch that does not divide, or no TPU compiler.
    """
    topology = chips.parse_topology(topology_name)
    if config.get("reproducible"):
        raise ConfigError(
            f"config.reproducible={config.reproducible}: its step is several programs, a plan is of one; set it to 0"
        )
    experiment = build(config)
    mesh = sharding.make_mesh(devices(topology), fsdp=config.run.fsdp)
    sharding.check_batch_sizes(experiment.batch_spec, config.micro_batches, mesh)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, config.seed))
    result = {"config": config.name, **compile_for(topology, mesh, experiment, state)}
    if "memory" in result:
        result["collective_bytes_minimum"] = minimum_bytes(config, experiment, state, topology.devices)
    return result


def compile_for(topology: chips.Topology, mesh: jax.sharding.Mesh, experiment: Experiment, state) -> dict:
    """Compiles a step over the topology's devices: what it needs, and estimates of its time. Without "memory" and all
    that follows it where the compiler itself refuses a program too large."""
    rows = next(iter(experiment.batch_spec.values())).shape[0]
    result = {
        "topology": topology.name,
        "devices": topology.devices,
        "batch": rows,
        "compiler": "TPU" if topology.is_tpu else "CPU, simulated devices",
    }
    start = time.perf_counter()
    try:
        compiled = compile_step(experiment, state, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {
            "fits": False,
            "compiler_says": " ".join(str(error).split())[:300],
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
    result["compile_seconds"] = round(time.perf_counter() - start, 1)
    compiled_text = compiled.as_text()
    program, cost, repeated = hlo.read(compiled_text), compiled.cost_analysis(), work.of_repetitions(compiled_text)
    result |= memory(compiled, topology.chip) | {
        "flops": cost["flops"] + repeated.flops,
        "bytes_accessed": cost["bytes accessed"] + repeated.bytes,
        "collectives": [dataclasses.asdict(collective) for collective in program.collectives],
        "collective_bytes": sum(collective.bytes for collective in program.collectives),
    }
    return result | times(result, program, topology, mesh, experiment.total_steps)


def devices(topology: chips.Topology) -> list:
    """The devices to compile for. Of this process, no computation is ever run on them."""
    jax.config.update("jax_platforms", "cpu")
    if not topology.is_tpu:
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices()
    library = importlib.util.find_spec("libtpu")
    if library is None or library.origin is None:
        raise ConfigError("the TPU compiler is not installed: pip install -e .[plan], or plan for gpu:h100x8")
    # Only a TPU needs the compiler's lock on it; a plan that was killed leaves it behind.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # these two: or it complains that this is no TPU VM
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")
    os.environ.setdefault("TPU_LIBRARY_PATH", os.path.join(os.path.dirname(library.origin), "libtpu.so"))
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, chip_config_name=topology.chip.compiled_as
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the installed TPU compiler has no {topology.name}: {' '.join(str(error).split())[:200]}"
        ) from error


def memory(compiled, chip: chips.Chip) -> dict:
    """Bytes on each device by kind, and whether they fit. The state is donated: new and old are one."""
    stats = compiled.memory_analysis()
    kinds = {
        "state_and_batch": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    total = sum(kinds.values())
    return {"fits": total <= chip.memory, "memory": kinds, "memory_total": total, "memory_of_device": int(chip.memory)}


def minimum_bytes(config, experiment: Experiment, state, devices: int) -> dict[str, int]:
    """What the collectives of a step must at least bring to each device, by purpose.

    gradients: of every parameter once, in the type its layer computes in. batch_norm: two sums a channel for each pass
    through a layer; none if every group of examples is on one device. embeddings: in the type of the product. What
    crosses is the method's to say (methods.base.Traffic).

    Raises:
      ConfigError: the method does not say.
    """
    if devices == 1:
        return {"gradients": 0, "batch_norm": 0, "embeddings": 0}
    method = experiment.method
    if not isinstance(method, HasTraffic):
        raise ConfigError(f"config.method.name={config.method.name!r} does not say what it sends between devices")
    embeddings, _, _ = jax.eval_shape(
        lambda state, batch: method.embed(
            state.params, state.model_state, state.target, batch, example_keys(0, state.step, batch)
        ),
        state,
        experiment.batch_spec,
    )
    traffic = method.traffic(embeddings, devices)
    width = jnp.dtype(config.encoder.dtype).itemsize
    on_tpu = 2  # a TPU multiplies float32 in bfloat16 by default

    def bytes_of(part: str, leaf) -> int:
        return leaf.size * (width if leaf.ndim > 1 and part in traffic.compute_dtype_parts else 4)

    gradients = sum(bytes_of(part, leaf) for part, tree in state.params.items() for leaf in jax.tree.leaves(tree))
    statistics = jax.tree_util.tree_leaves_with_path(state.model_state)
    channels = sum(leaf.size for path, leaf in statistics if jax.tree_util.keystr(path).endswith("['mean']"))
    local = config.encoder.get("bn_groups", 1) % devices == 0
    return {
        "gradients": gradients,
        "batch_norm": 0 if local else 2 * channels * 4 * traffic.batch_norm_passes,
        "embeddings": on_tpu * traffic.embeddings,
    }


def times(
    result: dict, program: hlo.Program, topology: chips.Topology, mesh: jax.sharding.Mesh, total_steps: int
) -> dict:
    """The estimates. Collectives are counted as if nothing else went on at the same time."""
    chip = topology.chip
    roofline = max(result["flops"] / chip.flops, result["bytes_accessed"] / chip.bandwidth)
    compute = program.cycles / chip.clock if program.cycles else roofline
    # An all-reduce of V bytes sends and receives 2 V on each chip, over all its links, and waits for the farthest chip
    # twice, as it gathers what it has summed; other collectives V and once. The devices of a chip add up first.
    sent = latency = 0.0
    for collective in program.collectives if topology.devices > 1 else []:
        ways = 2 if collective.operation == "all-reduce" else 1
        sent += ways * collective.bytes * (1 - 1 / topology.devices) / (chip.links * chip.devices_per_chip)
        latency += (
            ways
            * collective.operations
            * topology.message_seconds(extent(mesh, collective.group) if topology.is_tpu else ())
        )
    step = compute + sent + latency
    return {
        "estimate": {
            "compute_seconds": compute,
            "of": "the TPU compiler's cycles" if program.cycles else "a roofline",
            "roofline_seconds": roofline,
            "transfer_seconds": sent,
            "latency_seconds": latency,
            "step_seconds": step,
            "utilisation": result["flops"] / chip.flops / step,
            "examples_per_second": result["batch"] / step,
            "steps": total_steps,
            "days": total_steps * step / 86400,
        }
    }


def extent(mesh: jax.sharding.Mesh, group: int) -> tuple[int, ...]:
    """Chips along each axis of the box in which the first `group` devices of a mesh lie; 0: all of them."""
    coordinates = np.array([device.coords for device in mesh.devices.flat[: group or None]])
    return tuple(int(n) for n in np.ptp(coordinates, axis=0) + 1)


def text(result: dict) -> str:
    """The plan as lines to read."""
    lines = [
        f"{result['config']} on {result['topology']}: {result['devices']} devices, batch {result['batch']} "
        f"({result['batch'] / result['devices']:g} a device), compiled for {result['compiler']} in "
        f"{result['compile_seconds']:g} s"
    ]
    if "memory" not in result:
        return "\n".join([*lines, f"DOES NOT FIT: {result['compiler_says']}"])
    fits = "fits" if result["fits"] else "DOES NOT FIT"
    kinds = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in result["memory"].items())
    minimum, estimate = result["collective_bytes_minimum"], result["estimate"]
    least = sum(minimum.values())
    lines += [
        f"memory      {result['memory_total'] / 1e9:.2f} of {result['memory_of_device'] / 1e9:.2f} GB a device: "
        f"{fits} ({kinds})",
        f"work        {result['flops'] / 1e12:.3f} TFLOP and {result['bytes_accessed'] / 1e9:.1f} GB a device",
    ]
    lines += [
        f"collective  {c['operation']} {c['origin']} {c['dtype']}: {c['operations']} operations, "
        f"{c['bytes'] / 1e6:.2f} MB"
        for c in result["collectives"]
    ]
    ms = {name: 1e3 * seconds for name, seconds in estimate.items() if name.endswith("_seconds")}
    lines += [
        f"            {result['collective_bytes'] / 1e6:.1f} MB; the least is {least / 1e6:.1f} MB ("
        + ", ".join(f"{name.replace('_', ' ')} {size / 1e6:.1f}" for name, size in minimum.items())
        + ")",
        f"ESTIMATE    step {ms['step_seconds']:.0f} ms: compute {ms['compute_seconds']:.0f} ({estimate['of']}; "
        f"roofline {ms['roofline_seconds']:.0f}), transfers {ms['transfer_seconds']:.1f}, latencies "
        f"{ms['latency_seconds']:.1f}",
        f"ESTIMATE    utilisation {estimate['utilisation']:.0%}, {estimate['examples_per_second']:.0f} "
        f"examples/s, {estimate['steps']} steps in {duration(86400 * estimate['days'])}",
    ]
    return "\n".join(lines)
