"""Host speed of VITO's input pipeline, as ratios measured in one run.

    python -m benchmarks.input [--videos=DIR]

All cut the same views (3 of a 2.56 s clip, crops of at least 40 %, 224 px), each in a process of its own, tied to one
core, and are counted per second of that core's time:
    this pipeline       frame store -> finished batches
    bare decode         decode_and_crop_jpeg of the same crops, from memory, in one graph: the limit
    clip reader         PyAV seeks, decodes the clip, and the 3 frames are cropped and resized
    torch DataLoader    the same JPEGs from the same store, decoded, cropped and resized by OpenCV, in batches
    torchcodec          decodes the 3 frames from the video file; cropped and resized by OpenCV
The last two are left out, by name, where PyTorch or torchcodec (with the FFmpeg libraries it needs) is not installed.
Without --videos it makes eight videos of 640x360 pixels: panned noise of a falling spectrum, whose frames take as many
bytes as those of filmed scenes (some 50 kB at quality 95).
"""

import argparse
import importlib
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

import av
import cv2
import numpy as np

from benchmarks import results, tables
from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from vivi_jax.errors import DataError

SEED, VIEWS, SECONDS, SIZE, MIN_AREA = 0, 3, 2.56, 224, 0.4
BATCH = 8
ROUNDS, MEASURED_SECONDS = 3, 4.0


