"""The input pipeline on real frame stores: the pixels asked for, in the order of (seed, step), from the frames used."""

import itertools
import logging
import pathlib
import re
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from helpers.frame_stores import jpeg, write_store
from helpers.streams import run_stream
from input_pipeline import images, pipeline
from input_pipeline.store import FrameStore
from input_pipeline.streams import decode, sampling
from input_pipeline.streams.views import clip_views, image_views
from vivi_jax.errors import ConfigError, DataError

SIZE = 32
# (frames, fps, height, width) of the videos; the third is shorter than 2.56 s
VIDEOS = [(80, 25, 96, 160), (30, 10, 96, 128), (20, 25, 96, 160), (64, 25, 160, 96), (90, 30, 96, 160)]
USABLE = [0, 1, 3, 4]


def picture(video: int, frame: int, height: int, width: int) -> np.ndarray:
    """Red tells x, green tells y, blue tells video and frame: any crop shows where it came from."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.rint(np.stack([red, green, np.full((height, width), 50 * video + frame / 2)], axis=-1)).astype(np.uint8)


def make_store(directory: pathlib.Path, videos=VIDEOS, damaged: int | None = None) -> FrameStore:
    rows = [dict(frames=n, fps=fps, height=h, width=w) for n, fps, h, w in videos]
    return write_store(
        directory,
        rows,
        [
            b"\xff\xd8\xff no picture" if v == damaged else jpeg(picture(v, k, h, w))
            for v, (n, _, h, w) in enumerate(videos)
            for k in range(n)
        ],
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


OPTIONS = dict(
    seed=3,
    batch_size=2,
    views=3,
    sampler="marginal",
    clip_seconds=2.56,
    delay_seconds=0.5,
    image_size=SIZE,
    min_crop_area=0.4,
)


def views(store, **changes):
    return run_stream(clip_views, store, **OPTIONS | dict(num_steps=5) | changes)


def collect(batches) -> np.ndarray:
    return np.stack([batch["views"] for batch in batches])  # [steps, B, V, H, W, 3]


def planned(seed: int, i: int, sampler: str = "marginal", views: int = 3) -> tuple[int, sampling.ViewPlan]:
    """The published rule, written out: which video is example i, and the plan of its views."""
    video = USABLE[sampling.pick(seed, i, len(USABLE))]
    num_frames, fps, height, width = VIDEOS[video]
    return video, sampling.plan_views(
        sampling.example_rng(seed, i),
        num_frames=num_frames,
        clip_frames=round(2.56 * fps),
        height=height,
        width=width,
        views=views,
        sampler=sampler,
        delay=round(0.5 * fps),
        min_crop_area=0.4,
    )


def cut(rgb: np.ndarray, box: np.ndarray, flip: bool) -> np.ndarray:
    """Crop of a smooth picture on the output grid, by linear interpolation in float."""
    y, x, height, width = box
    rows, columns = (np.clip((np.arange(SIZE) + 0.5) * n / SIZE - 0.5, 0, n - 1) for n in (height, width))
    full = rgb.astype(float)
    red = np.interp(x + columns, np.arange(rgb.shape[1]), full[0, :, 0])
    green = np.interp(y + rows, np.arange(rgb.shape[0]), full[:, 0, 1])
    out = np.stack([*np.broadcast_arrays(red[None], green[:, None]), np.full((SIZE, SIZE), full[0, 0, 2])], axis=-1)
    return out[:, ::-1] if flip else out


@pytest.mark.parametrize("sampler", ["marginal", "fixed_delay"])
def test_views_show_the_planned_frames_crops_and_flips(store, sampler):
    batches = collect(views(store, sampler=sampler))
    assert batches.shape == (5, 2, 3, SIZE, SIZE, 3) and batches.dtype == np.uint8
    seen = []
    for i, example in enumerate(batches.reshape(-1, 3, SIZE, SIZE, 3)):
        video, plan = planned(3, i, sampler)
        seen.append(video)
        for view, frame, box, flip in zip(example, plan.frames, plan.boxes, plan.flips, strict=True):
            expected = cut(picture(video, int(frame), *VIDEOS[video][2:]), box, flip)
            error = np.abs(view - expected)
            assert error.mean() < 1.5 and error.max() < 8  # JPEG and rounding
    # Two whole epochs and a half: each holds every usable video once.
    assert sorted(seen[:4]) == sorted(seen[4:8]) == USABLE


def test_a_batch_may_hold_views_of_several_sizes(store):
    """Two global views at 32 px and three local ones at 8: the bytes that a batch of one size has of the same crops."""

    def example(i: int):
        video, plan = planned(0, i, views=5)
        return decode.from_store(store, video, plan)

    def batch(pictures, image_size):
        options = dict(rows=4, pictures=pictures, image_size=image_size, decode=decode.decode_jpeg)
        return next(decode.decoded(example, 0, 4, **options))

    both = batch({"views": (2,), "local_views": (3,)}, {"views": 32, "local_views": 8})
    np.testing.assert_array_equal(both["views"], batch({"all": (5,)}, 32)["all"][:, :2])
    np.testing.assert_array_equal(both["local_views"], batch({"all": (5,)}, 8)["all"][:, 2:])


def test_no_batch_holds_a_video_twice_where_epochs_end(store):
    """Four videos in batches of three: each three times in four batches, and never twice in one."""
    run = collect(views(store, views=1, batch_size=3, num_steps=8))
    videos = np.rint(run[..., 2].mean((2, 3, 4)) // 50).astype(int)
    assert all(len(set(batch)) == 3 for batch in videos.tolist())
    np.testing.assert_array_equal(np.sort(videos.reshape(6, 4), axis=1), [USABLE] * 6)
    np.testing.assert_array_equal(collect(views(store, views=1, batch_size=3, first_step=5, num_steps=3)), run[5:])


def test_the_door_of_the_earlier_version_gives_the_same_batches(store):
    found = pipeline.clip_views(store, 2, **OPTIONS, num_steps=3, threads=1)
    np.testing.assert_array_equal(collect(found), collect(views(store))[2:])
    second = pipeline.clip_views(store, **OPTIONS, num_steps=1, process_index=1, process_count=2)
    np.testing.assert_array_equal(collect(second)[0], collect(views(store))[0, 1:])


def test_single_takes_all_views_from_one_frame_and_uses_short_videos_too(store):
    blue = collect(views(store, sampler="single", num_steps=5))[..., 2].reshape(10, -1).astype(float)
    assert (blue.std(axis=1) < 2).all()
    videos = np.rint(blue.mean(axis=1) // 50).astype(int)
    assert set(videos[:5].tolist()) == set(range(5))


def test_starting_at_a_step_equals_running_up_to_it(store):
    run = collect(views(store, num_steps=7))
    for start in (1, 4, 6):
        np.testing.assert_array_equal(collect(views(store, first_step=start, num_steps=7 - start)), run[start:])
    endless = itertools.islice(views(store, first_step=2, num_steps=None), 3)
    np.testing.assert_array_equal(collect(endless), run[2:5])


def test_starting_far_out_costs_nothing(store):
    assert len(collect(views(store, first_step=10**12, num_steps=1))) == 1  # 10^12 steps of any work would not end


@pytest.mark.parametrize("processes,threads", [(2, 1), (4, 3)])
def test_shares_of_processes_join_to_the_batch_of_one(store, processes, threads):
    one = collect(views(store, batch_size=4, num_steps=3))
    shares = [
        collect(views(store, batch_size=4, num_steps=3, process_index=p, process_count=processes, threads=threads))
        for p in range(processes)
    ]
    assert shares[0].shape[1] == 4 // processes
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), one)


def test_shares_of_processes_resume_too(store):
    run = collect(views(store, batch_size=4, num_steps=3))
    share = collect(views(store, batch_size=4, first_step=2, num_steps=1, process_index=1, process_count=2))
    np.testing.assert_array_equal(share[0], run[2, 2:])


def test_a_slow_read_changes_nothing(tmp_path, store):
    slow = FrameStore(store.directory)
    started = []

    def read(records):
        started.append(len(started))
        time.sleep(0.5 if started[-1] == 0 else 0)  # the first example is overtaken by the others
        return FrameStore.read(slow, records)

    slow.read = read
    np.testing.assert_array_equal(collect(views(slow, threads=4)), collect(views(store)))


def test_the_seed_changes_everything(store):
    a, b = collect(views(store)), collect(views(store, seed=4))
    assert not any(np.array_equal(x, y) for x, y in zip(a.reshape(10, -1), b.reshape(10, -1), strict=True))


def test_only_the_frames_used_are_read(tmp_path):
    store = make_store(tmp_path / "store")
    reads, read = [], store.read

    def recorded(records):
        reads.extend(np.ravel(records).tolist())
        return read(records)

    store.read = recorded
    collect(views(store, threads=1))
    expected = []
    for i in range(10):
        video, plan = planned(3, i)
        expected += (store.first_record[video] + plan.frames).tolist()
    assert sorted(reads) == sorted(expected)


def test_short_videos_are_counted_in_one_line(store, caplog):
    with caplog.at_level(logging.WARNING, logger="input_pipeline"):
        views(store)
    [record] = caplog.records
    assert record.getMessage() == (
        "1 of 5 videos are not used, shorter than clip_seconds=2.56 (v2.mp4 lasts 0.80 s): "
        "lower clip_seconds or prepare longer videos"
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            dict(batch_size=6),
            "4 usable videos in .*, fewer than a batch of 6: lower --config.batch_size .to 4., or prep",
        ),
        (dict(clip_seconds=60), "all 5 videos of .* are shorter than clip_seconds=60 .*: lower clip_seconds"),
        (dict(sampler="marginl"), "sampler='marginl' is unknown; did you mean 'marginal'"),
        (dict(clip_seconds=-5), "clip_seconds=-5: it is a length, above 0"),
        (dict(sampler="single", clip_seconds=-5), "clip_seconds=-5: it is a length, above 0"),
        (dict(sampler="single", delay_seconds=-1), "delay_seconds=-1: it is a time, 0 or more"),
        (
            dict(sampler="fixed_delay", delay_seconds=2),
            "3 views by 'fixed_delay' need 101 frames, .* has 64: raise clip",
        ),
        (dict(batch_size=3, process_count=2), "batch_size=3 does not divide among 2 processes"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(min_crop_area=40), "min_crop_area=40"),
    ],
)
def test_impossible_requests_are_refused_before_the_first_batch(store, changes, message):
    with pytest.raises((ConfigError, DataError), match=message) as e:
        views(store, **changes)
    assert "\n" not in str(e.value)


def test_a_damaged_frame_is_named(tmp_path):
    store = make_store(tmp_path / "store", damaged=1)
    seed = next(seed for seed in range(100) if sampling.pick(seed, 3, len(USABLE)) == USABLE.index(1))
    batches = views(store, seed=seed)
    next(batches)  # examples 0 and 1; the damaged one is example 3
    with pytest.raises(DataError, match=r"store: frame \d+ of v1\.mp4 is damaged and does not decode") as e:
        next(batches)
    assert "\n" not in str(e.value)


def test_resizing_uses_the_stated_kernel_and_rounds():
    """Enlarging an edge 2x shows the cubic's weights: a = -0.75 at distances 0.25, 0.75, 1.25, 1.75."""
    a = -0.75

    def kernel(t: float) -> float:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 200
    row = decode.finish([edge], [False], [0], 16)[0, 5, :, 0]
    bright = [sum(kernel(abs((c + 0.5) / 2 - 0.5 - x)) for x in range(4, 9)) * 200 for c in range(4, 12)]
    np.testing.assert_array_equal(row[4:12], np.clip(np.rint(bright), 0, 255))


