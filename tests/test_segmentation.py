"""Semantic segmentation: the dilated ResNet, the data sets, mIoU by hand, and the protocol from files to a score."""

import functools
import json
import pathlib
import shutil
import signal
import subprocess
import time

import chex
import jax
import numpy as np
import pytest
import scipy.io
from flax import linen as nn
from PIL import Image

from configs import segmentation as segmentation_config
from evaluation import transfer
from evaluation.protocols.interpolation import dense_encoder
from evaluation.protocols.segmentation import data as data_sets
from evaluation.protocols.segmentation import evaluate as segmentation
from evaluation.protocols.segmentation import report as segmentation_report
from evaluation.protocols.segmentation.data import IGNORE, SegmentationSet
from evaluation.protocols.segmentation.network import FCN, Segmenter, confusion, predict, scores
from helpers.commands import start_module
from helpers.folders import LITTER
from input_pipeline import folders
from vivi_jax.distributed import sharding
from vivi_jax.errors import DataError
from vivi_jax.loop import compile_step
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.vdim_encoder import VdimEncoder
from vivi_jax.train_step import create

# ---- The dilated ResNet ---------------------------------------------------------------------------------------------
TINY = dict(depth=18, width=0.125)


@functools.cache
def tiny_variables(version: int = 1) -> dict:
    """Variables drawn with NumPy, scaled so that activations neither vanish nor explode."""
    encoder = ResNet(**TINY, version=version)
    image = jax.ShapeDtypeStruct((1, 65, 65, 3), np.float32)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(
            rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
            if leaf.ndim > 1
            else rng.uniform(0.5, 1.5, leaf.shape)
        ),
        shapes,
    )


