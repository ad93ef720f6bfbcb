"""Action recognition: splits as their lists say, the classifiers of VDIM and VITO, from video files to a score."""

import contextlib
import json
import os
import pathlib
import subprocess

import av
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import action as action_config
from configs import vdim
from evaluation.protocols.action import data as actions
from evaluation.protocols.action import evaluate as action
from evaluation.protocols.action.classifier import (
    ActionClassifier,
    ActionNetwork,
    ClassProbabilities,
    optimizer,
)
from evaluation.transfer import with_pretrained
from helpers.commands import assert_one_line_error, run_module
from helpers.networks import PlainEncoder
from helpers.video_files import numbered, write_video
from vivi_jax.augment import vdim as augment_vdim
from vivi_jax.build import build
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.errors import CheckpointError, ConfigError, DataError
from vivi_jax.train_step import create

CLASSES = ("Archery", "Bowling")


# ---- Data -----------------------------------------------------------------------------------------------------------


def write_plane_video(path: pathlib.Path, codec: str, pix_fmt: str, channels: int) -> None:
    """Ten frames of a format without colour, or with opacity."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        for i in range(10):
            shape = (48, 64) if channels == 1 else (48, 64, channels)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full(shape, 20 * i, np.uint8), format=pix_fmt)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def ucf(tmp_path_factory) -> pathlib.Path:
    """Twelve videos in UCF-101's layout with the lists of split 1; one is grey, one has opacity, one is no video."""
    root = tmp_path_factory.mktemp("ucf")
    for c, name in enumerate(CLASSES):
        (root / "UCF-101" / name).mkdir(parents=True)
        for i in range(6):
            write_video(root / "UCF-101" / name / f"v_{name}_g0{i}.mkv", numbered(4 + i + c))
    write_plane_video(root / "UCF-101" / "Archery" / "v_Archery_g01.mkv", "ffv1", "gray", 1)
    write_plane_video(root / "UCF-101" / "Bowling" / "v_Bowling_g01.mkv", "ffv1", "bgra", 4)
    (root / "UCF-101" / "Bowling" / "v_Bowling_g05.mkv").write_bytes(b"no video")
    write_ucf_lists(root / "lists", "1", train=range(4), test=(4, 5))
    return root


def write_ucf_lists(folder: pathlib.Path, number: str, train, test) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "classInd.txt").write_text("1 Archery\r\n2 Bowling\r\n")
    for part, members in (("train", train), ("test", test)):
        lines = [
            f"{name}/v_{name}_g0{i}.mkv{f' {c}' if part == 'train' else ''}"
            for c, name in enumerate(CLASSES, 1)
            for i in members
        ]
        (folder / f"{part}list0{number}.txt").write_text("\r\n".join(lines) + "\r\n")


def names(part: actions.Part) -> list[str]:
    return [str(part.store.videos[v]) for v in part.videos]


def test_ucf_lists_decide_the_split_and_missing_videos_are_named(ucf, tmp_path, caplog):
    options = dict(fps=60.0, short_side=48)
    with pytest.raises(DataError, match=r"1 of 12 videos .* \(such as Bowling/v_Bowling_g05.mkv\).*max_missing=0.05"):
        actions.load_splits(str(ucf), "1", str(tmp_path / "store"), max_missing=0.05, **options)
    split = actions.load_splits(str(ucf), "all", str(tmp_path / "store"), max_missing=0.1, **options)["1"]
    assert split.class_names == list(CLASSES)
    assert names(split.train) == [f"UCF-101/{c}/v_{c}_g0{i}.mkv" for c in CLASSES for i in range(4)]
    assert split.train.labels.tolist() == [0] * 4 + [1] * 4
    assert names(split.test) == [f"UCF-101/Archery/v_Archery_g0{i}.mkv" for i in (4, 5)] + [
        "UCF-101/Bowling/v_Bowling_g04.mkv"
    ]
    assert split.test.labels.tolist() == [0, 0, 1]
    assert (tmp_path / "store" / "missing_1.txt").read_text() == "Bowling/v_Bowling_g05.mkv\n"
    assert "1 of 12 videos in the lists are missing" in caplog.text
    lengths = dict(zip(names(split.train), split.train.store.num_frames[split.train.videos].tolist(), strict=True))
    assert lengths["UCF-101/Archery/v_Archery_g01.mkv"] == 10  # grey
    assert lengths["UCF-101/Bowling/v_Bowling_g01.mkv"] == 10  # with opacity
    with pytest.raises(DataError, match="has lists of the splits 1, not of 3"):
        actions.load_splits(str(ucf), "3", str(tmp_path / "store"), max_missing=0.1, **options)


