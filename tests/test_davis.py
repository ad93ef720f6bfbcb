"""DAVIS: the measures against the official tool's, propagation against its definition, and real sequences."""

import csv
import dataclasses
import json
import pathlib
import shutil
import unicodedata

import av
import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from evaluation import davis as davis_door
from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis import evaluate as davis
from evaluation.protocols.davis import metrics as davis_metrics
from evaluation.protocols.davis.propagate import PROTOCOLS, TILE, Propagator, start_labels
from helpers.folders import LITTER
from helpers.pictures import claims
from vivi_jax import export
from vivi_jax.errors import DataError
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.vdim_encoder import VdimEncoder


# ---- Measures -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_j_and_f_are_the_official_tools_on_osvos_results(sample_data):
    """The reference was computed with the official tool; 88 real frames with real mistakes."""
    with open(sample_data / "davis" / "osvos_binary_JF_reference.csv", newline="") as file:
        reference = {row["sequence"]: row for row in csv.DictReader(file)}
    sequences = davis_data.load(str(sample_data / "davis" / "DAVIS"))
    assert [sequence.name for sequence in sequences] == list(reference)
    for sequence in sequences:
        (found,) = davis.score(sequence, sample_data / "davis" / "osvos_results" / sequence.name)["objects"]
        for measure in "JF":
            for name in ("mean", "recall", "decay"):
                expected = float(reference[sequence.name][f"{measure}_{name}"])
                assert found[measure][name] == pytest.approx(expected, abs=1e-4), (sequence.name, measure, name)


def square(top: int, left: int, side: int, size=(60, 80)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_j_and_f_of_simple_masks():
    a, empty, full = square(10, 10, 20), np.zeros((60, 80), bool), np.ones((60, 80), bool)
    j, f = davis_metrics.region_similarity, davis_metrics.boundary_accuracy
    assert j(a, a) == f(a, a) == 1
    assert j(empty, empty) == f(empty, empty) == 1  # nothing there, nothing found
    assert j(a, empty) == f(a, empty) == f(empty, a) == 0  # an empty prediction
    assert j(a, square(10, 20, 20)) == pytest.approx(200 / 600)
    assert f(full, empty) == 1 and j(full, empty) == 0  # the image's edge is no boundary
    # The diagonal is 100 pixels, the tolerance 1: shifted by 1 every boundary pixel still matches, by 2 only those that
    # another side passes nearby.
    assert f(a, square(11, 10, 20)) == 1 and f(a, square(12, 10, 20)) < 0.7
    # Sides of 20 pixels; moved 10 to the right, the upper and lower side overlap by half and are matched there.
    assert 0.2 < f(a, square(10, 20, 20)) < 0.4


def test_statistics_are_means_recall_and_decay():
    found = davis_metrics.statistics(np.array([1.0, 1.0, 0.5, 0.6, 0.4, 0.4, 0.4, 0.0]))
    # Quarters of 8 frames share their borders: frames 0-2 and 5-7 (the borders 1, 2.75, 4.5, 6.25, 8, rounded).
    assert found == pytest.approx({"mean": 4.3 / 8, "recall": 3 / 8, "decay": 2.5 / 3 - 0.8 / 3})
    objects = [
        {"J": found, "F": dict(mean=1, recall=1, decay=0)},
        {"J": dict(mean=0, recall=0, decay=0), "F": dict(mean=0.5, recall=0, decay=0)},
    ]
    overall = davis_metrics.overall(objects)
    assert overall["J_mean"] == pytest.approx(4.3 / 16) and overall["F_mean"] == 0.75
    assert overall["J&F"] == pytest.approx((4.3 / 16 + 0.75) / 2)


# ---- Propagation ----------------------------------------------------------------------------------------------------
class Pixels(nn.Module):
    """Every 4th pixel's colour as features."""

    def __call__(self, images, *, train):
        return None, {"map": images[:, 2::4, 2::4]}


def by_definition(
    frames: list[np.ndarray], start: np.ndarray, name: str, context: int, radius: int
) -> list[np.ndarray]:
    """Soft labels of each frame, from the published code's lists of context frames; all keys at once, in float64."""
    protocol = PROTOCOLS[name]
    features = [np.asarray(frame[2::4, 2::4], np.float64) / 255 for frame in frames]
    features = [f / np.linalg.norm(f, axis=-1, keepdims=True) for f in features]
    height, width, _ = features[0].shape
    at = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2)
    near = np.linalg.norm(at[:, None] - at[None], axis=-1) < radius  # [queries, keys]
    labels = [start]
    for t in range(1, len(frames)):
        if name == "vfs":  # the first frame, and again as one of those before
            used, masked = [0, *range(max(0, t - context), t)], [True] * (context + 1)
        else:  # as if the video began with `context` copies of its first frame
            used, masked = [0, *(max(0, i) for i in range(t - context, t))], [False] + [True] * context
        similarity = np.concatenate(
            [
                np.where(near if m else True, features[t].reshape(-1, 3) @ features[i].reshape(-1, 3).T, -np.inf)
                for i, m in zip(used, masked, strict=False)
            ],
            axis=1,
        )
        values = np.concatenate([labels[i].reshape(height * width, -1) for i in used])
        best = np.argsort(-similarity, axis=1)[:, : protocol.top_k]
        logits = np.take_along_axis(similarity, best, axis=1) / protocol.temperature
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        labels.append(np.einsum("qk,qkc->qc", weights, values[best]).reshape(height, width, -1))
    return labels