def stages(images: np.ndarray, version: int = 1, **options) -> dict[str, np.ndarray]:
    encoder = ResNet(**TINY, version=version, **options)
    _, found = jax.jit(functools.partial(encoder.apply, train=False))(tiny_variables(version), images)
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("depth, options", [(18, dict(output_stride=16)), (18, dict(output_stride=8, dilate=False))])
def test_the_output_stride_changes_no_parameter(depth, options):
    image = jax.ShapeDtypeStruct((1, 65, 97, 3), np.float32)
    shapes = [
        jax.eval_shape(lambda x, e=encoder: e.init_with_output(jax.random.key(0), x, train=False), image)
        for encoder in (ResNet(depth=depth), ResNet(depth=depth, **options))
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes[0][1], shapes[1][1])
    stage4 = shapes[1][0][1]["stage4"].shape
    assert stage4[1:3] == {16: (5, 7), 8: (9, 13)}[options["output_stride"]]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_dilated_network_is_the_strided_one_at_every_second_location(version):
    """À trous: at even locations each dilated convolution reads what the strided one reads, zeros outside included."""
    images = np.float32(np.random.default_rng(1).uniform(size=(1, 81, 96, 3)))
    plain = stages(images, version)
    for output_stride, step in ((16, 2), (8, 4)):
        dilated = stages(images, version, output_stride=output_stride)
        for name in ("stage1", "stage2", "stage3", "stage4"):
            every = max(step // {"stage3": 2, "stage4": 1}.get(name, 4), 1)
            np.testing.assert_allclose(dilated[name][:, ::every, ::every], plain[name], rtol=1e-4, atol=1e-4)
    assert np.abs(plain["stage4"]).max() > 0.1  # the values are no zeros
    undilated = stages(images, version, output_stride=8, dilate=False)
    np.testing.assert_array_equal(undilated["stage2"], plain["stage2"])
    assert undilated["stage3"].shape == dilated["stage3"].shape
    assert np.abs(undilated["stage3"][:, ::2, ::2] - plain["stage3"]).max() > 1e-2


# ---- Data sets ------------------------------------------------------------------------------------------------------
def make_voc(root: pathlib.Path, sample_data: pathlib.Path) -> pathlib.Path:
    """VOC's and SBD's official folders around the sample's three images: two in train, one of SBD's, all in val."""
    voc = root / "VOCdevkit" / "VOC2012"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        shutil.copytree(sample_data / "voc" / "semantic_segmentation" / folder, voc / folder)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("2011_000003\n2011_000006\n")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("2011_000025\n")
    shutil.copy(voc / "JPEGImages" / "2011_000003.jpg", voc / "JPEGImages" / "2008_000001.jpg")
    sbd = root / "benchmark_RELEASE" / "dataset" / "cls"
    sbd.mkdir(parents=True)
    mask = np.array(Image.open(voc / "SegmentationClass" / "2011_000003.png"))
    for name in ("2008_000001", "2011_000006", "2011_000025"):  # of train and val too, whose own masks count
        scipy.io.savemat(sbd / f"{name}.mat", {"GTcls": {"Segmentation": np.where(mask == 255, 0, mask)}})
    return root


def test_sbd_is_found_where_the_archives_leave_it(tmp_path, sample_data):
    root = make_voc(tmp_path, sample_data)
    for data in (root, root / "VOCdevkit", root / "VOCdevkit" / "VOC2012"):
        train, val = data_sets.load_voc(str(data))
        assert (len(train.images), len(val.images)) == (3, 1), data


def test_a_list_that_names_a_mask_outside_is_refused(tmp_path, sample_data):
    root = make_voc(tmp_path, sample_data)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("../../x\n")
    with pytest.raises(DataError, match="x.png' is no name of anything in .*names must not lead out"):
        data_sets.load_voc(str(root))


def make_ade(root: pathlib.Path, sample_data: pathlib.Path) -> pathlib.Path:
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            shutil.copytree(sample_data / "ade20k" / kind / "validation", root / "ADEChallengeData2016" / kind / split)
    shutil.copy(sample_data / "ade20k" / "objectInfo150.txt", root / "ADEChallengeData2016")
    return root


def by_hand(pairs: list[tuple[np.ndarray, np.ndarray]], classes: range, ignored: int) -> list[float]:
    """IoU per class from the definition, one class and one image at a time."""
    values = []
    for c in classes:
        both = either = 0
        for truth, predicted in pairs:
            counts = truth != ignored
            both += ((truth == c) & (predicted == c) & counts).sum()
            either += (((truth == c) | (predicted == c)) & counts).sum()
        values.append(both / either if either else None)
    return values


def test_voc_is_read_and_scored_as_by_hand(sample_data, tmp_path):
    train, val = data_sets.load_voc(str(make_voc(tmp_path, sample_data)))
    assert [path.name for path in train.masks] == ["2011_000003.png", "2011_000006.png", "2008_000001.mat"]
    assert [path.name for path in val.masks] == ["2011_000025.png"] and len(train.class_names) == 21
    assert data_sets.check(train)["classes"] == 5 and data_sets.check(val)["images"] == 1
    pairs, total = [], 0
    for i in range(2):
        raw = np.array(Image.open(train.masks[i]))
        image, mask = train.read(i)
        np.testing.assert_array_equal(raw, mask)  # VOC's numbers are the classes, 255 does not count
        assert image.shape == (*mask.shape, 3)
        predicted = np.roll(np.where(raw == 255, 0, raw), (9, 4), (0, 1))
        total = total + confusion(mask, predicted, 21)
        pairs.append((raw, predicted))
    expected = by_hand(pairs, range(21), 255)
    found = scores(total)
    assert found["iou"] == pytest.approx(expected) and expected.count(None) == 16
    assert found["miou"] == pytest.approx(np.mean([value for value in expected if value is not None]))
    assert 0.5 < found["miou"] < 0.95
    # SBD marks no borders: there the mask of the sample has its background.
    assert set(np.unique(train.read(2)[1])) == {0, 5, 15}


def test_ade20k_is_read_and_scored_as_by_hand(sample_data, tmp_path):
    train, val = data_sets.load_ade20k(str(make_ade(tmp_path, sample_data)))
    assert len(train) == len(val) == 3 and val.class_names[:4] == ("wall", "building", "sky", "floor")
    pairs, total = [], 0
    for i in range(3):
        raw = np.array(Image.open(val.masks[i]))
        mask = val.read(i)[1]
        assert ((mask == IGNORE) == (raw == 0)).all()  # 0 is no class in ADE20K
        predicted = np.roll(np.where(raw == 0, 1, raw), (5, 11), (0, 1))  # in the file's numbers, 1..150
        total = total + confusion(mask, (predicted - 1).astype(np.uint8), 150)
        pairs.append((raw, predicted))
    expected = by_hand(pairs, range(1, 151), 0)
    assert scores(total)["iou"] == pytest.approx(expected)
    assert scores(total)["miou"] == pytest.approx(np.mean([value for value in expected if value is not None]))


def write_own(root: pathlib.Path, images: str, masks: str, count: int, size=(20, 30)) -> None:
    """`count` grey images whose level says their class, 0 to 2, and their masks."""
    for folder in (root / images, root / masks):
        folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((*size, 3), 10 + 100 * (i % 3), np.uint8)).save(root / images / f"n{i}.png")
        mask = np.full(size, i % 3, np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(root / masks / f"n{i}.png")


def test_own_folders_are_paired_by_name_and_split_by_folders_or_by_a_hash(tmp_path):
    write_own(tmp_path / "one", "images", "masks", 30)
    train, val = data_sets.load_own(str(tmp_path / "one"))
    assert len(train) + len(val) == 30 and 2 <= len(val) <= 12 and not set(train.masks) & set(val.masks)
    assert train.class_names == val.class_names == ("0", "1", "2")
    for part in (train, val):
        assert data_sets.check(part)["images"] == len(part)
        for i in range(len(part)):
            image, mask = part.read(i)
            assert (mask[0] == IGNORE).all() and (mask[1:] * 100 + 10 == image[1:, :, 0]).all()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "one/images/new.jpg")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "one/masks/new.png")
    grown = data_sets.load_own(str(tmp_path / "one"))
    assert set(val.masks) <= set(grown[1].masks) and set(train.masks) <= set(grown[0].masks)  # none has changed sides
    for form in ("{kind}/{split}", "{split}/{kind}"):
        data = tmp_path / form[1:5]
        for split, count in (("train", 4), ("val", 2)):
            write_own(data, *(form.format(kind=kind, split=split) for kind in ("images", "masks")), count)
        (data / "classes.txt").write_text("sky\r\nsea\r\nland\r\n")
        found = data_sets.load_own(str(data))
        assert [len(part) for part in found] == [4, 2] and found[0].class_names == ("sky", "sea", "land")