def test_lists_that_contradict_each_other_are_refused(tmp_path):
    write_ucf_lists(tmp_path, "1", train=(0,), test=(1,))
    assert actions.read_lists(tmp_path)["1"].train == ["Archery/v_Archery_g00.mkv", "Bowling/v_Bowling_g00.mkv"]
    (tmp_path / "classInd.txt").write_text("1 Bowling\n2 Archery\n")
    with pytest.raises(DataError, match="Archery/v_Archery_g00.mkv has class 1, which is Bowling in .*classInd.txt"):
        actions.read_lists(tmp_path)
    write_ucf_lists(tmp_path, "1", train=(0,), test=(1,))
    (tmp_path / "testlist01.txt").write_text("Diving/v_Diving_g00.mkv\n")
    with pytest.raises(DataError, match="has videos of Diving, which is not in"):
        actions.read_lists(tmp_path)
    (tmp_path / "classInd.txt").unlink()
    with pytest.raises(DataError, match="trainlist01.txt is there but classInd.txt is not"):
        actions.read_lists(tmp_path)


def test_hmdb_lists_are_read_and_must_have_the_same_classes(tmp_path):
    for number in "12":
        for name in ("brush_hair", "cartwheel"):
            (tmp_path / f"{name}_test_split{number}.txt").write_text(f"a_{name}.avi 1 \nb_{name}.avi 2 \nc.avi 0 \n")
    lists = actions.read_lists(tmp_path)
    assert list(lists) == ["1", "2"]
    assert lists["2"] == actions.Lists(
        ["brush_hair/a_brush_hair.avi", "cartwheel/a_cartwheel.avi"],
        ["brush_hair/b_brush_hair.avi", "cartwheel/b_cartwheel.avi"],
        ["brush_hair", "cartwheel"],
    )
    (tmp_path / "cartwheel_test_split2.txt").unlink()
    with pytest.raises(DataError, match="split 2 and those of split 1 have different classes: cartwheel"):
        actions.read_lists(tmp_path)


def test_class_folders_are_split_by_hash_or_by_folder(ucf, tmp_path, capsys):
    options = dict(max_missing=0.0, fps=60.0, short_side=48)
    split = actions.load_splits(str(ucf / "UCF-101"), "1", str(tmp_path / "a"), **options)["1"]
    assert [len(part.videos) for part in (split.train, split.test)] == [9, 2]  # 6 and 5 usable, one of each held out
    assert sorted(split.test.labels) == [0, 1] and not set(split.test.videos) & set(split.train.videos)
    few = split.train.take_per_class(2, seed=0)
    assert np.bincount(few.labels).tolist() == [2, 2] and set(few.videos) < set(split.train.videos)
    assert few.videos.tolist() != split.train.take_per_class(2, seed=3).videos.tolist()

    for part in ("train", "test"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / part).symlink_to(ucf / "UCF-101")
    split = actions.load_splits(str(tmp_path / "parts"), "1", str(tmp_path / "b"), **options)["1"]
    assert names(split.train) == names(split.test) and len(split.train.videos) == 11
    (tmp_path / "parts" / "test").unlink()
    (tmp_path / "parts" / "test").symlink_to(ucf / "UCF-101" / "Archery")
    with pytest.raises(DataError, match="--labels=folder, but all files are at the top"):
        actions.load_splits(str(tmp_path / "parts"), "1", str(tmp_path / "c"), **options)
    with pytest.raises(DataError, match="no split lists .* only --split=1"):
        actions.load_splits(str(tmp_path / "parts"), "2", str(tmp_path / "d"), **options)


