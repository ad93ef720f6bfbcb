"""Clips of consecutive frames: the frames asked for, one crop per view, in the order of (seed, step)."""

import itertools
import logging

import numpy as np
import pytest

from helpers.frame_stores import jpeg, write_store
from helpers.streams import run_stream
from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling, windows
from vivi_jax.errors import DataError

SIZE = 16
T = 6
VIDEOS = [(60, 25, 32, 48), (9, 25, 32, 40), (50, 10, 48, 32), (40, 25, 32, 48)]  # frames, fps, height, width


def picture(frame: int, height: int, width: int) -> np.ndarray:
    """Red tells x, green tells y, blue the frame: any crop shows where and when it was cut."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.rint(np.stack([red, green, np.full((height, width), 4 * frame)], axis=-1)).astype(np.uint8)


def frames_of(clips: np.ndarray) -> np.ndarray:
    """Frame number of each picture [..., H, W, 3]."""
    return np.rint(clips[..., 2].mean(axis=(-2, -1)) / 4).astype(int)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FrameStore:
    rows = [
        dict(input=f"c{v % 2}/v{v}.mp4", frames=n, fps=fps, height=h, width=w, label=v % 2)
        for v, (n, fps, h, w) in enumerate(VIDEOS)
    ]
    frames = [jpeg(picture(k, h, w)) for n, _, h, w in VIDEOS for k in range(n)]
    return write_store(tmp_path_factory.mktemp("data") / "store", rows, frames, ("c0", "c1"))


def clip_pairs(store, **changes):
    options = dict(
        seed=3,
        batch_size=4,
        frames=T,
        offset=0,
        downsample=2,
        difference=False,
        image_size=SIZE,
        min_crop_area=0.3,
        flip_prob=0.0,
        rotate=False,
        num_steps=4,
    )
    return run_stream(windows.clip_pairs, store, **options | changes)


def collect(batches) -> dict[str, np.ndarray]:
    batches = list(batches)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize(
    "offset, downsample, difference", [(0, 1, False), (0, 2, False), (T, 3, False), (T, 1, True), (0, 2, True)]
)
def test_views_are_the_frames_of_the_paper(store, offset, downsample, difference):
    batches = collect(clip_pairs(store, offset=offset, downsample=downsample, difference=difference))
    length = 2 * T if difference else T
    assert batches["view1"].shape == (4, 4, T, SIZE, SIZE, 3) and batches["view1"].dtype == np.uint8
    assert batches["view2"].shape == (4, 4, length, SIZE, SIZE, 3)
    window = max(T, offset + downsample * (length - 1) + 1)
    for i, (view1, view2) in enumerate(zip(*(batches[k].reshape(16, -1, SIZE, SIZE, 3) for k in batches), strict=True)):
        last = VIDEOS[sampling.pick(3, i, 4)][0] - 1
        start = frames_of(view1)[0]
        assert 0 <= start <= max(last + 1 - window, 0)
        np.testing.assert_array_equal(frames_of(view1), np.minimum(start + np.arange(T), last))
        expected = np.minimum(start + offset + downsample * np.arange(length), last)
        np.testing.assert_array_equal(frames_of(view2), expected)
    assert len({frames_of(view)[0] for view in batches["view1"].reshape(16, -1, SIZE, SIZE, 3)}) > 5


def test_no_batch_holds_a_video_twice_where_epochs_end(store):
    """A video is known again by its length: the last frame of the longest window possible."""
    batches = clip_pairs(store, batch_size=3, frames=max(frames for frames, *_ in VIDEOS), downsample=1, num_steps=4)
    last = [[int(frames_of(view)[-1]) for view in batch["view1"]] for batch in batches]
    assert len({frames for frames, *_ in VIDEOS}) == 4 and all(len(set(batch)) == 3 for batch in last)


def test_one_crop_and_flip_per_view_and_another_for_the_other_view(store):
    batches = collect(clip_pairs(store, flip_prob=0.5, num_steps=8))
    mirrored = []
    for view1, view2 in zip(*(batches[k].reshape(32, -1, SIZE, SIZE, 3).astype(int) for k in batches), strict=True):
        for view in (view1, view2):
            assert np.abs(view[1:, ..., :2] - view[:1, ..., :2]).max() < 8  # JPEG; frames differ in blue only
        assert np.abs(view1[0, ..., :2] - view2[0, ..., :2]).mean() > 2
        mirrored += [view[0, 0, 0, 0] > view[0, 0, -1, 0] for view in (view1, view2)]
    assert 16 < sum(mirrored) < 48  # of 64, with chance 1/2


def test_plans_cover_all_starts_and_keep_the_area_of_crops():
    offsets = [np.arange(4), 2 + 2 * np.arange(4)]  # a window of 9 frames
    plans = [
        sampling.plan_clips(
            sampling.example_rng(0, i),
            offsets,
            num_frames=12,
            height=120,
            width=120,
            min_crop_area=0.3,
            aspect=windows.AMDIM_ASPECT,
            flip_prob=0.25,
            rotate=True,
        )
        for i in range(800)
    ]
    starts = np.bincount([plan.frames[0] for plan in plans])
    assert len(starts) == 4 and starts.min() > 150  # 200 each, uniform over 0..3
    boxes = np.stack([plan.boxes for plan in plans])
    assert (boxes[:, :4] == boxes[:, :1]).all() and (boxes[:, 4:] == boxes[:, 4:5]).all()
    area = boxes[:, [0, 4], 2] * boxes[:, [0, 4], 3] / 120**2
    assert 0.27 < area.min() < 0.33 and area.max() > 0.85
    aspect = boxes[..., 3] / boxes[..., 2]
    assert 0.68 < aspect.min() < 0.75 and 1.33 < aspect.max() < 1.43
    assert 0.2 < np.mean([plan.flips for plan in plans]) < 0.3
    turns_of = np.stack([plan.turns for plan in plans])
    assert (turns_of[:, :4] == turns_of[:, :1]).all() and (turns_of[:, 4:] == turns_of[:, 4:5]).all()
    turns = np.bincount(turns_of[:, [0, 4]].ravel())
    assert len(turns) == 4 and turns.min() > 330  # 400 each


def test_rotation_turns_whole_views_and_changes_nothing_else(store):
    plain, rotated = collect(clip_pairs(store)), collect(clip_pairs(store, rotate=True))
    turns = []
    for name in plain:
        for before, after in zip(*(x[name].reshape(16, -1, SIZE, SIZE, 3) for x in (plain, rotated)), strict=True):
            turns += [k for k in range(4) if np.array_equal(np.rot90(before, k, axes=(1, 2)), after)]
    assert len(turns) == 32 and set(turns) == {0, 1, 2, 3}
    assert turns[:16] != turns[16:]  # each view has its own


@pytest.mark.parametrize("rotate", [False, True])
def test_resume_and_shares_of_processes_give_the_same_bytes(store, rotate):
    run = collect(clip_pairs(store, rotate=rotate, flip_prob=0.5))
    resumed = collect(
        itertools.islice(clip_pairs(store, first_step=2, rotate=rotate, flip_prob=0.5, num_steps=None), 2)
    )
    shares = [
        collect(clip_pairs(store, rotate=rotate, flip_prob=0.5, process_index=p, process_count=2, threads=p + 1))
        for p in range(2)
    ]
    for name in run:
        np.testing.assert_array_equal(resumed[name], run[name][2:])
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares], axis=1), run[name])


def test_each_needed_frame_is_read_once(store):
    counting, reads = FrameStore(store.directory), []
    counting.read = lambda records: (reads.append(np.ravel(records)), FrameStore.read(counting, records))[1]
    collect(clip_pairs(counting, downsample=1, num_steps=2, threads=1))  # view 2 shows the frames of view 1
    assert len(reads) == 8
    for records in reads:
        assert len(records) == T and (np.diff(records) == 1).all()


def test_short_videos_are_counted_in_one_line(store, caplog):
    with caplog.at_level(logging.WARNING, logger="input_pipeline"):
        clip_pairs(store)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 videos are shorter than a window of 11 frames (c1/v1.mp4 has 9): their last frame is repeated"
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=5), "4 videos in .*, fewer than a batch of 5"),
        (dict(offset=-1), "offset=-1"),
        (dict(frames=0), "frames=0"),
        (dict(downsample=0), "downsample=0"),
        (dict(min_crop_area=0), "min_crop_area=0"),
        (dict(flip_prob=2), "flip_prob=2"),
        (dict(seed=-1), "seed=-1"),
        (dict(batch_size=3, process_count=2), "does not divide among 2 processes"),
    ],
)
def test_impossible_requests_are_refused_at_once(store, changes, message):
    with pytest.raises(DataError, match=message) as e:
        clip_pairs(store, **changes)
    assert "\n" not in str(e.value)


def labelled(store, videos=(0, 2, 3), **changes):
    options = dict(
        seed=1,
        batch_size=2,
        views=2,
        frames=4,
        downsample=1,
        fps=None,
        image_size=SIZE,
        min_crop_area=0.3,
        aspect=(0.7, 1.4),
        flip_prob=0.0,
        num_steps=6,
    )
    return run_stream(windows.labelled_clips, store, np.array(videos), np.array([0, 1, 2]), **options | changes)


def test_labelled_clips_are_adjacent_views_with_the_label_of_their_video(store):
    batches = collect(labelled(store))
    assert batches["clips"].shape == (6, 2, 2, 4, SIZE, SIZE, 3) and batches["label"].dtype == np.int32
    frames = frames_of(batches["clips"]).reshape(12, 8)
    np.testing.assert_array_equal(frames - frames[:, :1], np.tile(np.arange(8), (12, 1)))
    assert batches["label"].ravel().tolist() == [sampling.pick(1, i, 3) for i in range(12)]
    crops = batches["clips"].reshape(12, 2, 4, SIZE, SIZE, 3)[:, :, 0, ..., :2].astype(int)
    assert (np.abs(crops[:, 0] - crops[:, 1]).mean(axis=(1, 2, 3)) > 1).all()  # a crop of its own per view
    resumed = collect(labelled(store, first_step=4, num_steps=2))
    for name in batches:
        np.testing.assert_array_equal(resumed[name], batches[name][4:])


def test_clips_of_a_given_rate_take_the_nearest_frames(store):
    batches = collect(labelled(store, videos=(0, 2, 2), fps=10.0))
    frames, label = frames_of(batches["clips"]).reshape(12, 8), batches["label"].ravel()
    at_25 = (frames - frames[:, :1])[label == 0]
    assert (at_25 == [0, 3, 5, 8, 10, 13, 15, 18]).all() and len(at_25)  # every 2.5th of 25 frames/s
    assert ((frames - frames[:, :1])[label != 0] == np.arange(8)).all()  # the other is at 10 frames/s


@pytest.mark.parametrize("downsample", [2, 4])
def test_down_sampled_views_begin_where_the_others_do(store, downsample):
    batches = collect(labelled(store, videos=(0, 0, 0), views=3, downsample=downsample))
    frames = frames_of(batches["clips"]).reshape(12, 3, 4)
    assert (frames[:, 0, 0] <= 60 - (8 + 3 * downsample + 1)).all()  # the whole window fits
    expected = 4 * np.arange(3)[:, None] + downsample * np.arange(4)
    np.testing.assert_array_equal(frames - frames[:, :1, :1], np.tile(expected, (12, 1, 1)))
    with pytest.raises(DataError, match="downsample=0"):
        labelled(store, downsample=0)


def test_window_starts_in_closed_form():
    assert windows.window_starts(100, 40, stride=32, clips=None).tolist() == [0, 32]
    assert windows.window_starts(104, 40, stride=32, clips=None).tolist() == [0, 32, 64]
    assert windows.window_starts(30, 40, stride=32, clips=None).tolist() == [0]
    assert windows.window_starts(100, 40, stride=None, clips=4).tolist() == [0, 20, 40, 60]
    assert windows.window_starts(30, 40, stride=None, clips=10).tolist() == [0]
    for both in (dict(stride=1, clips=1), dict(stride=None, clips=None)):
        with pytest.raises(DataError, match="give a stride or a number of clips"):
            windows.window_starts(100, 40, **both)


def test_window_batches_show_every_window_of_every_video_once_in_the_middle(store):
    batches = list(
        windows.test_clips(
            store,
            np.array([0, 1, 2]),
            batch_size=4,
            views=2,
            frames=8,
            downsample=1,
            fps=None,
            image_size=SIZE,
            resize=20,
            stride=16,
            clips=None,
        )
    )
    assert [len(batch["video"]) for batch in batches] == [4, 3]
    video = np.concatenate([batch["video"] for batch in batches])
    clips = np.concatenate([batch["clips"] for batch in batches])
    assert clips.shape == (7, 2, 8, SIZE, SIZE, 3)
    assert video.tolist() == [0, 0, 0, 1, 2, 2, 2]  # spans of 16 frames in 60, 9 and 50
    frames = frames_of(clips).reshape(7, 16)
    assert frames[:, 0].tolist() == [0, 16, 32, 0, 0, 16, 32]
    assert frames[3].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] + [8] * 8
    height, width = VIDEOS[0][2:]
    side = round(32 * SIZE / 20)  # 26 of 32 pixels
    for axis, size, along in ((0, width, clips[0, 0, 0, SIZE // 2, :, 0]), (1, height, clips[0, 0, 0, :, 0, 1])):
        low, high = 255 * (size - side) / 2 / (size - 1), 255 * (size + side - 2) / 2 / (size - 1)
        assert abs(along[0] - low) < 6 and abs(along[-1] - high) < 6, axis