def test_own_folders_in_vocs_layout_need_no_sbd(sample_data, tmp_path):
    voc = make_voc(tmp_path, sample_data) / "VOCdevkit" / "VOC2012"
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    with pytest.raises(DataError, match="train_aug needs SBD .* or use VOC's own train list alone"):
        data_sets.load_voc(str(tmp_path))
    train, val = data_sets.load_own(str(tmp_path))
    assert [path.name for path in train.masks] == ["2011_000003.png", "2011_000006.png"] and len(val) == 1
    largest = max(int(n) for path in train.masks + val.masks for n in np.unique(np.array(Image.open(path))) if n != 255)
    assert len(train.class_names) == largest + 1 and data_sets.check(train)["images"] == 2
    (voc / "ImageSets/Segmentation/val.txt").write_text("../../x\n")
    with pytest.raises(DataError, match="names must not lead out"):
        data_sets.load_own(str(tmp_path))


def spoilt(data: pathlib.Path, how: str) -> None:
    if how == "empty":
        shutil.rmtree(data)
        data.mkdir()
    elif how == "no masks":
        shutil.rmtree(data / "masks")
    elif how == "alone":
        (data / "masks/n3.png").unlink()
        (data / "images/n4.png").unlink()
    elif how == "twice":
        shutil.copy(data / "images/n3.png", data / "images/n3.bmp")
    elif how == "one class":
        (data / "classes.txt").write_text("all\n")
    elif how == "unknown":
        (data / "classes.txt").write_text("one\ntwo\n")
    elif how == "colours":
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(data / "masks/n3.png")


@pytest.mark.parametrize(
    "how, message",
    [
        ("empty", "holds neither images/ and masks/ nor PASCAL VOC's"),
        ("no masks", "no folder .*masks: images and their masks"),
        ("alone", "2 files of .* have no counterpart of the same name, with a mask's suffix .png: n3, n4"),
        ("twice", "n3.bmp and .*n3.png have one name but for the suffix: remove one"),
        ("one class", "classes.txt: 1 classes; there must be 2 to"),
        ("unknown", r"n2.png holds 2: no class of .*\((training|validation)\)"),
        ("colours", "n3.png has the mode RGB"),
    ],
)
def test_own_folders_that_cannot_be_used_are_one_line(how, message, tmp_path):
    write_own(tmp_path / "data", "images", "masks", 30)
    spoilt(tmp_path / "data", how)
    with pytest.raises(DataError, match=message) as error:
        segmentation.load_sets("own", str(tmp_path / "data"))
    assert "\n" not in str(error.value)