@pytest.mark.slow
def test_ucf101_of_tfds_becomes_video_files(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    options = dict(max_missing=0.0, fps=60.0, short_side=48)
    with pytest.raises(DataError, match=r"TFDS has no 'train' of ucf101/ucf101_2 .* run: python -c .*ucf101_2"):
        actions.load_splits("ucf101", "2", str(tmp_path / "a"), **options)

    def examples(builder, split=None, **_):  # two classes, frames of one grey level that grows with the example
        count = {"train": 4, "test": 2}[split]
        videos = [np.full((5 + i, 41, 57, 3), 40 * (i + 1), np.uint8) for i in range(count)]
        return tf.data.Dataset.from_generator(
            lambda: ({"video": video, "label": 7 * (i % 2)} for i, video in enumerate(videos)),
            output_signature={
                "video": tf.TensorSpec((None, None, None, 3), tf.uint8),
                "label": tf.TensorSpec((), tf.int64),
            },
        )

    with tfds.testing.mock_data(as_dataset_fn=examples):
        split = actions.load_splits("ucf101", "2", str(tmp_path / "a"), **options)["2"]
    assert split.class_names == ["ApplyEyeMakeup", "Basketball"]
    assert names(split.train) == [f"ApplyEyeMakeup/{i:05d}.mp4" for i in (0, 2)] + [
        f"Basketball/{i:05d}.mp4" for i in (1, 3)
    ]
    store = split.train.store
    assert store.num_frames[split.train.videos].tolist() == [5, 7, 6, 8]
    assert store.fps.tolist() == [25.0] * 4
    assert (store.height[0], store.width[0]) == (41, 57)
    again = actions.load_splits("ucf101", "2", str(tmp_path / "a"), **options)["2"]  # without TFDS: all is there
    assert names(again.test) == names(split.test)


def test_train_and_test_must_have_the_same_classes(ucf, tmp_path):
    for part, classes in (("train", CLASSES), ("test", ("Archery",))):
        for name in classes:
            (tmp_path / "data" / part / name).mkdir(parents=True)
            (tmp_path / "data" / part / name / "v.mkv").symlink_to(ucf / "UCF-101" / name / f"v_{name}_g00.mkv")
    with pytest.raises(DataError, match="have different classes: Bowling"):
        actions.load_splits(str(tmp_path / "data"), "1", str(tmp_path / "s"), max_missing=0.0, fps=60.0, short_side=48)


# ---- Names that lists, folders and files spell differently ----------------------------------------------------------
STANDS, STANDS_TOO = ("HandstandPushups", "YoYo"), ("HandStandPushups", "YoYo")


def write_spelt(root: pathlib.Path, path_of, *, index=STANDS, listed=STANDS, write=None) -> pathlib.Path:
    """Three clips of two classes in UCF-101's form; path_of(class, clip) is where one lies."""
    lists = root / "lists"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(index, 1)))
    for part, clips in (("train", (0, 1)), ("test", (2,))):
        lines = [
            f"{name}/v_{listed[0] if n == 1 else name}_g0{i}.avi{f' {n}' if part == 'train' else ''}\n"
            for n, name in enumerate(listed, 1)
            for i in clips
        ]
        (lists / f"{part}list01.txt").write_text("".join(lines))
    for name in STANDS:
        for i in range(3):
            path = root / "videos" / path_of(name, i)
            path.parent.mkdir(parents=True, exist_ok=True)
            (write or (lambda path: write_video(path, numbered(4))))(path)
    return root


@pytest.mark.parametrize(
    "path_of, options",
    [
        # THUMOS's archive, which TFDS reads too; its lists in UCF-101's later spelling, and the other way round.
        (lambda c, i: f"{c}/v_{c}_g0{i}.avi", dict(index=STANDS_TOO, listed=STANDS_TOO)),
        (lambda c, i: f"{c.replace('stand', 'Stand')}/v_{c.replace('stand', 'Stand')}_g0{i}.avi", {}),
        (lambda c, i: f"{c}/v_{c}_g0{i}.avi", dict(listed=STANDS_TOO)),
        (lambda c, i: f"{c}/v_{c}_g0{i}.mp4", {}),  # converted
        (lambda c, i: f"{c}/v_{c}_g0{i}.avi.mkv", {}),
        (lambda c, i: f"{c.lower()}/v_{c}_g0{i}.AVI", {}),
        (lambda c, i: f"{'Yo-Yo' if c == 'YoYo' else 'Handstand Pushups'}/v_{c}_g0{i}.avi", {}),
        (lambda c, i: f"all/v_{c}_g0{i}.avi", {}),  # without class folders
    ],
)  # fmt: skip
def test_spellings_of_lists_and_files_are_matched_where_they_are_clear(tmp_path, path_of, options, caplog):
    def write(path):
        write_video(path.with_suffix(".mkv"), numbered(4)).rename(path)  # what it is, says its content

    root = write_spelt(tmp_path / "ucf", path_of, write=write, **options)
    split = actions.load_splits(str(root), "1", str(tmp_path / "out"), max_missing=0.0, fps=60.0, short_side=48)["1"]
    assert split.class_names == list(options.get("index", STANDS))
    expected = [str(pathlib.Path("videos", path_of(name, i))) for name in STANDS for i in range(2)]
    assert names(split.train) == expected and split.train.labels.tolist() == [0, 0, 1, 1]
    assert names(split.test) == [str(pathlib.Path("videos", path_of(name, 2))) for name in STANDS]
    assert "of 6 videos have other names than in the lists" in caplog.text


