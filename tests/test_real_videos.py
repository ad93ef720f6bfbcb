"""The whole path on real videos: prepared, trained on, looked at."""

import io
import json

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.colours import exact_rgb
from helpers.commands import run_module
from input_pipeline.preparation.local import prepare
from input_pipeline.store import FrameStore


def run(module: str, *arguments) -> None:
    result = run_module(module, *arguments, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_vito_trains_on_real_videos_and_draws_its_attention(sample_data, tmp_path):
    store, workdir, picture = tmp_path / "store", tmp_path / "run", tmp_path / "attention.png"
    run("input_pipeline.prepare", f"--videos={sample_data / 'videos'}", f"--out={store}", "--short_side=128")
    inputs = [path for path in (sample_data / "videos").rglob("*") if path.is_file()]
    ledger = [json.loads(line) for line in (store / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == len(inputs)
    assert sum(row["status"] == "ok" for row in ledger) == len(FrameStore(str(store))) == len(inputs) - 2

    run(
        "vivi_jax.main",
        "--config=configs/vito.py:demo,views=2",
        f"--workdir={workdir}",
        f"--config.data.path={store}",
        "--config.batch_size=8",
        "--config.schedule.examples_per_epoch=8",
        "--config.schedule.epochs=150.0",
        "--config.schedule.base_lr=0.1",
        "--config.run.log_every=1",
        "--config.encoder.width=0.125",
    )
    loss = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(loss) == 150 and np.mean(loss[-20:]) < 0.8 * np.mean(loss[:10])

    run("evaluation.attention", f"--checkpoint={workdir}", f"--images={store}", f"--out={picture}", "--count=6")
    image = cv2.imread(str(picture))
    assert image is not None and image.shape[1] > image.shape[0] > 300 and image.std() > 10


@pytest.fixture(scope="module")
def store_of_samples(sample_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "store"
    prepare(str(sample_data / "videos"), str(path))
    return FrameStore(path)


SAMPLES = """bbb_480p_30s.mp4 bikes.mp4 carphone_qcif.mp4 cockatoo.mp4 flipping_a_pancake.mkv intel_bottle_detection.mp4
intel_car_detection.mp4 maxtext_dinosaur.mp4 nasa_13013.mp4 realshort.mp4 sam2_blocks.mp4 sam2_dog.mp4 sam2_juggle.mp4
codec/av1_video.mkv codec/bbb_vp8_1s.webm codec/h265_video.mp4 codec/rot_0.mov codec/rot_180.mov codec/rot_270.mov
codec/rot_90.mov codec/unordered_pts.mov""".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_every_stored_frame_has_the_colours_and_the_time_of_the_video(sample_data, store_of_samples, name):
    """Against pictures that are decoded, converted and averaged without our code and without swscale.

    Of several streams FFmpeg says which is best. A stored frame must be like a picture that is on display within half a
    frame of its time. Like: of 255 grey levels, the mean absolute difference, and the difference of the mean of each
    colour, are at most 2. The picture has been a JPEG of the same quality too, made by Pillow, because halved chroma
    alone makes up to 3 levels, in saturated blue.
    """
    store, path = store_of_samples, str(sample_data / "videos" / name)
    video = store.videos.tolist().index(name)
    with av.open(path) as container:
        stream = container.streams.best("video")
        times = sorted(packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None)
        times = np.array([float(time - times[0]) for time in times])
    due = np.arange(store.num_frames[video]) / float(store.fps[video])
    half = 0.5 / float(store.fps[video])
    difference, bias = np.full(len(due), np.inf), np.full(len(due), np.inf)
    with av.open(path) as container:
        for i, frame in enumerate(container.decode(container.streams.best("video"))):
            until = times[i + 1] if i + 1 < len(times) else np.inf
            near = np.flatnonzero((times[i] <= due + half) & (until >= due - half))
            size = int(store.width[video]), int(store.height[video])
            size = size[::-1] if frame.rotation % 180 else size
            exact = np.rot90(
                exact_rgb(frame, size, "bt709" if frame.colorspace == 1 else "bt601"), frame.rotation // 90
            )
            written = io.BytesIO()
            Image.fromarray(exact.round().astype(np.uint8)).save(written, "JPEG", quality=95, subsampling="4:2:0")
            expected = np.asarray(Image.open(written), np.float32)
            for k, jpeg in zip(near, store.read_frames(video, near), strict=True):
                error = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] - expected
                if np.abs(error).mean() < difference[k]:
                    difference[k], bias[k] = np.abs(error).mean(), np.abs(error.mean(axis=(0, 1))).max()
    print(f"{name}: difference {difference.max():.2f}, bias {bias.max():.2f}")
    assert difference.max() <= 2 and bias.max() <= 2