def with_litter(root: pathlib.Path) -> None:
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        for path in [path for path in folder.iterdir() if path.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"no picture")
        for name in LITTER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"no picture")


@pytest.mark.parametrize("name, make", [("voc", make_voc), ("ade20k", make_ade)])
def test_litter_lists_of_any_system_and_other_suffixes(sample_data, tmp_path, name, make):
    data = make(tmp_path / name, sample_data)
    expected = [(part.images, part.masks) for part in data_sets.DATASETS[name](str(data))]
    with_litter(tmp_path / name)
    for path in tmp_path.rglob("*.txt"):
        if folders.is_data(path.name):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b" \r\n") + b"\r\n \r\n")
    found = data_sets.DATASETS[name](str(data))
    assert [(part.images, part.masks) for part in found] == expected
    for part in found:
        data_sets.check(part)


def test_a_class_never_predicted_counts_as_zero_and_one_that_is_nowhere_not_at_all():
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    found = scores(confusion(truth, np.array([[0, 0, 0, 2]], np.uint8), 4))  # 2 only where nothing counts
    assert found["iou"] == [2 / 3, 0.0, None, None] and found["miou"] == pytest.approx(1 / 3)
    assert found["pixel_accuracy"] == pytest.approx(2 / 3)


def small_set(folder: pathlib.Path, masks: list[np.ndarray], size=(20, 30), mode="RGB") -> SegmentationSet:
    """Grey or coloured noise with the given masks, numbered as VOC's."""
    rng = np.random.default_rng(0)
    images, files = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks):
        images.append(folder / f"{i}.jpg")
        files.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert(mode).save(images[-1])
        Image.fromarray(mask.astype(np.uint8)).save(files[-1])
    numbers = data_sets._numbering({0: 0, 1: 1, 2: 2, 255: IGNORE})
    return SegmentationSet("the small set", images, files, ("nothing", "one", "two"), numbers)


def test_problems_of_the_whole_set_are_listed_at_once(tmp_path):
    good, unknown = np.ones((20, 30)), np.full((20, 30), 7)
    dataset = small_set(tmp_path, [good, np.ones((20, 31)), unknown, good, good, good])
    dataset.images[3].unlink()
    dataset.images[4].write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(dataset.masks[5])  # colours, not numbers
    with pytest.raises(DataError) as error:
        data_sets.check(dataset)
    text = str(error.value)
    assert text.startswith("5 of 6 images of the small set") and "\n" not in text
    for part in (
        "1.png is 31 x 20 pixels, its image 1.jpg 30 x 20",
        "2.png holds 7: no class of the small set",
        "3.jpg is missing",
        "4.jpg is no image",
        "5.png has the mode RGB",
    ):
        assert part in text, part
    with pytest.raises(DataError, match="no pixel of the 2 images"):
        data_sets.check(small_set(tmp_path / "void", [np.full((20, 30), 255)] * 2))
    for i in (1, 2, 4, 5):
        with pytest.raises(DataError, match=rf"{i}\.(png|jpg)"):
            dataset.read(i)


def test_grey_images_and_images_without_objects_are_used(tmp_path):
    dataset = small_set(tmp_path, [np.zeros((20, 30)), np.ones((20, 30))], mode="L")
    assert data_sets.check(dataset) == {"images": 2, "labelled_pixels": 1200, "classes": 2}
    image, mask = dataset.read(0)
    assert image.shape == (20, 30, 3) and (image == image[..., :1]).all() and not mask.any()


OPTIONS = dict(crop_size=33, short_side=40, long_side=160, scale=(0.5, 2.0), flip_prob=0.5, fill=(1, 2, 3))


