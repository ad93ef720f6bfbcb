"""Rendered scenes: real video files, the same for a seed, whose class is the shape of the object and nothing else."""

import av
import cv2
import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.neighbors

from helpers.commands import run_module
from helpers.folders import digests
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.rendered import shapes
from input_pipeline.store import FrameStore
from input_pipeline.streams.order import Order
from input_pipeline.streams.shots import shot_frames
from vivi_jax.errors import ConfigError, DataError

SHAPES = list(shapes.SHAPES)


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    out = tmp_path_factory.mktemp("rendered") / "videos"
    shapes.write_videos(out, videos=20, seed=3, size=64, seconds=1.0, classes=("ring", "star", "heart"), workers=2)
    return out


@pytest.fixture(scope="module")
def single_frames():
    """One frame of each of 1000 shots: (frames uint8[N, 48, 48, 3], the same without the object, class int[N])."""
    frames, empty, labels = [], [], []
    for i in range(1000):
        contours = shapes.unit_shape(SHAPES[i % len(SHAPES)])
        frames.append(shapes.render_shot(np.random.default_rng([9, i]), contours, size=48, frames=1)[0])
        empty.append(shapes.render_shot(np.random.default_rng([9, i]), [], size=48, frames=1)[0])
        labels.append(i % len(SHAPES))
    return np.stack(frames), np.stack(empty), np.array(labels)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_unit_area_and_its_centre_of_mass_at_the_origin(name):
    contours = [np.round(c * 400 + 800).astype(np.int32) for c in shapes.unit_shape(name)]
    mask = cv2.fillPoly(np.zeros((1600, 1600), np.uint8), contours, 1)
    ys, xs = np.nonzero(mask)
    assert mask.sum() / 400**2 == pytest.approx(1, abs=0.02)
    assert np.mean(xs) == pytest.approx(800, abs=2)
    assert np.mean(ys) == pytest.approx(800, abs=2)


def test_files_are_real_videos_in_class_folders(videos):
    counts = {
        split: {c.name: len(list(c.glob("*.mp4"))) for c in (videos / split).iterdir()} for split in ("train", "test")
    }
    assert counts == {"train": {"ring": 5, "star": 5, "heart": 5}, "test": {"ring": 2, "star": 2, "heart": 1}}
    stream, frames = decode(next((videos / "test" / "ring").glob("*.mp4")))
    assert stream.codec_context.name == "h264"
    assert stream.average_rate == 25
    assert frames.shape == (25, 64, 64, 3)


def test_encoding_keeps_the_pictures(videos):
    rng = np.random.default_rng([3, 0, 1])  # seed, train, video 1
    rendered = shapes.render_video(rng, "star", size=64, frames=25, shots=1)
    _, decoded = decode(videos / "train" / "star" / "00001.mp4")
    assert np.abs(rendered.astype(int) - decoded).mean() < 5  # of 255


def test_files_depend_on_the_seed_and_not_on_the_workers(videos, tmp_path):
    settings = dict(videos=20, size=64, seconds=1.0, classes=("ring", "star", "heart"), workers=1)
    shapes.write_videos(tmp_path / "same", seed=3, **settings)
    shapes.write_videos(tmp_path / "other", seed=4, **settings)
    expected = digests(videos, ".mp4")
    assert digests(tmp_path / "same", ".mp4") == expected
    assert not set(digests(tmp_path / "other", ".mp4").values()) & set(expected.values())
    assert len(set(expected.values())) == 20  # nor do two videos of one seed show the same scene


def test_rendering_goes_on_after_an_interruption(videos, tmp_path):
    settings = dict(seed=3, size=64, seconds=1.0, classes=("ring", "star", "heart"), workers=1)
    shapes.write_videos(tmp_path, videos=20, **settings)
    kept, lost = tmp_path / "train/ring/00000.mp4", tmp_path / "test/heart/00002.mp4"
    lost.rename(lost.with_name(f".{lost.name}.partial"))  # what a kill leaves behind
    before = kept.stat().st_mtime_ns
    shapes.write_videos(tmp_path, videos=20, **settings)
    assert digests(tmp_path, ".mp4") == digests(videos, ".mp4")
    assert kept.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ConfigError, match="other values"):
        shapes.write_videos(tmp_path, videos=24, **settings)
    assert digests(tmp_path, ".mp4") == digests(videos, ".mp4")