def test_all_problems_of_the_lists_are_said_before_anything_is_decoded(tmp_path):
    root = write_spelt(tmp_path / "ucf", lambda c, i: f"{c}/v_{c}_g0{i}.avi", write=lambda path: path.write_bytes(b""))
    handstands = root / "videos" / "HandstandPushups"
    for path in handstands.glob("*_g0[01].avi"):  # no training video is left of a class
        path.unlink()
    double = root / "videos" / "YoYo" / "v_YoYo_g02.avi"
    double.rename(double.with_suffix(".mp4"))
    double.with_suffix(".mkv").write_bytes(b"")
    with pytest.raises(DataError) as error:
        actions.load_splits(str(root), "all", str(tmp_path / "out"), max_missing=0.0, fps=60.0, short_side=48)
    for text in (
        "1 videos are not clear, such as: YoYo/v_YoYo_g02.avi may be videos/YoYo/v_YoYo_g02.m",
        "2 of 6 videos in the lists are not below",
        "such as HandstandPushups/v_HandstandPushups_g00.avi",
        "more than config.max_missing=0 allows",
        "1 classes have no training video (HandstandPushups)",
    ):
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["missing_1.txt"]  # nothing was decoded
    missing = (tmp_path / "out" / "missing_1.txt").read_text().split()
    assert missing == [f"HandstandPushups/v_HandstandPushups_g0{i}.avi" for i in range(2)]


def test_a_missing_video_is_not_taken_for_one_of_another_class(tmp_path):
    """HMDB-51 has the same file names in several classes; with the last spelling, x.avi could be any of them."""
    for name in ("clap", "wave"):
        (tmp_path / f"{name}_test_split1.txt").write_text("x.avi 1\ny.avi 1\nz.avi 2\n")
        for clip in "xyz":
            if (name, clip) != ("clap", "x"):
                (tmp_path / name).mkdir(exist_ok=True)
                write_video(tmp_path / name / f"{clip}.mkv", numbered(4)).rename(tmp_path / name / f"{clip}.avi")
    options = dict(fps=60.0, short_side=48)
    split = actions.load_splits(str(tmp_path), "1", str(tmp_path / "out"), max_missing=0.2, **options)["1"]
    assert names(split.train) == ["clap/y.avi", "wave/x.avi", "wave/y.avi"]
    assert (tmp_path / "out" / "missing_1.txt").read_text() == "clap/x.avi\n"