def test_batches_are_a_function_of_the_step(tmp_path):
    """Any start, any number of processes and threads: the same rows; image and mask move together."""
    rng = np.random.default_rng(1)
    dataset = small_set(tmp_path, [rng.integers(0, 3, (20, 30)) for _ in range(5)])

    def rows(first_step, steps, **options):
        batches = data_sets.train_batches(dataset, first_step, seed=3, batch_size=4, **OPTIONS, **options)
        return [next(batches) for _ in range(steps)]

    all_steps = rows(0, 4, threads=1)
    late = rows(3, 1, threads=4)[0]
    np.testing.assert_array_equal(late["image"], all_steps[3]["image"])
    np.testing.assert_array_equal(late["mask"], all_steps[3]["mask"])
    halves = [rows(2, 1, process_index=p, process_count=2)[0]["image"] for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), all_steps[2]["image"])
    batch = all_steps[0]
    assert batch["image"].shape == (4, 33, 33, 3) and batch["mask"].shape == (4, 33, 33)
    small = [np.concatenate([b[name] for b in all_steps]) for name in ("image", "mask")]
    padded = (small[0] == np.uint8([1, 2, 3])).all(axis=-1)
    assert padded.any() and (small[1][padded] == IGNORE).all()


def test_crops_scales_and_flips_are_in_their_ranges():
    """An image whose colours are its coordinates tells where a crop came from."""
    y, x = np.mgrid[:100, :160].astype(np.uint8)
    image, seen, flipped = np.stack([y, x, x], axis=-1), [], 0
    for seed in range(40):
        crop, mask = data_sets.augmented(image, x, np.random.default_rng(seed), **OPTIONS)
        inside = mask != IGNORE
        gradient = np.diff(crop[..., 1].astype(int), axis=1)[inside[:, 1:]]
        flipped += gradient.mean() < 0
        seen.append(abs(1 / gradient.mean()))
        assert np.abs(crop[..., 1][inside].astype(int) - mask[inside]).max() <= 6  # bilinear against nearest
    assert 10 < flipped < 30 and min(seen) < 0.35 and max(seen) > 0.6  # of 40 / 100 * (0.5 to 2)
    assert 0.19 < min(seen) and max(seen) < 0.85


# ---- Network and loss -----------------------------------------------------------------------------------------------
def test_the_loss_is_the_mean_over_labelled_pixels():
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(2, 3, 4, 5)), rng.integers(0, 5, (2, 9, 13))
    mask[0, :4] = IGNORE
    total, count = 0.0, 0
    for b, y, x in np.ndindex(mask.shape):
        if mask[b, y, x] == IGNORE:
            continue
        v, u = y * 2 / 8, x * 3 / 12  # corners on corners
        i, j = min(int(v), 1), min(int(u), 2)
        rows = logits[b, i, j : j + 2] * (1 - v + i) + logits[b, i + 1, j : j + 2] * (v - i)
        at = rows[0] * (1 - u + j) + rows[1] * (u - j)
        total += np.log(np.exp(at).sum()) - at[mask[b, y, x]]
        count += 1
    batch = {"mask": mask.astype(np.uint8)}
    method = Segmenter(None)
    loss, _, metrics = method.loss(np.float32(logits), batch, {}, 0)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["labelled"]) == pytest.approx(count / mask.size)
    nothing, *_ = method.loss(np.float32(logits), {"mask": np.full((2, 9, 13), IGNORE, np.uint8)}, {}, 0)
    assert float(nothing) == 0


class ByColour(nn.Module):
    """Every 8th pixel's red, green and blue as logits: a network of known predictions."""

    def __call__(self, images, *, train):
        return images[:, ::8, ::8]


