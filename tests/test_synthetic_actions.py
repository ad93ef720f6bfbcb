"""Rendered actions: real video files whose class is the motion and nothing that a frame or a mean shows."""

import hashlib
import pathlib

import numpy as np
import pytest
import scipy.stats
import sklearn.ensemble
import sklearn.linear_model
import sklearn.neighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.commands import run_module
from input_pipeline.preparation.local import Settings, prepare
from input_pipeline.rendered import actions, shapes
from input_pipeline.store import FrameStore
from vivi_jax.errors import ConfigError

ACTIONS = list(actions.ACTIONS)
SIZE, FRAMES, CLIPS = 32, 30, 500


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(clips uint8[N, T, S, S, 3], what of them is the object bool[N, T, S, S], class int[N])."""
    videos, masks = [], []
    for i in range(CLIPS):
        rng = np.random.default_rng([7, i])
        contours = shapes.unit_shape(actions.SHAPE)
        pose = actions.draw_pose(rng, ACTIONS[i % len(ACTIONS)], size=SIZE, frames=FRAMES)
        masks.append([shapes._object_mask(contours, SIZE, *state) > 0.5 for state in zip(*pose, strict=True)])
        every = shapes.Pose(*(path[::10] for path in pose))  # pictures of three frames are enough
        videos.append(shapes.render_scene(rng, contours, every, size=SIZE))
    return np.stack(videos), np.array(masks), np.arange(CLIPS) % len(ACTIONS)


def centres(masks: np.ndarray) -> np.ndarray:
    """Centre of mass [..., 2] of masks [..., S, S]."""
    sums = [(masks.sum(axis=axis) * np.arange(SIZE)).sum(axis=-1) for axis in (-2, -1)]
    return np.stack(sums, axis=-1) / masks.sum(axis=(-2, -1))[..., None]


def motion_features(masks: np.ndarray) -> np.ndarray:
    """What an observer of the motion measures, per clip: float[N, 6]."""
    rows = []
    for clip in masks:
        path = centres(clip) / SIZE
        x, y = (path - path.mean(axis=0)).T
        area = np.log(clip.sum(axis=(1, 2)))
        rows.append(
            [
                x.std(),
                y.std(),
                (x * y).mean() * 100,
                (x[:-1] * np.diff(y) - y[:-1] * np.diff(x)).sum() * 100,
                area.std(),
                (x**2).std() * 100 * np.sign((x * y).mean()),
            ]
        )
    return np.array(rows)


CLASSIFIERS = {
    "5-NN": make_pipeline(StandardScaler(), sklearn.neighbors.KNeighborsClassifier(5)),
    "linear": make_pipeline(StandardScaler(), sklearn.linear_model.LogisticRegression(max_iter=500)),
    "forest": sklearn.ensemble.RandomForestClassifier(100, min_samples_leaf=3, random_state=0, n_jobs=1),
}


def correct(classifier: str, features: np.ndarray, labels: np.ndarray) -> int:
    half = len(labels) // 2
    return int(
        (CLASSIFIERS[classifier].fit(features[:half], labels[:half]).predict(features[half:]) == labels[half:]).sum()
    )


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("kind", ["one frame's place and size", "mean place and size", "mean colour", "one frame"])
def test_frames_and_means_say_nothing_about_the_class(clips, kind, classifier):
    videos, masks, labels = clips
    features = {
        "one frame's place and size": lambda: np.c_[centres(masks[:, 17]), masks[:, 17].sum((1, 2))],
        "mean place and size": lambda: np.c_[centres(masks).mean(axis=1), masks.mean((1, 2, 3))],
        "mean colour": lambda: np.c_[videos.mean((1, 2, 3)), videos.std((1, 2, 3))],
        "one frame": lambda: videos[:, 1, 2::4, 2::4].reshape(len(videos), -1),
    }[kind]()
    low, high = scipy.stats.binom.interval(0.999, CLIPS // 2, 1 / len(ACTIONS))
    assert low <= correct(classifier, features, labels) <= high


def test_motion_tells_the_class(clips):
    _, masks, labels = clips
    assert correct("forest", motion_features(masks), labels) > 0.97 * CLIPS // 2  # two classes alike would give 0.875


def test_every_component_has_one_distribution_at_every_time():
    """x, y and size of 1000 poses per class: Kolmogorov and Smirnov find no difference between classes."""

    def states(action: str, seed: int) -> np.ndarray:
        poses = [actions.draw_pose(np.random.default_rng([i, seed]), action, size=100, frames=14) for i in range(1000)]
        return np.array([[*pose.place[t], pose.side[t]] for pose in poses for t in (0, 13)])

    values = [states(action, seed) for seed, action in enumerate(ACTIONS)]
    for t in (0, 1):
        for action, state in zip(ACTIONS[1:], values[1:], strict=True):
            for component in range(3):
                test = scipy.stats.ks_2samp(values[0][t::2, component], state[t::2, component])
                assert test.pvalue > 1e-4, (t, action, component)


def test_a_class_moves_only_what_it_says():
    for action, runs in actions.ACTIONS.items():
        pose = actions.draw_pose(np.random.default_rng(1), action, size=100, frames=25)
        moved = [np.ptp(path) > 1e-9 for path in (pose.place[:, 0], pose.place[:, 1], pose.side)]
        assert moved == [run is not None for run in runs], action
        assert pose.place.min() > 0 and pose.place.max() < 100


def test_files_are_real_videos_that_can_be_prepared_and_do_not_depend_on_workers(tmp_path):
    options = dict(videos=8, seed=1, size=32, seconds=0.4, classes=("clockwise", "pulsate"))
    for name, workers in (("a", 1), ("b", 2)):
        actions.write_actions(tmp_path / name, workers=workers, **options)
    digests = [
        sorted(
            (str(p.relative_to(tmp_path / name)), hashlib.sha256(p.read_bytes()).hexdigest())
            for p in pathlib.Path(tmp_path / name).rglob("*.mp4")
        )
        for name in "ab"
    ]
    assert digests[0] == digests[1] and len({digest for _, digest in digests[0]}) == 8
    prepare(str(tmp_path / "a" / "train"), str(tmp_path / "store"), Settings(), labels="folder", workers=1)
    store = FrameStore(tmp_path / "store")
    assert store.class_names == ["clockwise", "pulsate"] and store.num_frames.tolist() == [10] * 6
    with pytest.raises(ConfigError, match="other values"):
        actions.write_actions(tmp_path / "a", **options | {"seed": 2})


def test_the_command_line_refuses_unknown_actions_in_one_line(tmp_path):
    done = run_module(
        "input_pipeline.synthetic_actions", f"--out={tmp_path / 'x'}", "--videos=40", "--classes=still,roll"
    )
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert done.stderr.startswith("error: classes must be two or more different ones of left_right") and (
        done.stderr.count("\n") == 1
    )