def test_lists_of_any_system_and_litter(tmp_path):
    for name in ("clap", "wave"):
        text = f"#{name} 1.avi 1 \r\n\r\nb.avi 2\r\n \r\nc.avi 0\r\n"
        (tmp_path / f"{name}_test_split1.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        (tmp_path / f"._{name}_test_split1.txt").write_bytes(b"\0\5\26\7")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._hug_test_split2.txt").write_bytes(b"\0\5\26\7")
    found = actions.read_lists(tmp_path)
    assert found == {
        "1": actions.Lists(["clap/#clap 1.avi", "wave/#wave 1.avi"], ["clap/b.avi", "wave/b.avi"], ["clap", "wave"])
    }
    ucf = tmp_path / "ucf"
    write_ucf_lists(ucf, "1", train=range(2), test=(2,))
    expected = actions.read_lists(ucf)
    for path in ucf.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
        (ucf / f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert actions.read_lists(ucf) == expected


def test_a_video_for_training_and_for_testing_is_refused(ucf, tmp_path):
    root = tmp_path / "ucf"
    root.mkdir()
    (root / "videos").symlink_to(ucf / "UCF-101")
    write_ucf_lists(root / "lists", "1", train=range(4), test=(3,))
    with pytest.raises(
        DataError, match="2 videos .* such as: Archery/v_Archery_g03.mkv is for training and for testing"
    ):
        actions.load_splits(str(root), "1", str(tmp_path / "out"), max_missing=0.5, fps=60.0, short_side=48)


def test_class_folders_with_names_that_no_encoding_fits(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.fsencode(tmp_path) + b"/data/" + name)
        for i in range(2):
            path = write_video(tmp_path / f"{i}.mkv", numbered(4))
            os.rename(path, os.fsencode(tmp_path) + b"/data/" + name + b"/\xff%d.mkv" % i)
    options = dict(max_missing=0.0, fps=60.0, short_side=48)
    split = actions.load_splits(str(tmp_path / "data"), "1", str(tmp_path / "out"), **options)["1"]
    assert split.class_names == ["caf\udce9", "tea"]
    assert sorted([*split.train.labels.tolist(), *split.test.labels.tolist()]) == [0, 0, 1, 1]


# ---- Network --------------------------------------------------------------------------------------------------------


class MeanColour(PlainEncoder):
    """An encoder whose features are known: the mean of each channel, and as clip encoder of the clip's first frame."""

    @nn.compact
    def __call__(self, x, *, train):
        scale = self.param("scale", nn.initializers.ones, (3,))
        pooled = x.mean(axis=tuple(range(1, x.ndim - 1))) * scale[None]
        return pooled, {"global": pooled.reshape(-1, 1, 1, 1, 3)}


def network(**changes) -> ActionNetwork:
    return ActionNetwork(MeanColour(), **dict(num_classes=4, phi_dim=None, hidden=0, dropout=0.0) | changes)


def random_clips(batch=6, views=2, frames=3) -> np.ndarray:
    return np.random.default_rng(0).random((batch, views, frames, 4, 4, 3), np.float32)


def test_frame_features_are_averaged_and_views_concatenated():
    clips = random_clips()
    net = network()
    variables = net.init(jax.random.key(0), clips, None, train=False)
    kernel, bias = (np.asarray(variables["params"]["dense2"][name]) for name in ("kernel", "bias"))
    features = clips.mean(axis=(2, 3, 4)).reshape(6, 6)
    np.testing.assert_allclose(net.apply(variables, clips, None, train=False), features @ kernel + bias, atol=1e-5)


def test_clip_features_go_through_phi_into_the_hidden_classifier():
    clips = random_clips()
    net = network(phi_dim=5, hidden=8)
    variables = net.init(jax.random.key(0), clips, None, train=False)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert set(shapes) == {"encoder", "phi_global", "dense1", "norm", "dense2"}
    assert shapes["dense1"] == {"kernel": (10, 8)} and shapes["dense2"] == {"kernel": (8, 4), "bias": (4,)}
    assert net.apply(variables, clips, None, train=False).shape == (6, 4)


def test_dropout_keeps_the_expectation_and_has_a_mask_per_row():
    net = network(dropout=0.9, num_classes=1)
    clips = np.ones((3000, 1, 1, 1, 1, 3), np.float32)
    params = {"params": {"encoder": {"scale": np.ones(3)}, "dense2": {"kernel": np.ones((3, 1)), "bias": np.zeros(1)}}}
    keys = jax.random.split(jax.random.key(0), 3000)
    out = np.asarray(net.apply(params, clips, keys, train=True))[:, 0]
    assert set(np.round(out).tolist()) == {0.0, 10.0, 20.0, 30.0}  # 0 to 3 of 3 features, each times 10
    assert abs(out.mean() - 3) < 0.4  # standard error 0.095
    np.testing.assert_allclose(net.apply(params, clips[:50], keys[50:100], train=True)[:, 0], out[50:100])
    np.testing.assert_allclose(net.apply(params, clips[:2], None, train=False), [[3], [3]])


def test_lab_probabilities_are_the_mean_over_the_dropped_channel():
    clips, net = random_clips(), network()
    variables = net.init(jax.random.key(0), clips, None, train=False)
    logits = [
        np.asarray(net.apply(variables, augment_vdim.lab_without(clips, c), None, train=False), np.float64)
        for c in range(3)
    ]
    expected = np.mean([np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits], axis=0)
    got, _ = ClassProbabilities(net, "lab").apply(variables, clips, train=False)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    plain, _ = ClassProbabilities(net, "jitter").apply(variables, clips, train=False)
    assert np.abs(np.asarray(plain) - expected).max() > 1e-3


def test_windows_of_a_video_are_averaged():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [1.0, 0.0]], np.float32)
    np.testing.assert_allclose(
        action.average_by_video(probabilities, np.array([0, 0, 1]), 2), [[0.35, 0.65], [1, 0]], atol=1e-6
    )


