"""What preparing a million videos costs, from a few: `python -m benchmarks.prepare [--videos=DIR]`.

Videos of two lengths (rendered 640x360 ones as benchmarks.input's, or those of --videos, each whole and its frames
counted) are prepared by prepare.py and by prepare_beam.py with one worker each. Processor time of this process and the
decoders, less that of a preparation without a video, is fitted by `per video + per second of video`; so are the bytes
read and written. The memory of the command that starts it is that of planning and of the index, per input. Writes
docs/results/prepare.json; docs/data_at_scale.md has the model for a million videos.

Beside it, on rendered videos of eight scenes, the processor time of one decoder of prepare (decoding, scaling, shots,
JPEG), of the ffmpeg command (decoding, scaling, JPEG) and of PySceneDetect (decoding, cuts), each with one thread, and
how well the cuts are found. The two are left out, by name, where they are not installed: pip install imageio-ffmpeg,
pip install --no-deps scenedetect (it names another OpenCV). --quick measures only that, on one short video, and writes
nothing.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np

from benchmarks import results, tables
from benchmarks.input import SEED, make_videos
from input_pipeline import store
from input_pipeline.preparation import inputs, steps
from input_pipeline.preparation.beam import prepare_with_beam
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.video import decode_file
from vivi_jax.errors import DataError

SECONDS, VIDEOS, ROUNDS = (4, 16), 3, 3  # lengths of the rendered videos, how many of each, repetitions
ROWS = 20_000  # inputs of the measurement of memory
COMMANDS = {
    "prepare": lambda videos, out: prepare(videos, out, workers=1),
    "prepare_beam, DirectRunner": lambda videos, out: prepare_with_beam(videos, out, ["--runner=DirectRunner"]),
}


def processor_seconds() -> float:
    """Of this process and all that it has waited for."""
    return sum(os.times()[:4])


def cost(command: Callable[[str, str], bool], videos: str) -> float:
    """Processor seconds of one preparation."""
    with tempfile.TemporaryDirectory() as scratch:
        start = processor_seconds()
        command(videos, os.path.join(scratch, "store"))
        return processor_seconds() - start


def measure(folders: list[str], empty: str) -> dict[str, list[list[float]]]:
    """Command -> per round the seconds for each folder, less those for the empty one; in turns, as load changes."""
    measured = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        cost(command, empty)  # imports, the first pipeline
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            nothing = cost(command, empty)
            measured[name].append([cost(command, folder) - nothing for folder in folders])
            print(f"{name}: {', '.join(f'{seconds:.2f} s' for seconds in measured[name][-1])}", flush=True)
    return measured


def fit(seconds_of: list[float], values: list[float]) -> tuple[float, float]:
    """(per video, per second of video) of sums over videos, by least squares over folders [videos, seconds]."""
    solution, *_ = np.linalg.lstsq(np.array(seconds_of), np.array(values), rcond=None)
    return float(solution[0]), float(solution[1])


def memory_per_input() -> float:
    """Peak bytes per input of the command that plans and finishes, with rows as of videos of ten shots."""
    row = {
        "bytes": 10**7,
        "status": "ok",
        "reason": "",
        "frames": 1500,
        "fps": 25.0,
        "height": 256,
        "width": 455,
        "shot_starts": list(range(1000, 1010)),
        "label": 0,
    }
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as out:
        names = [f"{i // 1000:06d}/{i:011d}.mp4" for i in range(ROWS)]
        found = [inputs.Input(name, f"gs://bucket/videos/{name}", 10**7) for name in names]
        settings = steps.Settings()
        plan = steps.Plan(
            found,
            settings,
            [0] * ROWS,
            ["class"],
            {"settings": {}, "software": {}, "inputs": [[file.name, file.bytes] for file in found]},
        )
        with steps.begin(out, plan):
            packed = (
                {
                    "shard": {
                        "file": store.shard_name(s, len(plan.shards)),
                        "bytes": 0,
                        "records": 1500 * len(members),
                    },
                    "rows": json.loads(json.dumps([row | {"input": names[i]} for i in members])),
                }
                for s, members in enumerate(plan.shards)
            )
            steps.finish(out, plan, packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / ROWS


def contents(folder: str) -> tuple[list[float], float, float]:
    """([videos, their seconds], bytes of the videos, bytes of the frames) of a folder, by preparing it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "store")
        prepare(folder, out)
        frames = store.FrameStore(out)
        read = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())
        written = sum(shard["bytes"] for shard in frames.meta["shards"])
        return [len(frames), float((frames.num_frames / frames.fps).sum())], read, written


def split_by_length(folder: str, scratch: str) -> list[str]:
    """Two folders with links to the shorter and to the longer half of the videos."""
    with tempfile.TemporaryDirectory() as out:
        prepare(folder, os.path.join(out, "store"))
        frames = store.FrameStore(os.path.join(out, "store"))
    order = np.argsort(frames.num_frames / frames.fps, kind="stable")
    if len(order) < 2:
        raise DataError(f"{folder} holds {len(order)} usable video: give two or more, of different lengths")
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    for name, half in zip(("short", "long"), halves, strict=True):
        os.mkdir(os.path.join(scratch, name))
        for i, video in enumerate(half):
            path = os.path.join(folder, frames.videos[video])
            os.symlink(path, os.path.join(scratch, name, f"{i}{os.path.splitext(path)[1]}"))
    return [os.path.join(scratch, name) for name in ("short", "long")]