def make_videos(
    directory: pathlib.Path, videos: int = BATCH, frames: int = 125, fps: int = 25, scenes: int = 1
) -> list[int]:
    """H.264 files of 640x360 pixels with a key frame each second, which favours the clip reader.

    Returns:
      the first frames of the scenes behind the first, the same in every video: the cuts.
    """
    rng = np.random.default_rng(SEED)
    starts = [frames * i // scenes for i in range(scenes)]
    for v in range(videos):
        with av.open(str(directory / f"{v}.mp4"), "w") as container:
            stream = container.add_stream(
                "libx264", rate=fps, width=640, height=360, pix_fmt="yuv420p", options={"g": str(fps), "threads": "1"}
            )
            for k in range(frames):
                if k in starts:
                    scene = make_scene(rng)
                y, x = (round(60 + 60 * np.sin(k / 19 + v + turn)) for turn in (0, 2))
                picture = np.ascontiguousarray(scene[y : y + 360, x : x + 640])
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    return starts[1:]


def make_scene(rng: np.random.Generator, height: int = 480, width: int = 800) -> np.ndarray:
    """uint8[height, width, 3]: noise of a falling spectrum."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    falling = frequency**-1.5
    noise = np.stack(
        [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falling, (height, width)) for _ in range(3)],
        axis=-1,
    )
    noise = noise[..., :1] + 0.3 * noise  # colours follow the brightness, as in photographs
    return np.clip(128 + 50 * (noise - noise.mean()) / noise.std(), 0, 255).astype(np.uint8)


def plans(store: FrameStore) -> Iterator[tuple[int, sampling.ViewPlan]]:
    """(video, plan) of examples 0, 1, ... as clip_views draws them."""
    usable = np.flatnonzero(store.num_frames >= np.rint(SECONDS * store.fps))
    i = 0
    while True:
        video = usable[sampling.pick(SEED, i, len(usable), BATCH)]
        yield (
            video,
            sampling.plan_views(
                sampling.example_rng(SEED, i),
                num_frames=int(store.num_frames[video]),
                clip_frames=round(SECONDS * float(store.fps[video])),
                height=int(store.height[video]),
                width=int(store.width[video]),
                views=VIEWS,
                sampler="marginal",
                delay=0,
                min_crop_area=MIN_AREA,
            ),
        )
        i += 1


def this_pipeline(store: FrameStore, videos: str) -> Iterator[int]:
    from input_pipeline.streams import views
    from input_pipeline.streams.order import Order

    del videos
    for batch in views.clip_views(
        store,
        Order(SEED, BATCH),
        views=VIEWS,
        sampler="marginal",
        clip_seconds=SECONDS,
        delay_seconds=0.0,
        image_size=SIZE,
        min_crop_area=MIN_AREA,
    )(threads=1):
        yield batch["views"].shape[0] * VIEWS


def bare_decode(store: FrameStore, videos: str) -> Iterator[int]:
    import tensorflow as tf

    del videos
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    @tf.function
    def decode(data, boxes):
        return [tf.io.decode_and_crop_jpeg(data[k], boxes[k], channels=3) for k in range(BATCH * VIEWS)]

    crops = [
        (store.read(store.first_record[video] + plan.frames), plan.boxes)
        for (video, plan), _ in zip(plans(store), range(BATCH * 25), strict=False)
    ]
    batches = [
        (
            tf.constant(np.concatenate([data for data, _ in crops[k : k + BATCH]])),
            tf.constant(np.concatenate([boxes for _, boxes in crops[k : k + BATCH]])),
        )
        for k in range(0, len(crops), BATCH)
    ]
    while True:
        for data, boxes in batches:
            decode(data, boxes)
            yield BATCH * VIEWS


def clip_reader(store: FrameStore, videos: str) -> Iterator[int]:
    cv2.setNumThreads(1)
    for video, plan in plans(store):
        fps, num_frames = float(store.fps[video]), int(store.num_frames[video])
        clip_frames = round(SECONDS * fps)
        start = min(int(plan.frames.min()), num_frames - clip_frames)  # a clip that holds the planned frames
        clip = decode_clip(os.path.join(videos, store.videos[video]), start / fps, (start + clip_frames) / fps)
        times = np.array([seconds for seconds, _ in clip])
        for frame, box, flip in zip(plan.frames, plan.boxes, plan.flips, strict=True):
            picture = clip[np.abs(times - frame / fps).argmin()][1].to_ndarray(format="rgb24")
            cut(picture, np.rint(box * (picture.shape[0] / store.height[video])).astype(int), flip)
        yield VIEWS


def torch_loader(store: FrameStore, videos: str) -> Iterator[int]:
    import torch

    del videos
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    class Views(torch.utils.data.IterableDataset):
        def __iter__(self):
            for video, plan in plans(store):
                pictures = [
                    cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                    for data in store.read(store.first_record[video] + plan.frames)
                ]
                yield np.stack([cut(*view) for view in zip(pictures, plan.boxes, plan.flips, strict=True)])

    for batch in torch.utils.data.DataLoader(Views(), batch_size=BATCH):
        yield batch.shape[0] * VIEWS


def codec_reader(store: FrameStore, videos: str) -> Iterator[int]:
    from torchcodec.decoders import VideoDecoder

    cv2.setNumThreads(1)
    for video, plan in plans(store):
        path = os.path.join(videos, store.videos[video])
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        pictures = decoder.get_frames_played_at([frame / float(store.fps[video]) for frame in plan.frames]).data.numpy()
        scale = pictures.shape[1] / store.height[video]
        for picture, box, flip in zip(pictures, plan.boxes, plan.flips, strict=True):
            cut(picture, np.rint(box * scale).astype(int), flip)
        yield VIEWS


def cut(picture: np.ndarray, box: np.ndarray, flip: bool) -> np.ndarray:
    """A view, uint8[SIZE, SIZE, 3]."""
    y, x, height, width = box
    view = cv2.resize(picture[y : y + height, x : x + width], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return cv2.flip(view, 1) if flip else view


def decode_clip(path: str, start: float, stop: float) -> list[tuple[float, av.VideoFrame]]:
    """(seconds, frame) from start to stop, decoded by one thread from the key frame before the start."""
    clip = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        first = stream.start_time or 0
        container.seek(first + int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            seconds = float((frame.pts - first) * stream.time_base)
            if seconds > start - 1e-3:
                clip.append((seconds, frame))
            if seconds > stop:
                break
    return clip


KINDS = {
    "this pipeline": this_pipeline,
    "bare decode": bare_decode,
    "clip reader": clip_reader,
    "torch DataLoader": torch_loader,
    "torchcodec": codec_reader,
}
NEEDS = {"torch DataLoader": "torch", "torchcodec": "torchcodec.decoders"}


def kinds_here() -> list[str]:
    """Those whose libraries can be imported; the others are named."""
    here = []
    for kind in KINDS:
        try:
            importlib.import_module(NEEDS.get(kind, "cv2"))
            here.append(kind)
        except (ImportError, RuntimeError, OSError) as error:  # torchcodec without FFmpeg's libraries
            print(f"{kind}: left out, it cannot be imported: {str(error).splitlines()[0]}", flush=True)
    return here


def measure(kind: str, store: str, videos: str, seconds: float) -> dict:
    """Runs in a child process: views per second of processor time, and the process's peak memory."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    counts = KINDS[kind](FrameStore(store), videos)
    for _ in range(4):
        next(counts)
    views, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        views += next(counts)
    rate = views / (time.process_time() - start)
    return {"rate": rate, "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def run_rounds(store: str, videos: str, rounds: int, seconds: float) -> dict[str, list[dict]]:
    """Alternates between the kinds, so that a change in the machine's load meets all of them."""
    measured = {kind: [] for kind in kinds_here()}
    for _ in range(rounds):
        for kind in measured:
            child = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.input",
                    f"--measure={kind}",
                    f"--store={store}",
                    f"--videos={videos}",
                    f"--seconds={seconds}",
                ],
                capture_output=True,
                text=True,
                cwd=results.ROOT,
            )
            if child.returncode:
                sys.exit(f"error: measuring {kind!r} failed:\n{child.stderr[-2000:]}")
            measured[kind].append(json.loads(child.stdout.splitlines()[-1]))
            print(f"{kind}: {measured[kind][-1]['rate']:.0f} views per second and core", flush=True)
    return measured


