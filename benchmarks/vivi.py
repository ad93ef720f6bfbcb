"""What VIVI's step costs, in time, memory and frames.

    python -m benchmarks.vivi [--videos=2] [--size=32] [--rounds=5] [--devices=1,8] [--full_size]

    step      VIVI-Ex(4) against plain supervised training of the same encoder on the same number of frames, in turns
    memory    VIVI-Ex(4)-Co(100%) with the paper's batch, each device embedding --videos videos at a time, compiled for
              several numbers of simulated CPU devices: what XLA says a device holds (not what a TPU's compiler would)
    sampler   frames per second and core from a frame store of 640x360 pixels

Writes docs/results/vivi.json. The network is the demo's; --full_size --size=224 is the paper's, an hour on two cores.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import results
from configs import vivi

SEED, MEASURED_SECONDS = 0, 4.0


def config_of(argument: str, *, size: int, full_size: bool):
    config = vivi.get_config(argument if full_size else f"{argument},demo")
    config.data.image_size = size
    config.encoder.update(dict(bn_groups=1, dtype="float32"))
    return config


def measure_step(videos: int, size: int, rounds: int, full_size: bool) -> dict:
    """Seconds per step, and the median ratio of neighbouring ones."""
    import jax
    import numpy as np

    from vivi_jax.build import build
    from vivi_jax.train_step import create

    ours, plain = (config_of(argument, size=size, full_size=full_size) for argument in ("ex4", "sup,co=100"))
    ours.batch_size, ours.method.triplet_groups = videos, 1
    frames = videos * ours.data.shots * ours.data.frames
    plain.data.labelled_batch_size = frames
    plain.optimizer, plain.schedule = ours.optimizer, ours.schedule
    steps = {}
    for name, config in (("vivi", ours), ("supervised", plain)):
        experiment = build(config)
        batch = {
            key: np.random.default_rng(SEED).integers(0, 10, s.shape).astype(s.dtype)
            for key, s in experiment.batch_spec.items()
        }
        state = jax.jit(
            lambda experiment=experiment: create(experiment.method, experiment.optimizer, experiment.batch_spec, SEED)
        )()
        steps[name] = [jax.jit(experiment.train_step, donate_argnums=0), state, jax.device_put(batch)]

    def seconds(name: str) -> float:
        step, state, batch = steps[name]
        start = time.perf_counter()
        steps[name][1], metrics = step(state, batch)
        jax.block_until_ready((steps[name][1], metrics))
        return time.perf_counter() - start

    for name in (*steps, *steps):  # compiles, and once more
        seconds(name)
    times = [(seconds("vivi"), seconds("supervised")) for _ in range(rounds)]
    return {
        "frames": frames,
        "vivi_step_seconds": round(statistics.median(a for a, _ in times), 4),
        "supervised_step_seconds": round(statistics.median(b for _, b in times), 4),
        "ratio": round(statistics.median(a / b for a, b in times), 3),
        "device": jax.devices()[0].device_kind,
    }


def measure_memory(videos: int, size: int, full_size: bool) -> dict:
    """Runs in a child with its own number of devices: bytes per device of the compiled, micro-batched step."""
    import jax

    from vivi_jax.build import build
    from vivi_jax.distributed import sharding
    from vivi_jax.train_step import create

    config = config_of("ex4,co=100", size=size, full_size=full_size)
    devices = len(jax.devices())
    if not full_size:
        config.batch_size, config.data.labelled_batch_size = 64, 256
    config.micro_batches = max(1, config.batch_size // (videos * devices))
    config.method.triplet_groups = 1  # mined in the whole batch: the most memory the losses can take
    experiment, mesh = build(config), sharding.make_mesh()
    replicated = sharding.replicated(mesh)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, SEED))
    step = jax.jit(
        experiment.train_step,
        donate_argnums=0,
        in_shardings=(replicated, sharding.batch_sharding(mesh)),
        out_shardings=(replicated, replicated),
    )
    memory = step.lower(state, experiment.batch_spec).compile().memory_analysis()
    return {
        "devices": devices,
        "micro_batches": config.micro_batches,
        "videos": config.batch_size,
        "argument_mb": round(memory.argument_size_in_bytes / 2**20),
        "temporary_mb": round(memory.temp_size_in_bytes / 2**20),
    }


def measure_sampler() -> dict:
    """Four frames of 224 pixels of one shot, one second apart, on one core."""
    from benchmarks.input import make_videos
    from input_pipeline.store import FrameStore
    from input_pipeline.streams import shots
    from input_pipeline.streams.order import Order

    with tempfile.TemporaryDirectory() as scratch:
        videos, store = pathlib.Path(scratch, "videos"), pathlib.Path(scratch, "store")
        videos.mkdir()
        make_videos(videos)
        subprocess.run(
            [sys.executable, "-m", "input_pipeline.prepare", f"--videos={videos}", f"--out={store}"],
            check=True,
            cwd=results.ROOT,
            stdout=sys.stderr,
        )
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        batches = shots.shot_frames(
            FrameStore(store),
            Order(SEED, 8),
            shots=1,
            frames=4,
            frame_rate=1.0,
            min_shot_seconds=0.32,
            sampler="consecutive",
            image_size=224,
            min_crop_area=0.08,
        )(threads=1)
        for _ in range(4):
            next(batches)
        frames, start = 0, time.process_time()
        while time.process_time() - start < MEASURED_SECONDS:
            frames += next(batches)["shots"].shape[0] * 4
        return {"frames_per_core_second": round(frames / (time.process_time() - start), 1)}


def child(part: str, options: argparse.Namespace, devices: int = 1) -> dict:
    """A part in a process of its own: devices and affinity are fixed once per process."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if part == "memory":
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.vivi",
            f"--part={part}",
            f"--videos={options.videos}",
            f"--size={options.size}",
            f"--rounds={options.rounds}",
            *["--full_size"] * options.full_size,
        ],
        capture_output=True,
        text=True,
        cwd=results.ROOT,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"error: measuring {part!r} failed:\n{done.stderr[-2000:]}")
    print(part, done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2, help="videos per step, or per device and micro-batch")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", default="1,8", help="numbers of simulated devices")
    parser.add_argument("--full_size", action="store_true", help="ResNet-50 and the paper's batch")
    parser.add_argument("--part", choices=("step", "memory", "sampler"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = {
            "step": lambda: measure_step(options.videos, options.size, options.rounds, options.full_size),
            "memory": lambda: measure_memory(options.videos, options.size, options.full_size),
            "sampler": measure_sampler,
        }
        print(json.dumps(parts[options.part]()))
        return
    values = {
        "size": options.size,
        "full_size": options.full_size,
        "step": child("step", options),
        "memory": [child("memory", options, int(n)) for n in options.devices.split(",")],
        "sampler": child("sampler", options),
    }
    command = (
        f"python -m benchmarks.vivi --videos={options.videos} --size={options.size} --rounds={options.rounds} "
        f"--devices={options.devices}" + " --full_size" * options.full_size
    )
    print(f"wrote {results.record('vivi', values, command=command, seeds=[SEED])}")


if __name__ == "__main__":
    main()
