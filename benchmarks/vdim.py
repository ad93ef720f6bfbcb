"""What VDIM's input and step cost, as ratios measured in one run.

    python -m benchmarks.vdim [--table=paper|small] [--batch=2] [--rounds=3] [--videos=DIR] [--quick]

    clips   pairs of views (32 + 2 x 32 frames, 128 pixels: the paper's best setting) per second of a core's time, each
            in its own process: this pipeline, and a reader that decodes the window with PyAV and cuts the same crops
    step    seconds of a training step without temporal difference, ours against the same in PyTorch if it is installed;
            in float32 and without colours; checked first to be the same work (same_work.py)

Without --videos it makes eight of 640x360 pixels (benchmarks/input.py). Writes docs/results/vdim.json.
--quick measures one step alone and writes nothing: does it run?
"""

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import results, same_work, tables
from configs import vdim

SEED, BATCH, MEASURED_SECONDS = 0, 8, 4.0


# ---- Clips ----------------------------------------------------------------------------------------------------------
def this_pipeline(store, videos: str) -> Iterator[int]:
    from input_pipeline.streams import windows
    from input_pipeline.streams.order import Order

    del videos
    options = {key: value for key, value in vdim.get_config().data.items() if key not in ("source", "path")}
    for batch in windows.clip_pairs(store, Order(SEED, BATCH), **options)(threads=1):
        yield len(batch["view1"])


def clip_reader(store, videos: str) -> Iterator[int]:
    import cv2

    from benchmarks.input import decode_clip
    from input_pipeline.streams import sampling, windows

    cv2.setNumThreads(1)
    data, i = vdim.get_config().data, 0
    offsets = [np.arange(data.frames), data.downsample * np.arange(2 * data.frames)]
    while True:
        v = sampling.pick(SEED, i, len(store), BATCH)
        fps, height, width = float(store.fps[v]), int(store.height[v]), int(store.width[v])
        plan = sampling.plan_clips(
            sampling.example_rng(SEED, i),
            offsets,
            num_frames=int(store.num_frames[v]),
            height=height,
            width=width,
            min_crop_area=data.min_crop_area,
            aspect=windows.AMDIM_ASPECT,
            flip_prob=0.0,
            rotate=False,
        )
        clip = decode_clip(os.path.join(videos, store.videos[v]), plan.frames.min() / fps, plan.frames.max() / fps)
        times = np.array([seconds for seconds, _ in clip])
        pictures = {}  # frames that both views show are converted once
        for frame, box in zip(plan.frames, plan.boxes, strict=True):
            k = int(np.abs(times - frame / fps).argmin())
            if k not in pictures:
                pictures[k] = clip[k][1].to_ndarray(format="rgb24")
            y, x, h, w = np.rint(box * (pictures[k].shape[0] / height)).astype(int)
            cv2.resize(pictures[k][y : y + h, x : x + w], (data.image_size,) * 2, interpolation=cv2.INTER_CUBIC)
        i += 1
        yield 1


READERS = {"this pipeline": this_pipeline, "clip reader": clip_reader}