def test_scene_does_not_depend_on_the_shape():
    """The same random numbers give the same background, light and place whatever the object is."""
    a, b, empty = (
        shapes.render_shot(np.random.default_rng(5), contours, size=96, frames=3)
        for contours in (shapes.unit_shape("disc"), shapes.unit_shape("cross"), [])
    )
    same = (a == empty).all(axis=-1)
    assert same[:, :10].any()
    np.testing.assert_array_equal(b[same & (b == empty).all(-1)], a[same & (b == empty).all(-1)])
    for t in range(3):
        centres = [np.argwhere(np.abs(v[t].astype(int) - empty[t]).sum(-1) > 60).mean(0) for v in (a, b)]
        np.testing.assert_allclose(centres[0], centres[1], atol=3)  # pixels of 96; the shadow shifts both


def features_of(kind, frames, empty):
    pixels = frames.reshape(len(frames), -1, 3)
    if kind == "mean colour":
        return pixels.mean(1)
    if kind == "colour histogram":
        return np.stack([np.histogramdd(p, bins=(4, 4, 4), range=((0, 256),) * 3)[0].ravel() for p in pixels])
    change = np.abs(frames.astype(int) - empty).sum(-1) > 60
    moments = [cv2.moments(c.astype(np.uint8), binaryImage=True) for c in change]
    if kind == "position":
        return np.array([(m["m10"], m["m01"]) for m in moments]) / [[max(m["m00"], 1)] for m in moments]
    return -np.log(np.abs([cv2.HuMoments(m).ravel() for m in moments]) + 1e-12)  # "shape"


@pytest.mark.parametrize(
    "classifier",
    [sklearn.neighbors.KNeighborsClassifier(10), sklearn.linear_model.LogisticRegression(max_iter=300)],
    ids=["knn", "linear"],
)
@pytest.mark.parametrize("kind", ["mean colour", "colour histogram", "position", "shape"])
def test_class_is_told_by_shape_and_not_by_colour_or_position(single_frames, kind, classifier):
    frames, empty, labels = single_frames
    features = features_of(kind, frames, empty)
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    correct = (classifier.fit(features[:500], labels[:500]).predict(features[500:]) == labels[500:]).sum()
    low, high = scipy.stats.binom.interval(0.999, 500, 1 / len(SHAPES))
    if kind == "shape":
        assert correct > 2 * high
    else:
        assert low <= correct <= high


def test_within_a_clip_colour_and_place_drift():
    """Frames of one clip 0.76 s apart (VITO's median) differ in mean colour nearly as much as those of two clips."""
    clips = [
        shapes.render_shot(np.random.default_rng([1, i]), shapes.unit_shape("disc"), size=32, frames=64)
        for i in range(40)
    ]
    colour = np.stack([clip.mean((1, 2)) for clip in clips])  # [clips, frames, 3]
    within = np.linalg.norm(colour[:, 19:] - colour[:, :-19], axis=-1).mean()
    between = np.linalg.norm(colour[1:] - colour[:-1], axis=-1).mean()
    step = np.linalg.norm(colour[:, 1:] - colour[:, :-1], axis=-1).mean()
    assert 0.4 * between < within < between
    assert step < 0.1 * between  # and slowly


@pytest.fixture(scope="module")
def shots_of_videos():
    """Shots of 40 videos of 4 shots each: lists of uint8[T, 48, 48, 3]."""
    videos = []
    for i in range(40):
        video = shapes.render_video(
            np.random.default_rng([2, i]), SHAPES[i % len(SHAPES)], size=48, frames=80, shots=4, fps=10
        )
        change = np.abs(np.diff(video.astype(int), axis=0)).mean((1, 2, 3))
        videos.append(np.split(video, np.sort(np.argsort(-change)[:3]) + 1))
    return videos