def test_whole_images_are_predicted_where_they_are(tmp_path):
    """A colour per class: the borders come back to their pixels, for images of three sizes."""
    truths = []
    for height, width in ((64, 80), (130, 64), (97, 97)):
        y, x = np.mgrid[:height, :width]
        truths.append(np.where(x < width // 2, 0, np.where(y < height // 2, 1, 2)).astype(np.uint8))
    dataset = small_set(tmp_path, truths)
    for path, truth in zip(dataset.images, truths, strict=True):
        Image.fromarray(np.eye(3, dtype=np.uint8)[truth] * 255).save(path.with_suffix(".bmp"))
    dataset.images[:] = [path.with_suffix(".bmp") for path in dataset.images]
    found = {
        i: (truth, predicted)
        for i, _, truth, predicted in predict(ByColour(), {}, dataset, short_side=128, long_side=512, fill=(0, 0, 0))
    }
    assert sorted(found) == [0, 1, 2]
    for truth, predicted in found.values():
        assert predicted.shape == truth.shape and (predicted == truth).mean() > 0.93
    # Nothing is shifted: the border lies where it is, give or take the 4 pixels of the coarse map it is read from.
    truth, predicted = found[2]
    assert abs(int((predicted[10] == 0).sum()) - 48) <= 3 and abs(int((predicted[:, 90] == 1).sum()) - 48) <= 3


@pytest.mark.slow
def test_full_size_configs_have_the_papers_steps_and_shapes():
    for variant, classes, train_images, steps in (("voc", 21, 10582, 29761), ("ade20k", 150, 20210, 75787)):
        config = segmentation_config.get_config(variant)
        encoder, pretrained = transfer.load_pretrained("none", config)
        method = segmentation.make_method(config, encoder, classes)
        experiment = transfer.make_experiment(config, method, train_images, seed=0)
        assert experiment.total_steps == steps and pretrained == {}
        state = jax.eval_shape(
            lambda experiment=experiment: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0)
        )
        sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()}
        assert sizes["encoder"] == 25_557_032 - 2_049_000  # ResNet-50 without its classifier
        assert sum(sizes.values()) - sizes["encoder"] == 9 * 256 * (2048 + 256) + 4 * 256 + 257 * classes
        spec = experiment.batch_spec
        logits = jax.eval_shape(
            lambda s, b, experiment=experiment: experiment.method.embed(s.params, s.model_state, {}, b, {})[0],
            state,
            spec,
        )
        assert logits.shape == (16, *{"voc": (33, 33), "ade20k": (32, 32)}[variant], classes)


def test_every_kind_of_encoder_has_a_map():
    image = jax.ShapeDtypeStruct((1, 65, 65, 3), np.float32)
    for encoder, name, shape in (
        (ResNet(depth=18, num_classes=10, bn_groups=4), "stage4", (1, 9, 9, 3)),
        (ResNet(depth=18, version=2, norm="group", stem="small"), "stage4", (1, 33, 33, 3)),
        (VdimEncoder(table="small", frames=8), "global", (1, 3, 3, 3)),
    ):
        encoder, layer = dense_encoder(encoder, 0, output_stride=8, dilate=True)
        net = FCN(encoder, layer, num_classes=3, channels=8, dilation=2)
        out, _ = jax.eval_shape(lambda x, net=net: net.init_with_output(jax.random.key(0), x, train=True), image)
        assert layer == name and out.shape == shape


@pytest.mark.slow
def test_the_full_size_step_compiles_for_eight_devices():
    """The paper's crop and batch over 8 devices; a ResNet-18, as the ResNet-50 compiles for minutes on a core."""
    config = segmentation_config.get_config("voc")
    config.encoder.depth = 18
    encoder, _ = transfer.load_pretrained("none", config)
    experiment = transfer.make_experiment(config, segmentation.make_method(config, encoder, 21), 10582, seed=0)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    compiled = compile_step(experiment, state, mesh)
    image, mask = (compiled.input_shardings[0][1][name] for name in ("image", "mask"))
    assert image.shard_shape((16, 513, 513, 3)) == (2, 513, 513, 3) and mask.shard_shape((16, 513, 513))[0] == 2
    assert "all-reduce" in compiled.as_text()  # gradients and BatchNorm's statistics are the whole batch's


# ---- The program ----------------------------------------------------------------------------------------------------
# Windows of 97 pixels of the samples at full resolution, where small objects have some pixels: (top, left).
WINDOWS = {"2011_000003": (140, 330), "2011_000006": (190, 340), "2011_000025": (160, 385)}


@pytest.fixture(scope="module")
def small_voc(sample_data, tmp_path_factory) -> pathlib.Path:
    """VOC's folders with windows of the three samples, in train as in val, and one of them again as SBD's."""
    voc = tmp_path_factory.mktemp("voc") / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    source = sample_data / "voc" / "semantic_segmentation"
    for name, (top, left) in WINDOWS.items():
        box = (left, top, left + 97, top + 97)
        Image.open(source / "JPEGImages" / f"{name}.jpg").crop(box).save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.open(source / "SegmentationClass" / f"{name}.png").crop(box).save(
            voc / "SegmentationClass" / f"{name}.png"
        )
    shutil.copy(voc / "SegmentationClass" / "2011_000003.png", voc / "SegmentationClassAug")
    for split in ("train", "val"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(WINDOWS) + "\n")
    return voc.parent