def write_images(directory: pathlib.Path) -> pathlib.Path:
    for k in range(6):
        folder = directory / ("even" if k % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        rgb = picture(k % 5, 2 * k, 60 + k, 90)
        data = jpeg(rgb) if k < 3 else cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
        (folder / f"{k}.{'jpg' if k < 3 else 'png'}").write_bytes(data)
    return directory


def test_image_views_are_crops_of_one_image(tmp_path):
    labelled = images.load_folder(write_images(tmp_path / "images"))
    options = dict(seed=5, batch_size=3, views=2, image_size=SIZE, min_crop_area=0.08)
    run = collect(run_stream(image_views, labelled, **options, num_steps=4))
    assert run.shape == (4, 3, 2, SIZE, SIZE, 3)
    for i, example in enumerate(run.reshape(-1, 2, SIZE, SIZE, 3)):
        image = sampling.pick(5, i, 6)
        k = int(re.search(r"(\d)\.(jpg|png)", labelled.name(image))[1])
        plan = sampling.plan_views(
            sampling.example_rng(5, i),
            num_frames=1,
            clip_frames=1,
            height=60 + k,
            width=90,
            views=2,
            sampler="single",
            delay=0,
            min_crop_area=0.08,
        )
        for view, box, flip in zip(example, plan.boxes, plan.flips, strict=True):
            assert np.abs(view - cut(picture(k % 5, 2 * k, 60 + k, 90), box, flip)).mean() < 1.5
    resumed = run_stream(image_views, labelled, first_step=2, **options, num_steps=2)
    np.testing.assert_array_equal(collect(resumed), run[2:])


def test_a_damaged_image_is_named(tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "odd" / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(DataError, match=r"odd/5\.png is damaged and does not decode"):
        collect(
            run_stream(
                image_views,
                images.load_folder(folder),
                seed=0,
                batch_size=6,
                views=2,
                image_size=SIZE,
                min_crop_area=0.08,
                num_steps=1,
            )
        )
    with pytest.raises(DataError, match="6 images in .*, fewer than a batch of 8"):
        run_stream(
            image_views, images.load_folder(folder), seed=0, batch_size=8, views=2, image_size=SIZE, min_crop_area=0.08
        )


@pytest.mark.slow
def test_a_process_that_stops_in_the_middle_exits_cleanly(store):
    program = f"""
import time
from input_pipeline.store import FrameStore
from input_pipeline.streams.order import Order
from input_pipeline.streams.views import clip_views
store = FrameStore({store.directory!r})
read = store.read
store.read = lambda records: (time.sleep(0.2), read(records))[1]  # so that threads are at work when the program ends
batches = clip_views(store, Order(0, 4), views=3, sampler="marginal", clip_seconds=2.56,
                     delay_seconds=0, image_size=64, min_crop_area=0.4)(threads=4)
next(batches)
print("one batch", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "one batch\n"), done.stderr[-2000:]