@pytest.mark.parametrize("name", ["vfs", "crw"])
def test_propagation_is_its_definition(name):
    """Seven frames of noise through a context of three: the ring has turned twice; more than one tile."""
    rng = np.random.default_rng(0)
    frames = list(rng.integers(1, 256, (7, 72, 80, 3), np.uint8))
    mask = rng.integers(0, 3, (72, 80)).astype(np.uint8)
    protocol = dataclasses.replace(PROTOCOLS[name], context=3, radius=4, short_side=None)
    start = start_labels(mask, 2, 18, 20, soft=protocol.soft_start)
    assert start.shape == (18, 20, 3) and 18 > TILE
    if name == "vfs":
        np.testing.assert_array_equal(start.argmax(-1), mask[2::4, 2::4])
    expected = by_definition(frames, np.float64(start), name, 3, 4)
    propagator = Propagator(Pixels(), "map", {}, protocol, mask, frames[0], 2)
    for t, frame in enumerate(frames[1:], 1):
        found = propagator.step(frame)
        inner = np.asarray(propagator.state["labels"])[1 + t % 3, 4:22, 4:24]
        np.testing.assert_allclose(inner, expected[t], atol=2e-5)
        full = np.asarray(jax.image.resize(expected[t], (72, 80, 3), "linear"))
        if protocol.stretch:
            full = (full - full.min((0, 1))) / (full.max((0, 1)) - full.min((0, 1)))
        assert found.dtype == np.uint8 and (found == full.argmax(-1)).mean() > 0.999


def test_memory_is_that_of_the_context():
    """However long the sequence: the arrays alive are the state's and one frame's, and the state has context + 1."""
    rng = np.random.default_rng(0)
    protocol = dataclasses.replace(PROTOCOLS["vfs"], context=3, radius=4, short_side=None)
    before = sum(x.nbytes for x in jax.live_arrays())
    propagator = Propagator(
        Pixels(), "map", {}, protocol, np.full((72, 80), 2, np.uint8), rng.integers(1, 256, (72, 80, 3), np.uint8), 2
    )
    alive = []
    for _ in range(12):
        propagator.step(rng.integers(1, 256, (72, 80, 3), np.uint8))
        alive.append(sum(x.nbytes for x in jax.live_arrays()) - before)
    frame = 40 * 40 * (3 + 3) * 4  # float32; 18 x 20 locations, filled up to two tiles a side, and the margins
    state = (3 + 1) * (frame + 1)
    assert sum(x.nbytes for x in jax.tree.leaves(propagator.state)) == state
    assert len(set(alive)) == 1 and alive[0] <= state + frame