def start(*arguments, config="configs/segmentation.py:voc,demo") -> subprocess.Popen:
    return start_module(
        "evaluation.segmentation", f"--config={config}", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_small_network_learns_the_samples_also_when_killed(small_voc, tmp_path):
    """SIGKILL once a checkpoint is there; the second start goes on from it, and learns the training images by heart."""
    arguments = [
        "--checkpoint=none",
        f"--data={small_voc}",
        f"--workdir={tmp_path}",
        "--config.batch_size=3",
        "--config.schedule.epochs=80.0",
        "--config.schedule.lr=0.2",
        "--config.data.scale=(1.0, 1.0)",
        "--config.data.flip_prob=0.0",
        "--config.run.checkpoint_every=20",
    ]
    process, run = start(*arguments), tmp_path / "repeat_0"
    deadline = time.time() + 500
    while not (run / "checkpoints" / "20" / "MANIFEST.json").exists() and time.time() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "result.json").exists()

    process = start(*arguments)
    out, log = process.communicate(timeout=500)
    assert process.returncode == 0 and "going on from step" in log, log[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["miou"] > 0.9, result["iou"]
    assert sum(value is not None for value in result["iou"].values()) == 7
    assert (result["repeats"]["repeat_0"]["steps"], result["repeats"]["repeat_0"]["seed"]) == (80, 0)
    assert f"| mean | {100 * result['miou']:.1f} (std 0.0)" in out == (tmp_path / "result.md").read_text() + "\n"
    with Image.open(run / "predictions.png") as picture:
        assert picture.size[0] == 900
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 81, 20)) and lines[-1]["loss"] < lines[0]["loss"] / 3


def test_the_result_is_the_mean_over_repeats():
    sizes = {"train_images": 3, "val_images": 2, "steps": 9}
    repeats = {
        "repeat_0": {"miou": 0.5, "pixel_accuracy": 0.8, "iou": [0.5, None], **sizes},
        "repeat_1": {"miou": 0.7, "pixel_accuracy": 0.9, "iou": [0.6, 0.8], **sizes},
    }
    found = transfer.means(repeats) | segmentation_report.over_repeats(repeats, class_names=("one", "two"))
    assert found == pytest.approx(
        {"miou": 0.6, "miou_std": 0.1, "pixel_accuracy": 0.85, "iou": pytest.approx({"one": 0.55, "two": 0.8})}
    )
    text = segmentation_report.markdown(
        {
            "config": "voc",
            "checkpoint": "RUN",
            "data": "DIR",
            "repeats": repeats,
            **found,
        }
    )
    assert "| mean | 60.0 (std 10.0) | 85.0 | |" in text and "| one | 55.0 |" in text


def test_problems_are_said_before_training(small_voc, tmp_path):
    """In this process: evaluate() raises before a run directory exists."""
    config = segmentation_config.get_config("voc,demo")
    data = tmp_path / "VOC2012"
    shutil.copytree(small_voc / "VOC2012", data)
    mask = data / "SegmentationClass" / "2011_000025.png"
    Image.open(mask).crop((0, 0, 96, 97)).save(mask)
    with pytest.raises(DataError, match="1 of 3 images of VOC 2012 train_aug.*96 x 97 pixels.*97 x 97"):
        segmentation.evaluate(config, source="none", data=str(tmp_path), workdir=str(tmp_path / "w"))
    shutil.rmtree(data / "SegmentationClassAug")
    for source, folder, message in (
        ("none", tmp_path, "train_aug needs SBD"),
        ("none", data / "JPEGImages", "holds no PASCAL VOC"),
    ):
        with pytest.raises(DataError, match=message):
            segmentation.evaluate(config, source=source, data=str(folder), workdir=str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    with pytest.raises(ValueError, match="voc and ade20k exclude each other: choose one"):
        segmentation_config.get_config("voc,ade20k")