SCENES, SCENE_FRAMES = 8, 75


def beside_peers(videos: int, rounds: int) -> dict:
    """Processor seconds of each per second of video, ratios of a round's, and the F1 of cuts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        cuts = make_videos(folder, videos, frames=SCENES * SCENE_FRAMES, scenes=SCENES)
        paths = sorted(folder.glob("*.mp4"))
        seconds = len(paths) * SCENES * SCENE_FRAMES / 25
        of_peer = {name: peer for name, peer in PEERS.items() if peer(None)}
        spent = {name: [] for name in ("prepare", *of_peer)}
        found = {}
        for _ in range(rounds):
            for name, run in {"prepare": decode_with_shots, **of_peer}.items():
                start = processor_seconds()
                found[name] = [run(str(path)) for path in paths]
                spent[name].append((processor_seconds() - start) / seconds)
    return {
        "cuts": len(cuts) * len(paths),
        "rows": [
            {
                "what": name,
                "processor_seconds_per_second_of_video": round(statistics.median(values), 4),
                "rate_of_prepare_over_it": round(
                    statistics.median(b / a for a, b in zip(spent["prepare"], values, strict=True)), 3
                ),
                "f1": None if found[name][0] is True else round(f1(found[name], cuts), 3),
            }
            for name, values in spent.items()
        ],
    }


def f1(found: list[list[int]], cuts: list[int]) -> float:
    """Of cuts at the right frame or beside it."""
    right = sum(any(abs(cut - other) <= 1 for other in of_video) for of_video in found for cut in cuts)
    return 2 * right / max(1, sum(map(len, found)) + len(cuts) * len(found))


def decode_with_shots(path: str) -> list[int]:
    """What a decoder of prepare does with a file; the cuts."""
    defaults = steps.Settings()
    with tempfile.NamedTemporaryFile() as frames:
        result = decode_file(
            path,
            frames.name,
            fps=defaults.fps,
            short_side=defaults.short_side,
            jpeg_quality=defaults.jpeg_quality,
            shot_rule=defaults.shot_rule,
        )
    return result["shot_starts"][1:]


def ffmpeg(path: str | None) -> bool:
    """Decodes, scales and writes JPEG frames; of None: whether it is here."""
    try:
        import imageio_ffmpeg
    except ImportError:
        print("ffmpeg: left out, imageio-ffmpeg is not installed")
        return False
    if path:
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                imageio_ffmpeg.get_ffmpeg_exe(),
                "-v",
                "error",
                "-threads",
                "1",
                "-i",
                path,
                "-vf",
                "scale=-2:256",
            ]
            frames = ["-filter_threads", "1", "-threads", "1", "-q:v", "2", f"{scratch}/%06d.jpg"]
            subprocess.run([*command, *frames], check=True)
    return True


def pyscenedetect(path: str | None) -> list[int] | bool:
    """The cuts it finds by its defaults; of None: whether it is here."""
    try:
        import scenedetect
    except ImportError:
        print("PySceneDetect: left out, scenedetect is not installed")
        return False
    if path is None:
        return True
    cv2.setNumThreads(1)
    return [int(start.frame_num) for start, _ in scenedetect.detect(path, scenedetect.ContentDetector())[1:]]


PEERS = {"ffmpeg": ffmpeg, "PySceneDetect": pyscenedetect}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default="", help="folder of videos; by default it renders some")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    options = parser.parse_args()
    if options.quick:
        print(json.dumps(beside_peers(videos=1, rounds=1), indent=1))
        return
    try:
        with tempfile.TemporaryDirectory() as scratch:
            empty = os.path.join(scratch, "empty")
            os.mkdir(empty)
            pathlib.Path(empty, "none.txt").write_text("no video")
            if options.videos:
                folders = split_by_length(os.path.abspath(options.videos), scratch)
            else:
                folders = [os.path.join(scratch, str(seconds)) for seconds in SECONDS]
                for folder, seconds in zip(folders, SECONDS, strict=True):
                    os.mkdir(folder)
                    make_videos(pathlib.Path(folder), VIDEOS, frames=25 * seconds)
            amounts, read, written = zip(*map(contents, folders), strict=True)
            measured = measure(folders, empty)
    except DataError as e:
        sys.exit(f"error: {e}")
    rows = []
    for name, rounds in measured.items():
        fits = [fit(amounts, values) for values in rounds]
        rows.append(
            {
                "what": name,
                "processor_seconds_per_video": round(statistics.median(a for a, _ in fits), 4),
                "processor_seconds_per_second_of_video": round(statistics.median(b for _, b in fits), 4),
            }
        )
    seconds = sum(seconds for _, seconds in amounts)
    values = {
        "rows": rows,
        "rounds": ROUNDS,
        "videos": int(sum(count for count, _ in amounts)),
        "seconds": round(seconds, 1),
        "material": "filmed or found videos" if options.videos else "rendered videos, 640x360, 25 frames per second",
        "bytes_read_per_second_of_video": round(sum(read) / seconds),
        "bytes_written_per_second_of_video": round(sum(written) / seconds),
        "memory_bytes_per_input": round(memory_per_input()),
        "beside_peers": beside_peers(VIDEOS, ROUNDS),
    }
    path = results.record(
        "prepare",
        values,
        seeds=[] if options.videos else [SEED],
        command="python -m benchmarks.prepare" + (" --videos=DIR" if options.videos else ""),
    )
    print(tables.prepare_table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