def summarise(measured: dict[str, list[dict]], store: FrameStore) -> dict:
    def ratio(other: str) -> float:
        return round(
            statistics.median(
                a["rate"] / b["rate"] for a, b in zip(measured["this pipeline"], measured[other], strict=True)
            ),
            3,
        )

    rows = [
        {
            "what": kind,
            "views_per_core_second": round(statistics.median(run["rate"] for run in runs), 1),
            "peak_memory_mb": round(max(run["peak_memory_mb"] for run in runs)),
        }
        for kind, runs in measured.items()
    ]
    sizes = [len(data) for data in store.read(store.first_record)]
    return {
        "ratio_to_bare_decode": ratio("bare decode"),
        "ratio_to_clip_reader": ratio("clip reader"),
        **{f"ratio_to_{kind.replace(' ', '_').lower()}": ratio(kind) for kind in NEEDS if kind in measured},
        "rows": rows,
        "frame_size": f"{store.width[0]}x{store.height[0]}",
        "frame_bytes": round(statistics.mean(sizes)),
        "rounds": len(measured["this pipeline"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default="", help="folder of videos of at least 2.56 s; by default it makes some")
    parser.add_argument("--quick", action="store_true", help="one short round; writes nothing")
    parser.add_argument("--seconds", type=float, default=MEASURED_SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.measure:
            print(json.dumps(measure(options.measure, options.store, options.videos, options.seconds)))
            return
        with tempfile.TemporaryDirectory() as scratch:
            videos, store = options.videos, os.path.join(scratch, "store")
            if not videos:
                videos = os.path.join(scratch, "videos")
                os.mkdir(videos)
                make_videos(pathlib.Path(videos), frames=70 if options.quick else 125)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "input_pipeline.prepare",
                    f"--videos={os.path.abspath(videos)}",
                    f"--out={store}",
                ],
                check=True,
                cwd=results.ROOT,
            )
            rounds, seconds = (1, 0.2) if options.quick else (ROUNDS, options.seconds)
            values = summarise(run_rounds(store, os.path.abspath(videos), rounds, seconds), FrameStore(store))
    except DataError as e:
        sys.exit(f"error: {e}")
    if options.quick:
        print(json.dumps(values, indent=1))
        return
    command = "python -m benchmarks.input" + (f" --videos={options.videos}" if options.videos else "")
    path = results.record("input", values, command=command, seeds=[SEED])
    print(tables.input_table(json.loads(path.read_text())))
    print({name: value for name, value in values.items() if name.startswith("ratio")})


if __name__ == "__main__":
    main()