def test_the_encoder_is_frozen_first_and_then_starts_adam_afresh():
    """Adam's first step is the learning rate, whatever the gradient: for the encoder it is step 3 here."""
    params = {"encoder": {"kernel": jnp.zeros(3)}, "dense2": {"kernel": jnp.zeros(3), "bias": jnp.zeros(3)}}
    adam = optimizer(
        lambda step: 0.1 * (step + 1), b1=0.9, b2=0.999, weight_decay=0.0, frozen_epochs=1.5, steps_per_epoch=2
    )
    state, moves = adam.init(params), []
    for _ in range(5):
        updates, state = adam.update(jax.tree.map(lambda p: jnp.full_like(p, 7.0), params), state, params)
        moves.append(updates)
        params = optax.apply_updates(params, updates)
    encoder = [float(move["encoder"]["kernel"][0]) for move in moves]
    classifier = [float(move["dense2"]["bias"][0]) for move in moves]
    np.testing.assert_allclose(encoder, [0, 0, 0, -0.4, -0.5], rtol=1e-4)
    np.testing.assert_allclose(classifier, [-0.1, -0.2, -0.3, -0.4, -0.5], rtol=1e-4)


@pytest.mark.slow
def test_views_of_a_clip_have_colours_of_their_own():
    method = ActionClassifier(network(num_classes=6), color="lab")
    identity = {"encoder": {"scale": np.ones(3)}, "dense2": {"kernel": np.eye(6), "bias": np.zeros(6)}}
    clips = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 4, 4, 3), np.uint8)
    keys = {"clips": jax.random.split(jax.random.key(0), 40)}
    logits, _, _ = method.embed(identity, {}, {}, {"clips": clips, "label": np.zeros(40, np.int32)}, keys)
    dropped = (np.asarray(logits).reshape(40, 2, 3) == 0).argmax(axis=-1)
    assert (dropped[:, 0] != dropped[:, 1]).sum() > 15  # two in three
    loss, _, metrics = method.loss(jnp.zeros((40, 6)), {"label": np.zeros(40, np.int32)}, {}, 0)
    assert loss == pytest.approx(np.log(6)) and metrics["train_top1"] == 1


# ---- Pretrained weights ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vdim_run(tmp_path_factory) -> pathlib.Path:
    """A run directory of the VDIM demo, whose weights are all different numbers."""
    workdir = tmp_path_factory.mktemp("vdim")
    config = vdim.get_config("demo")
    experiment = build(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    state = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), shapes)
    with contextlib.closing(Checkpoints(str(workdir), keep=1)) as checkpoints:
        checkpoints.save(0, state)
    (workdir / "config.json").write_text(config.to_json())
    return workdir


def test_a_vdim_run_gives_its_encoder_and_phi(vdim_run):
    config = action_config.get_config("demo")
    encoder, phi_dim, pretrained = action.load_pretrained(str(vdim_run), config)
    assert phi_dim == 128 and encoder.input_mean == (0.0, 0.0, 0.0)  # of normalised Lab
    assert {name: sorted(tree) for name, tree in pretrained.items()} == {
        "params": ["encoder", "phi_global"],
        "batch_stats": ["encoder", "phi_global"],
    }
    net = ActionNetwork(encoder, num_classes=3, phi_dim=phi_dim, hidden=8, dropout=0.2)
    clips = jax.ShapeDtypeStruct((1, 1, 16, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, None, train=False), clips)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params, state = with_pretrained(zeros["params"], {"batch_stats": zeros["batch_stats"]}, pretrained)
    for part in ("encoder", "phi_global"):
        chex.assert_trees_all_equal(params[part], pretrained["params"][part])
        chex.assert_trees_all_equal(state["batch_stats"][part], pretrained["batch_stats"][part])
    assert not params["dense1"]["kernel"].any()
    broken = {"params": {"encoder": pretrained["params"]["encoder"] | {"block1": {}}}}
    with pytest.raises(CheckpointError, match="params.*block1.*is missing in the checkpoint"):
        with_pretrained(zeros["params"], {}, broken)


def test_an_image_encoder_is_refused_for_clips(vdim_run, tmp_path):
    run = json.loads((vdim_run / "config.json").read_text())
    run["encoder"] = {"name": "resnet", "depth": 18}
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="image encoder 'resnet'.*ucf101_vito"):
        action.load_pretrained(str(tmp_path), action_config.get_config("ucf101_vdim"))