def test_colours_of_a_shot_tell_nothing_about_the_next_shot_or_the_class(shots_of_videos):
    colour = np.array([[shot.mean((0, 1, 2)) for shot in video] for video in shots_of_videos])  # [videos, shots, 3]
    assert min(len(shot) for video in shots_of_videos for shot in video) >= 16  # four fifths of an equal share
    for channel in range(3):
        r = np.corrcoef(colour[:, :-1, channel].ravel(), colour[:, 1:, channel].ravel())[0, 1]
        assert abs(r) < 5 / np.sqrt(120)
    # Which of all second shots follows a first one cannot be told from the colour: the right one ranks in the middle.
    distance = np.linalg.norm(colour[:, None, 0] - colour[None, :, 1], axis=-1)
    ranks = (distance < np.diag(distance)[:, None]).sum(axis=1)
    assert 0.35 < ranks.mean() / 39 < 0.65


def test_prepare_finds_all_shots_of_real_files_and_the_stream_uses_every_video(tmp_path, caplog):
    shapes.write_videos(
        tmp_path / "videos", videos=16, seed=1, size=64, seconds=8, fps=10, shots=4, classes=("disc", "star")
    )
    prepare(str(tmp_path / "videos"), str(tmp_path / "store"), Settings(short_side=64), labels="folder")
    store = FrameStore(tmp_path / "store")
    assert set(store.fps.tolist()) == {10.0} and set(store.num_frames.tolist()) == {80}
    for v in range(16):
        _, frames = decode(tmp_path / "videos" / str(store.videos[v]))
        cuts = np.sort(np.argsort(-np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3)))[:3]) + 1
        np.testing.assert_array_equal(store.shots(v)[:, 0], [0, *cuts])
    [batch] = shot_frames(
        store,
        Order(0, 16),
        shots=4,
        frames=8,
        frame_rate=5,
        min_shot_seconds=0.32,
        sampler="consecutive",
        image_size=16,
        min_crop_area=0.3,
    )(num_steps=1)
    assert batch["shots"].shape == (16, 4, 8, 16, 16, 3) and not caplog.records


def test_the_object_is_larger_in_each_later_shot(monkeypatch):
    sides = []
    render_scene = shapes.render_scene
    monkeypatch.setattr(
        shapes,
        "render_scene",
        lambda rng, contours, pose, **kw: sides.append(pose.side.mean()) or render_scene(rng, contours, pose, **kw),
    )
    monkeypatch.setattr(shapes, "cuts_are_clear", lambda video, cuts: True)  # so that every draw is a shot
    for seed in range(10):
        shapes.render_video(np.random.default_rng(seed), "star", size=64, frames=40, shots=4, fps=10)
    ratios = np.array(sides).reshape(10, 4)[:, [0, 3]]
    assert np.exp(np.log(ratios[:, 1] / ratios[:, 0]).mean()) == pytest.approx(shapes.ZOOM, rel=0.15)


def test_shots_are_hard_cuts():
    for shots in (1, 2, 4):
        video = shapes.render_video(np.random.default_rng(shots), "star", size=64, frames=75, shots=shots)
        assert len(video) == 75
        change = np.abs(np.diff(video.astype(int), axis=0)).mean((1, 2, 3))
        cuts = np.flatnonzero(change > 15) + 1
        assert len(cuts) == shots - 1
        assert np.diff([0, *cuts, 75]).min() >= 75 // (2 * shots)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(classes=("disc", "dodecahedron")), "classes must be"),
        (dict(classes=("disc",)), "classes must be"),
        (dict(videos=7), "7 videos are too few for 2 classes"),
        (dict(size=33), "size must be even"),
        (dict(seconds=0.8, shots=2), "20 frames .* are too few for 2 shots of at least 9"),
        (dict(fps=0), "fps must be"),
        (dict(shots=0), "too few for 0 shots"),
        (dict(seed=-1), "seed must not be negative"),
    ],
)
def test_impossible_settings_are_named_and_nothing_is_written(tmp_path, change, message):
    settings = dict(videos=8, seed=0, classes=("disc", "star")) | change
    with pytest.raises(DataError, match=message):
        shapes.write_videos(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_command_line_refuses_a_foreign_folder_in_one_line(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_module("input_pipeline.synthetic", f"--out={tmp_path}", "--videos=40")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} exists and is no folder of rendered videos; choose another --out\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]
