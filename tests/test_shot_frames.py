"""VIVI's streams on real frame stores and folders: shots in order, frames at the rate asked for, balanced labels."""

import collections
import logging
import pathlib
import re

import numpy as np
import pytest
import scipy.stats

from helpers.frame_stores import jpeg, write_store
from helpers.streams import run_stream
from input_pipeline import images
from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams.shots import image_frames, shot_frames
from input_pipeline.streams.views import labelled_images
from vivi_jax.errors import ConfigError, DataError

SIZE = 16
# (frames per second, lengths of the shots in frames)
VIDEOS = [(4, [13, 20, 9]), (2, [8, 8, 8, 8]), (4, [30]), (4, [12, 2, 12]), (1, [6, 7]), (4, [9, 9])]


def picture(video: int, frame: int) -> np.ndarray:
    """Red tells the video, green the frame; blue grows from left to right, which tells crops and flips."""
    blue = np.broadcast_to(np.linspace(60, 190, 40), (30, 40))
    return np.stack([np.full((30, 40), 20 + 30 * video), np.full((30, 40), 20 + 5 * frame), blue], -1).astype(np.uint8)


def make_store(directory: pathlib.Path, videos=VIDEOS) -> FrameStore:
    rows = [
        dict(frames=sum(lengths), fps=fps, height=30, width=40, shot_starts=[0, *np.cumsum(lengths)[:-1].tolist()])
        for fps, lengths in videos
    ]
    return write_store(
        directory, rows, [jpeg(picture(v, k)) for v, (_, lengths) in enumerate(videos) for k in range(sum(lengths))]
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def stream(store, **changes):
    options = dict(
        seed=7,
        batch_size=2,
        shots=2,
        frames=3,
        frame_rate=1,
        min_shot_seconds=0,
        sampler="consecutive",
        image_size=SIZE,
        min_crop_area=0.08,
        num_steps=10,
    )
    return run_stream(shot_frames, store, **options | changes)


def collect(batches) -> np.ndarray:
    return np.stack([batch["shots"] for batch in batches])  # [steps, n, K, M, H, W, 3]


def shown(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which video and which frame [..., H, W, 3] pixels come from."""
    red, green = pixels[..., 0].mean((-2, -1)), pixels[..., 1].mean((-2, -1))
    return np.rint((red - 20) / 30).astype(int), np.rint((green - 20) / 5).astype(int)


def shot_of(video: int, frame: int) -> int:
    return int(np.searchsorted(np.cumsum(VIDEOS[video][1]), frame, side="right"))


def test_frames_are_consecutive_within_consecutive_shots(store):
    batches = collect(stream(store, num_steps=40))
    assert batches.shape == (40, 2, 2, 3, SIZE, SIZE, 3) and batches.dtype == np.uint8
    video, frame = shown(batches.reshape(-1, 2, 3, SIZE, SIZE, 3))
    assert (video == video[:, :1, :1]).all()
    first_shots = collections.defaultdict(set)
    for v, frame_KxM in zip(video[:, 0, 0], frame, strict=True):
        np.testing.assert_array_equal(np.diff(frame_KxM, axis=1), VIDEOS[v][0])  # 1 Hz is `fps` frames apart
        shots = [[shot_of(v, f) for f in row] for row in frame_KxM]
        assert all(len(set(row)) == 1 for row in shots) and shots[1][0] == shots[0][0] + 1
        first_shots[int(v)].add(shots[0][0])
    # 3 frames at 1 Hz: videos 2 (one shot) and 3 (a short shot between) have no two such shots in a row.
    assert first_shots == {0: {0, 1}, 1: {0, 1, 2}, 4: {0}, 5: {0}}


def test_every_usable_video_once_per_epoch(store):
    video, _ = shown(collect(stream(store)).reshape(20, 2, 3, SIZE, SIZE, 3))
    epochs = video[:, 0, 0].reshape(5, 4)
    np.testing.assert_array_equal(np.sort(epochs), [[0, 1, 4, 5]] * 5)
    assert len(np.unique(epochs, axis=0)) > 1


@pytest.mark.parametrize("sampler, usable, changes", [("consecutive", 4, {}), ("single", 6, dict(shots=1))])
def test_no_batch_holds_a_video_twice_where_epochs_end(store, sampler, usable, changes):
    size = usable - 1
    batches = collect(stream(store, sampler=sampler, batch_size=size, num_steps=2 * usable, **changes))
    video = shown(batches)[0][:, :, 0, 0]
    assert all(len(set(batch)) == size for batch in video.tolist())
    assert set(np.bincount(video.ravel()).tolist()) <= {0, 2 * size}


def test_short_shots_are_passed_over(store):
    """Of video 3, with shots of 3, 0.5 and 3 s, the short one: the two others are neighbours then."""

    def shots_seen(video: int, **changes) -> set[tuple[int, ...]]:
        batches = collect(stream(store, batch_size=4, **changes)).reshape(-1, 2, 3, SIZE, SIZE, 3)
        found, frames = shown(batches)
        return {tuple(shot_of(video, row[0]) for row in frames[i]) for i in np.flatnonzero(found[:, 0, 0] == video)}

    assert shots_seen(3) == shots_seen(3, min_shot_seconds=0.5) == set()
    assert shots_seen(3, min_shot_seconds=0.51) == {(0, 2)}
    # Video 0 has shots of 3.25, 5 and 2.25 s.
    assert shots_seen(0, min_shot_seconds=0.51) == shots_seen(0, min_shot_seconds=2.25) == {(0, 1), (1, 2)}
    assert shots_seen(0, min_shot_seconds=3) == {(0, 1)}


def test_place_and_start_are_uniform():
    """2 frames 2 apart of each of 2 shots of 5 frames and more: 3 positions, 3 and more starts in each shot."""
    ranges = np.array([(0, 5), (5, 11), (11, 16), (16, 21)])
    counts = collections.Counter()
    for i in range(3000):
        plan = sampling.plan_shots(
            sampling.example_rng(0, i),
            ranges_Sx2=ranges,
            positions=np.array([0, 1, 2]),
            shots=2,
            frames=2,
            step=2,
            height=30,
            width=40,
            min_crop_area=0.5,
        )
        counts[tuple(plan.frames.tolist())] += 1
    expected = {
        (a, a + 2, b, b + 2): 1000 / (na * nb)
        for (sa, na), (sb, nb) in [((0, 3), (5, 4)), ((5, 4), (11, 3)), ((11, 3), (16, 3))]
        for a in range(sa, sa + na)
        for b in range(sb, sb + nb)
    }
    assert counts.keys() == expected.keys()
    assert scipy.stats.chisquare([counts[k] for k in expected], list(expected.values())).pvalue > 1e-3


def test_every_frame_has_its_own_crop_and_flip(store):
    shots = collect(stream(store)).astype(float)[..., 2]  # blue, [steps, n, K, M, H, W]
    rising = (shots[..., -1].mean(-1) > shots[..., 0].mean(-1)).reshape(20, 6)
    assert 0.3 < rising.mean() < 0.7 and not (rising == rising[:, :1]).all()
    middle = shots.mean((-2, -1)).reshape(20, 6)
    assert np.mean([len(np.unique(row)) for row in middle]) > 5


def test_starting_at_a_step_and_shares_of_processes(store):
    run = collect(stream(store, num_steps=5))
    np.testing.assert_array_equal(collect(stream(store, first_step=3, num_steps=2)), run[3:])
    shares = [
        collect(stream(store, first_step=1, num_steps=2, process_index=p, process_count=2, threads=p + 1))
        for p in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), run[1:3])
    other = collect(stream(store, seed=8, num_steps=5))
    assert not any(np.array_equal(a, b) for a, b in zip(run.reshape(10, -1), other.reshape(10, -1), strict=True))


def test_single_shows_one_frame_per_video_in_every_epoch(store):
    batches = collect(stream(store, sampler="single", shots=1, frames=4, batch_size=6, num_steps=3))
    assert batches.shape == (3, 6, 1, 4, SIZE, SIZE, 3)
    video, frame = shown(batches.reshape(18, 4, SIZE, SIZE, 3))
    assert (frame == frame[:, :1]).all()
    seen = {(v, f) for v, f in zip(video[:, 0].tolist(), frame[:, 0].tolist(), strict=True)}
    assert sorted(v for v, _ in seen) == list(range(6))  # of three epochs
    middle = batches.astype(float)[..., 2].mean((-2, -1)).reshape(18, 4)
    assert np.mean([len(np.unique(row)) for row in middle]) > 3.5  # crops that are clamped to the frame can be equal


def test_videos_that_are_dropped_are_counted_in_one_line(store, caplog):
    with caplog.at_level(logging.WARNING, logger="input_pipeline"):
        stream(store)
    [record] = caplog.records
    assert record.getMessage() == (
        "2 of 6 videos are not used: 1 with fewer than shots=2, 1 without so many "
        "consecutive ones of frames=3 at frame_rate=1 Hz"
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(shots=3, frames=4, batch_size=2),
        dict(shots=5, frames=1, batch_size=1),
        dict(shots=2, frames=8, batch_size=2),
        dict(shots=2, frames=3, frame_rate=8, batch_size=4),
        dict(shots=3, frames=2, batch_size=3),
        dict(shots=1, frames=8, batch_size=2),
        dict(shots=2, frames=6, frame_rate=2, batch_size=5),
    ],
)
def test_what_the_message_says_is_possible_is_so_and_nothing_more(store, changes):
    with pytest.raises(DataError, match=r"\d of 6 videos in .* have shots=\d consecutive shots of frames=\d") as e:
        stream(store, **changes)
    assert "\n" not in str(e.value)
    found = re.search("possible is one of (.*), or prepare more", str(e.value))
    offered = found[1] if found else ""
    for name, value in re.findall(r"(shots|frames|frame_rate)=([\d.]+)", offered):
        value = float(value) if name == "frame_rate" else int(value)
        stream(store, **changes | {name: value})
        beyond = value * 0.6 if name == "frame_rate" else value + 1
        with pytest.raises(DataError):
            stream(store, **changes | {name: beyond})
    for name in ("shots", "frames"):  # what is not offered is not possible at all, or too little for VIVI's losses
        if f"{name}=" not in offered and changes[name] > 2:
            with pytest.raises(DataError):
                stream(store, **changes | {name: 2})
    assert not re.search(r"(shots|frames|batch_size)=1\b", offered)
    # What goes with the numbers as asked is offered too: as many videos as there are.
    videos = int(re.match(r"\d", str(e.value))[0])
    assert (f"batch_size={videos}" in offered) == (videos >= 2)
    if videos >= 2:
        stream(store, **changes | {"batch_size": videos})


def test_a_smaller_batch_is_offered_in_whole_shares_of_the_processes(store):
    with pytest.raises(DataError, match="4 of 6 videos .*batch_size=3, or prepare more"):
        stream(store, shots=1, frames=4, batch_size=6, process_count=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sampler="singel"), "sampler='singel' is unknown; did you mean 'single'"),
        (dict(sampler="single"), "sampler 'single' takes one frame of a video, so shots must be 1, not 2"),
        (dict(sampler="single", shots=1, batch_size=7), "6 videos in .*, fewer than a batch of 7"),
        (dict(frames=0), "frames=0"),
        (dict(shots=0), "shots=0"),
        (dict(frame_rate=0), "frame_rate=0"),
        (dict(min_shot_seconds=-1), "min_shot_seconds=-1"),
        (dict(sampler="single", shots=1, frame_rate=-1), "frame_rate=-1"),
        (dict(batch_size=3, process_count=2), "does not divide among 2 processes"),
        (dict(min_crop_area=2), "min_crop"),
    ],
)
def test_impossible_requests_are_refused_before_the_first_batch(store, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        stream(store, **changes)


# --- still images -----------------------------------------------------------------------------------------------------

COUNTS = {"a": 24, "b": 10, "c": 6}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> images.LabelledImages:
    root = tmp_path_factory.mktemp("images")
    for v, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir()
        for k in range(count):
            (root / name / f"{k:02d}.jpg").write_bytes(jpeg(picture(v, k)))
    return images.load_folder(root)


def label_stream(labelled, **changes):
    options = dict(seed=7, batch_size=4, fraction=1.0, image_size=SIZE, min_crop_area=0.08, num_steps=10)
    return run_stream(labelled_images, labelled, **options | changes)


def epoch(labelled, fraction: float, count: int, **changes) -> list[tuple[int, int]]:
    """(class, number) of all images of the first epoch."""
    batches = list(label_stream(labelled, fraction=fraction, batch_size=count, num_steps=1, **changes))
    video, frame = shown(batches[0]["image"])
    np.testing.assert_array_equal(video, batches[0]["label"])
    return list(zip(video.tolist(), frame.tolist(), strict=True))


def test_labels_belong_to_their_images_and_each_comes_once_per_epoch(labelled):
    batches = list(label_stream(labelled))
    assert batches[0]["image"].shape == (4, SIZE, SIZE, 3) and batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32
    video, frame = shown(np.concatenate([batch["image"] for batch in batches]))
    np.testing.assert_array_equal(video, np.concatenate([batch["label"] for batch in batches]))
    assert sorted(zip(video.tolist(), frame.tolist(), strict=True)) == [
        (v, k) for v, count in enumerate(COUNTS.values()) for k in range(count)
    ]


def test_no_batch_holds_an_image_twice_where_epochs_end(labelled):
    for batches in (
        label_stream(labelled, batch_size=27, num_steps=12),
        run_stream(
            image_frames,
            labelled,
            shots=1,
            frames=1,
            seed=7,
            batch_size=27,
            image_size=SIZE,
            min_crop_area=1.0,
            num_steps=12,
        ),
    ):
        pixels = [batch["image"] if "image" in batch else batch["shots"][:, 0, 0] for batch in batches]
        seen = [list(zip(*(values.tolist() for values in shown(batch)), strict=True)) for batch in pixels]
        assert all(len(set(batch)) == 27 for batch in seen)
        assert set(sum(seen[:3], [])) == {(v, k) for v, count in enumerate(COUNTS.values()) for k in range(count)}


def test_a_fraction_is_balanced_nested_and_chosen_by_the_seed(labelled):
    small, large = epoch(labelled, 0.225, 9), epoch(labelled, 0.6, 22)
    assert collections.Counter(v for v, _ in small) == {0: 3, 1: 3, 2: 3}
    assert collections.Counter(v for v, _ in large) == {0: 8, 1: 8, 2: 6}  # of the smallest class, all there are
    assert set(small) < set(large)
    assert set(epoch(labelled, 0.225, 9, seed=8)) != set(small)


def test_labelled_stream_resumes_and_is_shared(labelled):
    run = list(label_stream(labelled, num_steps=4, fraction=0.3))
    late = list(label_stream(labelled, first_step=2, num_steps=2, fraction=0.3))
    shares = [
        list(label_stream(labelled, first_step=2, num_steps=2, fraction=0.3, process_index=p, process_count=2))
        for p in range(2)
    ]
    for name in ("image", "label"):
        for step in range(2):
            np.testing.assert_array_equal(late[step][name], run[2 + step][name])
            np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), run[2 + step][name])


def test_crops_of_the_two_streams_are_drawn_apart(labelled):
    """The same seed and as many images as there are videos must not give the same order."""
    one, other = (sampling.epoch_order(seed, 0, 40) for seed in (7, 7 + 2**63))
    first = [shown(batch["image"])[1] for batch in label_stream(labelled)]
    order = [int(re.search(r"(\d\d)\.jpg", labelled.name(int(i)))[1]) for i in other]
    np.testing.assert_array_equal(np.concatenate(first), order)
    assert (one != other).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(fraction=0.03),
            r"fraction=0.03 of 40 images of .* leaves class 'a' empty, .*: the smallest that works is "
            r"0\.0375",
        ),
        (dict(fraction=0), "fraction=0: it is a share"),
        (dict(fraction=10), "fraction=10: it is a share"),
        (
            dict(batch_size=41),
            "40 labelled images .*, fewer than a batch of 41: lower --config.data.labelled_batch_size .to 32., or",
        ),
    ],
)
def test_impossible_fractions_are_refused(labelled, changes, message):
    with pytest.raises(DataError, match=message):
        label_stream(labelled, **changes)
    if "fraction" in changes:
        assert len(epoch(labelled, 0.0375, 3)) == 3


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_outside_the_classes_are_refused(labelled, wrong):
    labels = labelled.labels.copy()
    labels[5] = wrong
    damaged = images.LabelledImages(labelled.source, labels, labelled.class_names, labelled.read, labelled.name)
    with pytest.raises(DataError, match=f"1 labels are outside the 3 classes of .*, the first is {wrong} of .*05.jpg"):
        label_stream(damaged)


def test_still_images_take_the_form_of_shots(labelled):
    options = dict(seed=7, batch_size=3, frames=4, image_size=SIZE, min_crop_area=0.08, num_steps=1)
    [batch] = run_stream(image_frames, labelled, shots=1, **options)
    assert batch["shots"].shape == (3, 1, 4, SIZE, SIZE, 3)
    video, frame = shown(batch["shots"])
    assert (video == video[..., :1]).all() and (frame == frame[..., :1]).all()
    with pytest.raises(DataError, match="an image is one shot, so shots must be 1, not 2"):
        run_stream(image_frames, labelled, shots=2, **options)
