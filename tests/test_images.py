"""Labelled images: every source gives the same pixels and labels, in a fixed order; what is damaged is named."""

import io
import logging
import os
import pathlib
import shutil
import struct
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from evaluation.protocols.vtab import data as vtab_data
from helpers.folders import LITTER
from helpers.frame_stores import jpeg, write_store
from helpers.pictures import claims
from input_pipeline import images
from input_pipeline.streams import decode, picture_size
from vivi_jax import files
from vivi_jax.errors import DataError


def png(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()


def write_tree(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def flat(colour: tuple[int, int, int], size: int = 8) -> bytes:
    return png(np.full((size, size, 3), colour, np.uint8))


def batches(labelled, batch_size=4, image_size=8) -> tuple[np.ndarray, np.ndarray]:
    parts = list(images.eval_batches(labelled, batch_size=batch_size, image_size=image_size))
    return np.concatenate([p["image"] for p in parts]), np.concatenate([p["label"] for p in parts])


def test_real_class_folders(sample_data):
    train = images.load_labelled(str(sample_data / "cifar10_mini"), "train")
    test = images.load_labelled(str(sample_data / "cifar10_mini"), "test")
    assert (len(train), len(test)) == (400, 100)
    assert (
        train.class_names
        == test.class_names
        == sorted(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    )
    assert np.bincount(test.labels).tolist() == [10] * 10
    parts = list(images.eval_batches(test, batch_size=48, image_size=32))
    assert [p["image"].shape for p in parts] == [(48, 32, 32, 3), (48, 32, 32, 3), (4, 32, 32, 3)]
    assert parts[0]["image"].dtype == np.uint8 and parts[0]["label"].dtype == np.int32
    assert np.concatenate([p["label"] for p in parts]).tolist() == np.sort(test.labels).tolist()
    for p in parts:
        assert p["image"].std() > 30  # pictures


def test_folders_without_parts_are_split_by_name_and_stay_split(sample_data, tmp_path, caplog):
    source = str(sample_data / "dtd_mini")
    with caplog.at_level(logging.INFO, logger="input_pipeline"):
        train, test = (images.load_labelled(source, split) for split in ("train", "test"))
    total = sum(p.suffix == ".jpg" for p in (sample_data / "dtd_mini").rglob("*"))
    assert f"test is {len(test)} of its {total} images" in caplog.text
    names = [{labelled.name(i) for i in range(len(labelled))} for labelled in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == total
    assert 0.1 * total <= len(test) <= 0.35 * total
    # Elsewhere, and with an image taken away, all others stay where they were.
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    gone = sorted(names[0])[0]
    (copy / pathlib.Path(gone).relative_to(source)).unlink()
    again = images.load_labelled(str(copy), "train")
    assert {again.name(i).replace(str(copy), source) for i in range(len(again))} == names[0] - {gone}
    assert {again.class_names[label] for label in again.labels} == {train.class_names[label] for label in train.labels}


def test_the_central_square_is_seven_eighths_of_the_short_side(tmp_path):
    rgb = np.zeros((80, 160, 3), np.uint8)
    rgb[5:75, 45:115] = 255  # 70 = 7/8 of 80, centred
    labelled = images.load_folder(write_tree(tmp_path, {"c/wide.png": png(rgb)}))
    assert (batches(labelled, image_size=70)[0] == 255).all()
    rgb[5, 45] = 0  # its corner pixel
    labelled = images.load_folder(write_tree(tmp_path, {"c/wide.png": png(rgb)}))
    assert batches(labelled, image_size=70)[0][0, 0, 0].tolist() == [0, 0, 0]
    assert (batches(labelled, image_size=70)[0] == 0).sum() == 3


def pil(mode: str, colour, form: str) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (24, 16), colour).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize(
    "mode,colour,form,rgb",
    [
        ("RGB", (200, 30, 90), "JPEG", (200, 30, 90)),
        ("L", 120, "JPEG", (120, 120, 120)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("RGB", (200, 30, 90), "PNG", (200, 30, 90)),
        ("L", 120, "PNG", (120, 120, 120)),
        ("LA", (120, 7), "PNG", (120, 120, 120)),
        ("RGBA", (200, 30, 90, 128), "PNG", (200, 30, 90)),  # opacity is dropped
        ("P", 5, "PNG", None),
        ("RGB", (200, 30, 90), "BMP", (200, 30, 90)),
        ("P", 5, "GIF", None),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, form, rgb):
    data = pil(mode, colour, form)
    rgb = rgb or Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
    labelled = images.load_folder(write_tree(tmp_path, {f"c/x.{form.lower()}": data}))
    [image], labels = batches(labelled)
    assert image.shape == (8, 8, 3) and labels.tolist() == [0]
    assert np.abs(image.astype(int) - rgb).max() <= 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        flat((1, 2, 3), 64)[:90],
        cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()[:900],
    ],
)
def test_a_damaged_image_is_named(tmp_path, data):
    tree = write_tree(tmp_path, {"a/1.png": flat((0, 0, 0)), "a/2.jpg": data, "b/3.png": flat((0, 0, 0))})
    with pytest.raises(DataError, match=r"a/2\.jpg is (no image|damaged)") as e:
        batches(images.load_folder(tree))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("size, kind", [((20000, 20000), k) for k in ("png", "jpg", "bmp")] + [((9000, 8000), "png")])
def test_a_picture_that_would_take_gigabytes_is_refused_by_its_header(tmp_path, size, kind):
    tree = write_tree(tmp_path, {"a/1.png": flat((0, 0, 0)), f"a/2.{kind}": claims(*size, kind)})
    with pytest.raises(DataError, match=rf"a/2\.{kind} is .*(more|larger) than the 64 million"):
        batches(images.load_folder(tree))
    with pytest.raises(ValueError, match="(more|larger) than the 64 million"):
        decode.decode_whole(claims(*size, kind))
    with pytest.raises(DataError, match=rf"a/2\.{kind} is .*(more|larger) than the 64 million"):
        with picture_size.opened(tree / f"a/2.{kind}"):
            pass


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
def test_the_limit_is_of_the_pixels(ending):
    data = cv2.imencode(ending, np.zeros((10, 20, 3), np.uint8))[1].tobytes()
    assert decode.image_height_width(data, "x", max_pixels=200) == (10, 20)
    with pytest.raises(picture_size.TooLarge, match="x is 20 x 10 pixels, more than the 0.000199 million"):
        decode.image_height_width(data, "x", max_pixels=199)


def test_test_labels_use_the_training_classes(tmp_path):
    files = {f"train/{c}/0.png": flat((i, 0, 0)) for i, c in enumerate(["ant", "bee", "cow"])}
    tree = write_tree(tmp_path, files | {"val/cow/0.png": flat((2, 0, 0)), "val/bee/0.png": flat((1, 0, 0))})
    pixels, labels = batches(images.load_labelled(str(tree), "test"))
    assert labels.tolist() == pixels[:, 0, 0, 0].tolist() == [1, 2]
    write_tree(tree, {"val/dog/0.png": flat((3, 0, 0))})
    with pytest.raises(DataError, match="classes that .* lacks: dog"):
        images.load_labelled(str(tree), "test")


def make_store(directory: pathlib.Path, labels: list[int]) -> pathlib.Path:
    """Video v has v + 3 frames of colour (40 v, 20 frame, 0)."""
    rows = [dict(frames=v + 3, fps=25, height=16, width=16, label=label) for v, label in enumerate(labels)]
    frames = [
        jpeg(np.full((16, 16, 3), (40 * v, 20 * k, 0), np.uint8)) for v in range(len(labels)) for k in range(v + 3)
    ]
    write_store(directory, rows, frames, ("left", "right"))
    return directory


def test_prepared_videos_give_their_middle_frames(tmp_path, caplog):
    make_store(tmp_path / "train", [1, -1, 0, 1])
    make_store(tmp_path / "test", [0, 1])
    pixels, labels = batches(images.load_labelled(str(tmp_path), "train"))
    assert labels.tolist() == [1, 0, 1]
    assert "1 of 4 videos" in caplog.text and "no label" in caplog.text
    expected = [(40 * v, 20 * ((v + 3) // 2), 0) for v in (0, 2, 3)]
    assert np.abs(pixels[:, 0, 0].astype(int) - expected).max() <= 3
    assert batches(images.load_labelled(str(tmp_path), "test"))[1].tolist() == [0, 1]
    make_store(tmp_path / "unlabelled", [-1, -1])
    with pytest.raises(DataError, match="no video of .* has a label; prepare them again with --labels"):
        images.load_labelled(str(tmp_path / "unlabelled"), "train")


def test_other_files_are_counted_not_hidden(tmp_path, caplog):
    tree = write_tree(tmp_path, {"a/1.png": flat((0, 0, 0)), "a/notes.txt": b"hello"})
    assert len(images.load_folder(tree)) == 1
    assert "1 files of" in caplog.text and "notes.txt" in caplog.text


def test_what_is_no_source_gets_one_line(tmp_path):
    (tmp_path / "flowers").mkdir()
    for source, message in [
        ("cifer10", "'cifer10' is neither a folder nor a TFDS data set; nearest: .*cifar10"),
        (str(tmp_path / "flowrs"), f"nearest: {tmp_path}/flowers"),
        (str(tmp_path / "flowers"), "no images in .*flowers: it must be"),
    ]:
        with pytest.raises(DataError, match=message) as e:
            images.load_labelled(source, "train")
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="no split 'valid'"):
        images.load_labelled(str(tmp_path), "valid")
    write_tree(tmp_path, {"train/a/1.png": flat((0, 0, 0))})
    with pytest.raises(DataError, match="has train/ but none of test/, val/, validation/"):
        images.load_labelled(str(tmp_path), "test")


def test_tfds_by_name(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=9):
        labelled = images.load_labelled("cifar10", "train", data_dir=str(tmp_path))
        assert len(labelled) == 9 and len(labelled.class_names) == 10
        pixels, labels = batches(labelled, batch_size=5, image_size=28)
        expected = list(tfds.as_numpy(tfds.load("cifar10", split="train", data_dir=str(tmp_path))))
    assert labels.tolist() == [e["label"] for e in expected]
    # 28 = 7/8 of 32: the central square of the decoded image, unchanged.
    np.testing.assert_array_equal(pixels, np.stack([e["image"][2:30, 2:30] for e in expected]))
    with tfds.testing.mock_data(num_examples=2), pytest.raises(DataError, match="'imdb_reviews': it has no image"):
        images.load_labelled("imdb_reviews", "train", data_dir=str(tmp_path))


# ---- Folders as people have them ------------------------------------------------------------------------------------
def bmp(indices: np.ndarray, palette: np.ndarray, bits: int, *, rle: bool = False, top_down: bool = False) -> bytes:
    """A BMP file with a palette, as its specification says: indices uint8[h, w], palette uint8[n, 3] RGB."""
    height, width = indices.shape
    rows = indices if top_down else indices[::-1]
    if rle:  # pairs of (1, index), each row ended by (0, 0), the picture by (0, 1)
        data = b"".join(
            b"".join(bytes([1, i << (8 - bits) if bits == 4 else i]) for i in row) + b"\0\0" for row in rows
        )
        data += b"\0\1"
    else:
        shifted = ((rows[..., None] >> np.arange(bits)[::-1]) & 1).reshape(height, -1).astype(np.uint8)
        packed = np.packbits(shifted, axis=1)
        data = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).tobytes()
    colours = b"".join(bytes([b, g, r, 0]) for r, g, b in palette.tolist())
    offset = 54 + len(colours)
    compression = (1 if bits == 8 else 2) if rle else 0
    header = struct.pack("<2sIHHI", b"BM", offset + len(data), 0, 0, offset)
    signed = -height if top_down else height
    header += struct.pack("<IiiHHIIiiII", 40, width, signed, 1, bits, compression, len(data), 0, 0, len(palette), 0)
    return header + colours + data


@pytest.mark.parametrize(
    "bits, options", [(1, {}), (4, {}), (8, {}), (8, {"top_down": True}), (8, {"rle": True}), (4, {"rle": True})]
)
def test_palettes_of_bmp_files_give_their_colours(tmp_path, bits, options):
    rng = np.random.default_rng(bits)
    indices = rng.integers(0, 2**bits, (16, 19), dtype=np.uint8)
    palette = rng.integers(0, 256, (2**bits, 3), dtype=np.uint8)
    data = bmp(indices, palette, bits, **options)
    np.testing.assert_array_equal(decode.decode_whole(data), palette[indices])
    labelled = images.load_folder(write_tree(tmp_path, {"c/x.bmp": data}))
    [pixels], _ = batches(labelled, image_size=14)  # 7/8 of 16
    np.testing.assert_array_equal(pixels, palette[indices][1:15, 3:17])
    assert (vtab_data.preprocess(data, 16) != 0).any()
    expected = vtab_data.preprocess(png(palette[indices]), 16)
    np.testing.assert_array_equal(vtab_data.preprocess(data, 16), expected)


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "name, form, mode, options",
    [
        ("x.webp", "WEBP", "RGB", {"lossless": True}),
        ("x.WEBP", "WEBP", "RGBA", {"lossless": True, "exact": True}),
        ("x.tif", "TIFF", "RGB", {}),
        ("x.tiff", "TIFF", "L", {"compression": "tiff_lzw"}),
        ("x.bmp", "BMP", "L", {}),
        ("x.dib", "BMP", "RGBA", {}),
        ("x.jfif", "PNG", "P", {}),  # what a file is, its beginning says
    ],
)
def test_every_format_that_the_decoders_read_counts(tmp_path, name, form, mode, options):
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = saved(Image.fromarray(rgb).convert(mode), form, **options)
    labelled = images.load_folder(write_tree(tmp_path, {f"c/{name}": data}))
    [pixels], _ = batches(labelled, image_size=14)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected[1:15, 1:15])


@pytest.mark.parametrize("form, options", [("TIFF", {}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})])
def test_opacity_changes_no_colour(form, options):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(rgb)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    found = decode.decode_whole(saved(image, form, **options))
    np.testing.assert_allclose(found.astype(int), rgb, atol=0 if form == "TIFF" else 12)


def test_the_first_picture_of_a_moving_webp(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    first, second = map(Image.fromarray, rgb)
    data = saved(first, "WEBP", lossless=True, save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode.decode_whole(data), rgb[0])


def test_litter_and_copies_are_no_images(tmp_path, caplog):
    mine = {f"{c}/{i}.png": flat((i, 0, 0)) for c in ("cat", "dog") for i in range(10)}
    litter = {f"{c}/{name}": flat((9, 9, 9)) for c in ("cat", "dog") for name in LITTER}
    hidden = {f"{name}/x.png": flat((9, 9, 9)) for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir")}
    tree = write_tree(tmp_path, mine | litter | hidden)
    found = [images.load_labelled(str(tree), split) for split in ("train", "test")]
    assert sum(map(len, found)) == 20 and found[0].class_names == ["cat", "dog"]
    assert "no images and not used" not in caplog.text


def test_linked_parts_count_and_circles_do_not(tmp_path):
    elsewhere = write_tree(tmp_path / "elsewhere", {f"{i}.png": flat((i, 0, 0)) for i in range(4)})
    data = write_tree(tmp_path / "data", {f"{c}/{i}.png": flat((i, 0, 0)) for c in ("cat", "dog") for i in range(3)})
    for link, target in (("dog/more", elsewhere), ("bird", elsewhere), ("dog/loop", data), ("cat/up", tmp_path)):
        (data / link).symlink_to(target, target_is_directory=True)
    found = images.load_folder(data)
    counts = dict(zip(found.class_names, np.bincount(found.labels).tolist(), strict=True))
    assert counts == {"bird": 4, "cat": 3, "dog": 7}
    (data / "cat" / "gone.png").symlink_to(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"cat/gone.png is a link to .*none.png, which is not there"):
        images.load_folder(data)


def test_names_that_no_encoding_fits_are_read_and_held_out(tmp_path, capsys):
    for i in range(20):
        folder = os.fsencode(tmp_path) + (b"/caf\xe9" if i % 2 else b"/tea")
        os.makedirs(folder, exist_ok=True)
        with open(folder + b"/\xff%d.png" % i, "wb") as file:
            file.write(flat((i, 0, 0)))
    found = [images.load_labelled(str(tmp_path), split) for split in ("train", "test")]
    assert len(found[0]) and len(found[1]) and len(found[0]) + len(found[1]) == 20
    assert sorted(batches(found[0])[0][:, 0, 0, 0].tolist() + batches(found[1])[0][:, 0, 0, 0].tolist()) == [*range(20)]
    files.write_text(tmp_path / "report.md", found[0].class_names[0])  # as reports name classes
    assert (tmp_path / "report.md").read_text() == "caf\\udce9"


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_tree(tmp_path, {f"train/{nfc}/1.png": flat((1, 0, 0)), "train/tea/2.png": flat((2, 0, 0))})
    write_tree(tmp_path, {f"test/{nfd}/1.png": flat((1, 0, 0))})
    test = images.load_labelled(str(tmp_path), "test")
    assert test.class_names == [nfc, "tea"] and test.labels.tolist() == [0]
    # A hold-out is the same on a disk that spells names in the other form.
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"thé/é{i}.png") for i in range(12)]
        write_tree(tmp_path / form, {name: flat((i, 0, 0)) for i, name in enumerate(names)})
    numbers = [batches(images.load_labelled(str(tmp_path / form), "test"))[0][:, 0, 0, 0] for form in ("NFC", "NFD")]
    assert sorted(numbers[0]) == sorted(numbers[1])