def measure_clips(reader: str, store: str, videos: str) -> dict:
    """Runs in a child process: pairs of views per second of processor time."""
    from input_pipeline.store import FrameStore

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    counts = READERS[reader](FrameStore(store), videos)
    next(counts)
    clips, start = 0, time.process_time()
    while time.process_time() - start < MEASURED_SECONDS:
        clips += next(counts)
    return {
        "clips_per_core_second": clips / (time.process_time() - start),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# ---- Step -----------------------------------------------------------------------------------------------------------
def config_of(table: str, batch: int):
    config = vdim.get_config("difference=no" if table == "paper" else "demo,difference=no")
    config.batch_size, config.encoder.dtype, config.method.color = batch, "float32", "none"
    return config


def make_views(config) -> list[np.ndarray]:
    data = config.data
    shape = (config.batch_size, data.frames, data.image_size, data.image_size, 3)
    return [np.random.default_rng(v).integers(256, size=shape, dtype=np.uint8) for v in range(2)]


def torch_step(config, views: list[np.ndarray]) -> tuple:
    """The peer's step and what it takes."""
    import torch

    from benchmarks.torch_vdim import VdimStep

    tensors = tuple(torch.from_numpy(view.astype(np.float32) / 255).permute(0, 4, 1, 2, 3) for view in views)
    return VdimStep(config.encoder.table, config.method.embed_dim), tensors


def check_step(table: str, batch: int) -> dict:
    """Runs in a child process, which ends with one line if the peer does other work."""
    config = config_of(table, batch)
    ours, theirs = (
        same_work.of_ours(same_work.our_method_step(config)[0]),
        same_work.of_peer(*torch_step(config, make_views(config))),
    )
    same_work.check(ours, theirs, quick=table == "small")
    return {"ours": ours, "theirs": theirs}


def measure_step(framework: str, table: str, batch: int, steps: int = 3) -> dict:
    """Runs in a child process: the fastest of a few steps, after one that compiles."""
    config = config_of(table, batch)
    views = make_views(config)
    if framework == "torch":
        import torch

        trainer, tensors = torch_step(config, views)
        step = lambda: trainer(*tensors)  # noqa: E731
    else:
        step = jax_step(config, dict(view1=views[0], view2=views[1]))

    def timed() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    first = timed()
    times = [timed() for _ in range(steps)]
    if framework == "torch":
        # PyTorch's threads wait for each other at every small operation, for longer than one thread alone takes where
        # the network is small or other work is on the machine: the faster of all threads and one is measured.
        torch.set_num_threads(1)
        times += [timed() for _ in range(steps)]
    return {
        "first_step_seconds": first,
        "step_seconds": min(times),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def jax_step(config, batch: dict):
    import jax

    from vivi_jax.build import build
    from vivi_jax.train_step import create

    experiment = build(config)
    state = jax.jit(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, SEED))()
    train_step = jax.jit(experiment.train_step, donate_argnums=0)

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return step


# ---- Both -----------------------------------------------------------------------------------------------------------
def child(**flags) -> dict:
    """A measurement in a process of its own, so that none changes the next."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vdim", *(f"--{k}={v}" for k, v in flags.items())],
        capture_output=True,
        text=True,
        cwd=results.ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    if done.returncode:
        sys.exit(f"error: measuring {flags} failed:\n{done.stderr[-2000:]}")
    print(flags["measure"], done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(measured: list[dict[str, dict]], key: str, over: str, under: str) -> dict:
    """Medians over rounds of every kind's values, and of the ratio of two kinds' `key` within a round."""
    rows = [
        {"what": kind, **{name: round(statistics.median(r[kind][name] for r in measured), 3) for name in values}}
        for kind, values in measured[0].items()
    ]
    ratio = (
        {"ratio": round(statistics.median(r[over][key] / r[under][key] for r in measured), 3)}
        if {over, under} <= measured[0].keys()
        else {}
    )
    return {"rows": rows, **ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("paper", "small"), default="paper", help="the encoder of the step")
    parser.add_argument("--batch", type=int, default=2, help="clips per step, two views each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", default="", help="folder of videos; by default it makes some")
    parser.add_argument("--quick", action="store_true", help="one step of each framework alone; writes nothing")
    parser.add_argument("--measure", choices=(*READERS, "jax", "torch", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.measure in READERS:
            values = measure_clips(options.measure, options.store, options.videos)
        elif options.measure == "check":
            values = check_step(options.table, options.batch)
        else:
            values = measure_step(options.measure, options.table, options.batch)
        return print(json.dumps(values))

    frameworks = ["jax", *(["torch"] if importlib.util.find_spec("torch") else [])]
    if "torch" in frameworks:
        child(measure="check", table=options.table, batch=options.batch)
    if options.quick:
        for name in frameworks:
            child(measure=name, table=options.table, batch=options.batch)
        return None

    with tempfile.TemporaryDirectory() as scratch:
        videos, store = os.path.abspath(options.videos), os.path.join(scratch, "store")
        if not options.videos:
            from benchmarks.input import make_videos

            videos = os.path.join(scratch, "videos")
            os.mkdir(videos)
            make_videos(pathlib.Path(videos))
        subprocess.run(
            [sys.executable, "-m", "input_pipeline.prepare", f"--videos={videos}", f"--out={store}", "--fps=60"],
            check=True,
            cwd=results.ROOT,
        )
        clips = [
            {reader: child(measure=reader, store=store, videos=videos) for reader in READERS}
            for _ in range(options.rounds)
        ]
    steps = [
        {name: child(measure=name, table=options.table, batch=options.batch) for name in frameworks}
        for _ in range(options.rounds)
    ]
    values = {
        "clips": compare(clips, "clips_per_core_second", *READERS),
        "step": compare(steps, "step_seconds", "torch", "jax"),
        "table": options.table,
        "batch": options.batch,
        "rounds": options.rounds,
    }
    command = f"python -m benchmarks.vdim --table={options.table} --batch={options.batch} --rounds={options.rounds}" + (
        f" --videos={options.videos}" if options.videos else ""
    )
    path = results.record("vdim", values, command=command, seeds=[SEED])
    print(tables.vdim_table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