class Objects(nn.Module):
    """One-hot of the truth, painted in red and green, averaged over 2 x 2 pixels: perfect features."""

    def __call__(self, images, *, train):
        height, width = (length // 2 for length in images.shape[1:3])
        cells = images[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2, 3)
        return None, {"map": cells.mean(axis=(2, 4))}


@pytest.mark.slow
def test_perfect_features_follow_the_object(sample_data):
    """Six frames of two real sequences at half size; what is left to lose is the resolution of the map."""
    protocol = dataclasses.replace(PROTOCOLS["vfs"], context=2, radius=8, short_side=240)
    for sequence in davis_data.load(str(sample_data / "davis" / "DAVIS")):
        part = dataclasses.replace(sequence, frames=sequence.frames[:6], masks=sequence.masks[:6])
        masks = [part.mask(i) for i in range(len(part.frames))]
        painted = [np.eye(3, dtype=np.uint8)[mask] * 255 for mask in masks]
        propagator = Propagator(Objects(), "map", {}, protocol, masks[0], painted[0], 1)
        found = [masks[0], *map(propagator.step, painted[1:])]
        (scores,) = davis_metrics.score_sequence(part, found.__getitem__)
        assert scores["J"]["mean"] > 0.95 and scores["F"]["mean"] > 0.99, (sequence.name, scores)


# ---- Data -----------------------------------------------------------------------------------------------------------
def make_davis(root: pathlib.Path, frames: int = 6, size=(64, 96)) -> pathlib.Path:
    """A sequence of two textured squares that move apart over noise."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 90, (*size, 3))
    textures = [rng.integers(120, 256, (20, 20, 3)) * np.array(colour) for colour in ((1, 0, 0), (0, 0, 1))]
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "two").mkdir(parents=True)
    for t in range(frames):
        image, mask = ground.copy(), np.zeros(size, np.uint8)
        for k, (texture, left) in enumerate(zip(textures, (24 - 2 * t, 52 + 3 * t), strict=True), 1):
            image[20 + t : 40 + t, left : left + 20] = texture
            mask[20 + t : 40 + t, left : left + 20] = k
        Image.fromarray(image.astype(np.uint8)).save(root / "JPEGImages" / "480p" / "two" / f"{t:05d}.jpg", quality=95)
        davis_data.write_objects(root / "Annotations" / "480p" / "two" / f"{t:05d}.png", mask)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("two\n")
    return root


def test_masks_are_read_as_the_official_tool_does(tmp_path):
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    davis_data.write_objects(tmp_path / "indexed.png", mask)
    with Image.open(tmp_path / "indexed.png") as image:
        assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        np.testing.assert_array_equal(np.array(image), mask)
    np.testing.assert_array_equal(davis_data.read_objects(tmp_path / "indexed.png"), [[0, 1, 2, 0]])
    for name, pixels, expected in (("binary", [[0, 255]], [[0, 1]]), ("grey", [[0, 2, 255]], [[0, 2, 0]])):
        Image.fromarray(np.array(pixels, np.uint8)).save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(davis_data.read_objects(tmp_path / f"{name}.png"), expected)


def indexed(path: pathlib.Path, mask: np.ndarray) -> None:
    """As davis_data.write_objects, with a palette of greys, as tools that turn grey pictures into indexed ones."""
    image = Image.fromarray(mask)
    image.putpalette([value for value in range(256) for _ in range(3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.mark.parametrize("truth_form, result_form", [("P", "P"), ("P", "L"), ("L", "P"), ("P", "1"), ("ones", "P")])
def test_davis_2016_masks_are_one_object_in_every_form(tmp_path, truth_form, result_form):
    """A square that moves by two pixels a frame; the result stands two pixels aside, so that J is 18 / 22."""
    root = make_davis(tmp_path)
    shutil.rmtree(root / "Annotations" / "480p" / "two")

    def save(path: pathlib.Path, mask: np.ndarray, form: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "P":
            indexed(path, mask * np.uint8(255))
        elif form == "ones":
            indexed(path, mask.astype(np.uint8))
        else:
            Image.fromarray(mask if form == "1" else mask * np.uint8(255)).save(path)

    for t in range(6):
        save(root / "Annotations" / "480p" / "two" / f"{t:05d}.png", square(10, 2 * t, 20, (64, 96)), truth_form)
        save(tmp_path / "masks" / f"{t:05d}.png", square(10, 2 * t + 2, 20, (64, 96)), result_form)
    (sequence,) = davis_data.load(str(root))
    assert sequence.objects == 1 and sequence.mask(3).sum() == sequence.mask(0).sum() == 400
    (scores,) = davis.score(sequence, tmp_path / "masks")["objects"]
    assert scores["J"]["mean"] == pytest.approx(18 / 22)
    (scores,) = davis.score(sequence, root / "Annotations" / "480p" / "two")["objects"]
    assert scores["J"]["mean"] == scores["F"]["mean"] == 1


def test_void_stays_void_where_there_are_objects(tmp_path):
    root = make_davis(tmp_path)
    late = root / "Annotations" / "480p" / "two" / "00003.png"
    indexed(late, np.full((64, 96), 255, np.uint8) * (np.arange(96) < 9).astype(np.uint8))
    (sequence,) = davis_data.load(str(root))
    assert sequence.objects == 2 and not sequence.mask(3).any()


def test_a_set_with_what_systems_leave_behind_and_lists_of_any_system(tmp_path):
    root = make_davis(tmp_path)
    (clean,) = davis_data.load(str(root))
    for kind in ("JPEGImages", "Annotations"):
        folder = root / kind / "480p"
        (folder / "two").rename(folder / unicodedata.normalize("NFD", "zwölf"))
        for name in LITTER:
            for path in (folder / name, folder / unicodedata.normalize("NFD", "zwölf") / name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"no picture")
            if folder.name == "480p" and name.startswith("."):
                (folder / unicodedata.normalize("NFD", "zwölf") / f"{name}.png").write_bytes(b"no picture")
    (root / "ImageSets" / "2017" / "val.txt").write_bytes("\ufeffzwölf \r\n\r\n".encode())
    (sequence,) = davis_data.load(str(root))
    assert [path.name for path in sequence.frames] == [path.name for path in clean.frames]
    assert (sequence.objects, len(sequence.masks)) == (2, 6)
    # Saved masks in the folder's own form of the name, as a Mac copies them.
    davis_door.main(
        [f"--data={root}", f"--results={root / 'Annotations' / '480p'}", f"--workdir={tmp_path / 'scores'}"]
    )
    assert json.loads((tmp_path / "scores" / "davis.json").read_text())["scores"]["J&F"] == 1


def test_the_sequence_is_as_it_was_made(tmp_path, caplog):
    root = make_davis(tmp_path)
    grey = root / "JPEGImages" / "480p" / "two" / "00002.jpg"
    Image.open(grey).convert("L").save(grey)
    late = root / "Annotations" / "480p" / "two" / "00003.png"
    mask = davis_data.read_objects(late)
    mask[0, 0] = 3  # an object that the first frame does not have
    davis_data.write_objects(late, mask)
    with caplog.at_level("WARNING"):
        (sequence,) = davis_data.load(str(root))
    assert (sequence.objects, sequence.size, sequence.scored) == (2, (64, 96), True)
    assert sequence.frame(2).shape == (64, 96, 3) and sequence.mask(3)[0, 0] == 0
    assert "the first 00003" in caplog.text
    for path in sequence.masks[1:]:
        path.unlink()
    (sequence,) = davis_data.load(str(root))  # as in test-dev
    assert not sequence.scored and davis.score(sequence, tmp_path) == {"objects": []}


def test_problems_of_all_sequences_are_listed_at_once(tmp_path, sample_data):
    root = make_davis(tmp_path)
    frames, masks = (root / kind / "480p" for kind in ("JPEGImages", "Annotations"))

    def copy(name: str) -> None:
        for folder in (frames, masks):
            (folder / name).mkdir()
            for path in (folder / "two").iterdir():
                (folder / name / path.name).write_bytes(path.read_bytes())

    for name in "abcde":
        copy(name)
    (frames / "a" / "00003.jpg").unlink()
    davis_data.write_objects(masks / "b" / "00002.png", np.zeros((64, 95), np.uint8))
    davis_data.write_objects(masks / "c" / "00000.png", np.zeros((64, 96), np.uint8))
    (masks / "d" / "00004.png").unlink()
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(masks / "e" / "00001.png")
    with pytest.raises(DataError) as error:
        davis_data.load(str(root), list("abcde"))
    text = str(error.value)
    assert text.startswith("5 problems in the 5 sequences") and "\n" not in text
    for part in (
        "a: frame 00003 is missing",
        "00002.png is 95 x 64 pixels, its frame 96 x 64",
        "00000.png has no object",
        "d: 1 frames have no mask, the first 00004",
        "00001.png has the mode RGB",
    ):
        assert part in text, part
    with pytest.raises(DataError, match="none has no frames"):
        davis_data.load(str(root), ["two", "none"])
    with pytest.raises(DataError, match="holds no DAVIS"):
        davis_data.load(str(tmp_path / "ImageSets"))
    # A real sequence with masks of four frames only, one of them a pixel narrower.
    with pytest.raises(DataError, match="judo: 12 frames have no mask.*00005.png is 853 x 480 pixels"):
        davis_data.load(str(sample_data / "davis" / "multi"), ["judo"])


@pytest.mark.parametrize("name", ["../../victim", "..", ".", "/tmp/victim", "a/b", "..\\..\\victim"])
def test_a_list_removes_and_writes_nothing_outside(tmp_path, name):
    """A sequence is named by a list of the data set, and its folder of masks is emptied before it is written."""
    root = make_davis(tmp_path / "data")
    (root / "ImageSets/2017/val.txt").write_text(f"{name}\n")
    for names in (None, [name]):
        with pytest.raises(DataError, match="is no name of"):
            davis_data.load(str(root), names)


def test_the_folder_of_masks_that_is_emptied_lies_in_the_output(tmp_path):
    """Also for a sequence that did not come from `load`."""
    (sequence,) = davis_data.load(str(make_davis(tmp_path / "data")))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious.txt").write_text("x")
    (tmp_path / "out/masks").mkdir(parents=True)
    sequence = dataclasses.replace(sequence, name="../../victim")
    with pytest.raises(DataError, match="names must not lead out"):
        davis.run_sequence(ResNet(depth=18), "stage4", {}, sequence, PROTOCOLS["vfs"], tmp_path / "out")
    assert (tmp_path / "victim/precious.txt").read_text() == "x"


def test_a_frame_or_mask_that_would_take_gigabytes_is_refused_by_its_header(tmp_path):
    root = make_davis(tmp_path)
    for path in (root / "JPEGImages/480p/two/00003.jpg", root / "Annotations/480p/two/00004.png"):
        path.write_bytes(claims(20000, 20000))
    with pytest.raises(DataError) as error:
        davis_data.load(str(root))
    assert str(error.value).count("larger than the 64 million pixels that are decoded") == 2


def test_results_that_do_not_fit_are_refused(tmp_path):
    (sequence,) = davis_data.load(str(make_davis(tmp_path)))
    results = tmp_path / "results"
    results.mkdir()
    for i in range(len(sequence.frames)):
        davis_data.write_objects(results / f"{i:05d}.png", sequence.mask(i))
    perfect = davis.score(sequence, results)["objects"]
    assert [scores[m]["mean"] for scores in perfect for m in "JF"] == [1, 1, 1, 1]
    for change, message in (
        ((np.full((64, 96), 3, np.uint8)), "has object 3; two has 2"),
        (np.zeros((64, 90), np.uint8), "00002.png is 90 x 64 pixels"),
    ):
        davis_data.write_objects(results / "00002.png", change)
        with pytest.raises(DataError, match=message):
            davis.score(sequence, results)
    davis_data.write_objects(results / "00002.png", np.zeros((64, 96), np.uint8))  # an empty prediction
    assert davis.score(sequence, results)["objects"][0]["J"]["mean"] == 0.75
    (results / "00002.png").unlink()
    with pytest.raises(DataError, match="00002.png is no mask"):
        davis.score(sequence, results)


# ---- The program ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory) -> str:
    """An untrained ResNet-18 of an eighth of the width, as an export."""
    encoder = ResNet(depth=18, width=0.125)
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.float32(
            rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape)
        ),
        shapes,
    )
    path = tmp_path_factory.mktemp("encoder") / "untrained.safetensors"
    export.export_torchvision(encoder, variables, str(path))
    return str(path)


def test_protocols_follow_the_encoder():
    assert davis.choose_protocol("vfs", ResNet(depth=50), None).radius == 18
    assert davis.choose_protocol("vfs", ResNet(depth=18), 120) == dataclasses.replace(
        PROTOCOLS["vfs"], radius=12, short_side=120
    )
    assert davis.choose_protocol("crw", VdimEncoder(), None) == PROTOCOLS["crw"]


@pytest.mark.slow
def test_real_sequences_with_an_untrained_encoder(sample_data, tmp_path, checkpoint_file, capsys):
    """From files to a score, both sequences; then again, and again after a kill in the second."""
    real, data, out = sample_data / "davis" / "DAVIS", tmp_path / "DAVIS", tmp_path / "out"
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for name in ("blackswan", "car-shadow"):
            (data / kind / "480p" / name).mkdir(parents=True)
            for i in range(8):
                shutil.copy(real / kind / "480p" / name / f"{i:05d}.{suffix}", data / kind / "480p" / name)
    arguments = [
        f"--checkpoint={checkpoint_file}",
        f"--data={data}",
        f"--workdir={out}",
        "--short_side=120",
        "--sequences=blackswan,car-shadow",
    ]
    davis_door.main(arguments)
    printed, log = capsys.readouterr()
    assert "blackswan: 8 frames, " in log and " s per frame (median), J " in log and "| mean |" in printed
    result = json.loads((out / "davis.json").read_text())
    assert result["settings"]["radius"] == 12 and set(result["sequences"]) == {"blackswan", "car-shadow"}
    assert 0.3 < result["scores"]["J_mean"] < 1  # eight frames in which little moves, random features
    for name in ("blackswan", "car-shadow"):
        with Image.open(out / "masks" / name / "00007.png") as image:
            assert image.mode == "P" and image.size == (854, 480)
        with av.open(str(out / "videos" / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 8

    saved = davis.summary(
        {
            s.name: davis.score(s, out / "masks" / s.name)
            for s in davis_data.load(str(data), ["blackswan", "car-shadow"])
        }
    )
    assert saved["scores"] == result["scores"]  # of the files, as another tool would read them
    (out / "sequences" / "car-shadow.json").unlink()  # as if killed in the second sequence
    for path in sorted((out / "masks" / "car-shadow").iterdir())[4:]:
        path.unlink()
    davis_door.main(arguments)
    log = capsys.readouterr().err
    assert "car-shadow: 8 frames" in log and "blackswan" not in log
    assert json.loads((out / "davis.json").read_text())["scores"] == result["scores"]
    for other, message in (
        ([*arguments, "--short_side=100"], "error: .*was begun with other values.*short_side"),
        ([f"--checkpoint={tmp_path}", *arguments[1:]], "error: no .*config.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            davis_door.main(other)


@pytest.mark.slow
def test_two_objects_are_followed_and_scored_from_saved_masks(tmp_path, checkpoint_file):
    """Both protocols on a rendered sequence; then the masks alone."""
    data = make_davis(tmp_path / "DAVIS")
    for name in ("vfs", "crw"):
        davis_door.main(
            [
                f"--checkpoint={checkpoint_file}",
                f"--data={data}",
                f"--workdir={tmp_path / name}",
                f"--protocol={name}",
                "--short_side=256",
            ]
        )
        result = json.loads((tmp_path / name / "davis.json").read_text())
        objects = result["sequences"]["two"]["objects"]
        assert len(objects) == 2 and all(scores["J"]["mean"] > 0.7 for scores in objects), objects
        davis_door.main(
            [f"--results={tmp_path / name / 'masks'}", f"--data={data}", f"--workdir={tmp_path / 'scores'}"]
        )
        assert json.loads((tmp_path / "scores" / "davis.json").read_text())["scores"] == result["scores"]