@pytest.mark.parametrize(
    "variant, steps, frozen, lr_at",
    [
        ("ucf101_vdim", 30_000, 0, {0: 1e-3, 2999: 1e-3, 3001: 5e-4, 29_999: 1e-3 / 512}),
        ("hmdb51_vdim", 4000, 0, {401: 5e-4, 801: 2.5e-4, 3999: 1e-3 / 512}),
        ("ucf101_vito", 31_293, 7451, {0: 1e-4, 16_380: 1e-4, 16_400: 3e-5, 31_000: 2.7e-6}),
    ],
)
def test_schedules_of_the_papers(variant, steps, frozen, lr_at, monkeypatch):
    """For the 9537 training videos of UCF-101's split 1; an epoch of VITO's is 5 * 9537 / 32 steps."""
    config, seen = action_config.get_config(variant), {}
    monkeypatch.setattr(action, "optimizer", lambda rate, **kwargs: seen.update(rate=rate, **kwargs) or optax.sgd(rate))
    experiment = action.make_experiment(config, ActionClassifier(network(), color="none"), 9537, seed=0)
    assert (experiment.total_steps, round(seen["frozen_epochs"] * seen["steps_per_epoch"])) == (steps, frozen)
    for step, lr in lr_at.items():
        assert float(seen["rate"](step)) == pytest.approx(lr, rel=1e-5), step


def test_every_config_builds_its_network_at_full_size():
    for variant, classes, parameters in (("ucf101_vdim", 101, 17.298e6), ("hmdb51_vito", 51, 25_557_032 - 2_049_000)):
        config = action_config.get_config(variant)
        encoder, phi_dim, _ = action.load_pretrained("none", config)
        method = action.make_method(config, encoder, classes, phi_dim)
        experiment = action.make_experiment(config, method, 9537, seed=0)
        state = jax.eval_shape(
            lambda experiment=experiment: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0)
        )
        sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()}
        assert sizes["encoder"] + sizes.get("phi_global", 0) == pytest.approx(parameters, rel=1e-4)
        rest = sum(size for name, size in sizes.items() if name not in ("encoder", "phi_global"))
        assert rest == {101: 4 * 512 * 1024 + 2 * 1024 + 1025 * 101, 51: 2049 * 51}[classes]


# ---- The program ----------------------------------------------------------------------------------------------------


def run(*arguments, config="configs/action.py:demo") -> subprocess.CompletedProcess:
    return run_module("evaluation.action", f"--config={config}", *arguments)


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    for arguments, message in (
        ([], "--checkpoint is missing"),
        (["--checkpoint=none", "--data=/nonexistent", f"--workdir={tmp_path / 'w'}"], "no such directory"),
        (["--checkpoint=none", "--data=x", f"--workdir={tmp_path / 'w'}", "--config.data.vews=2"], "vews"),
    ):
        result = run(*arguments)
        assert_one_line_error(result, message)
        assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_real_videos_from_files_to_a_score(sample_data, tmp_path):
    """Twenty classes with a video each, which serves for training and testing: a check of the path, not of accuracy."""
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / part).symlink_to(sample_data / "action" / "asl_gestures")
    arguments = [
        "--checkpoint=none",
        f"--data={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'w'}",
        "--config.encoder.width=0.25",
        "--config.schedule.total_steps=6",
        "--config.schedule.boundaries=(3,)",
        "--config.batch_size=4",
        "--config.data.views=2",
        "--config.test.stride=64",
        "--config.run.log_every=1",
    ]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    split = result["repeats"]["split_1"]
    assert (split["classes"], split["train_videos"], split["test_videos"], split["steps"]) == (20, 20, 20, 6)
    assert split["test_windows"] >= 20 and round(split["top1"] * 20, 6) % 1 == 0
    lines = [json.loads(line) for line in (tmp_path / "w" / "split_1" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(np.isfinite(line["loss"]) for line in lines)
    assert "| mean |" in (tmp_path / "w" / "result.md").read_text()

    again = run(*arguments)  # nothing is decoded or trained again
    assert again.returncode == 0 and "step 1/6" not in again.stderr
    assert json.loads((tmp_path / "w" / "result.json").read_text()) == result
    other = run(*arguments, "--config.method.dropout=0.5")
    assert other.returncode == 1 and "dropout" in other.stderr.splitlines()[-1]
