"""WebDataset's shards: the same images as class folders, read in any order; what is damaged or ambiguous is named."""

import io
import json
import pathlib
import subprocess
import tarfile

import cv2
import numpy as np
import pytest

from input_pipeline import images
from input_pipeline.streams import tar_shards
from vivi_jax.errors import DataError


def png(seed: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def write_shard(path: pathlib.Path, members: dict[str, bytes | str], **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def batch(labelled: images.LabelledImages) -> tuple[np.ndarray, list[str]]:
    [one] = images.eval_batches(labelled, batch_size=len(labelled), image_size=14)
    return one["image"], [labelled.class_names[label] for label in one["label"]]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_give_what_class_folders_give(tmp_path, form):
    for seed, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")):
        (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / name).write_bytes(png(seed))
    long = "a" * 90 + "/" + "b" * 90  # a name that takes a header of its own
    write_shard(
        tmp_path / "shards/x-000000.tar",
        {"0.png": png(0), "0.cls": "cat\n", "0.txt": "a caption", f"{long}.json": '{"label": "cat"}',
         f"{long}.png": png(1)},
        format=form,
    )  # fmt: skip
    write_shard(
        tmp_path / "shards/x-000001.tar",
        {"in/2.json": '{"cls": "dog"}', "in/2.PNG": png(2), "__MACOSX/._2.png": b"", "3.seg.png": b"", "3.png": png(3),
         "3.cls": "dog", "none.json": "{}"},
        format=form,
    )  # fmt: skip
    expected, classes = batch(images.load_folder(tmp_path / "folders"))
    found = images.load_folder(tmp_path / "shards")
    pixels, labels = batch(found)
    np.testing.assert_array_equal(pixels, expected)
    assert labels == classes == ["cat", "cat", "dog", "dog"]
    assert [found.read(i) for i in (3, 0, 2)] == [png(3), png(0), png(2)]
    assert found.name(2) == f"{tmp_path}/shards/x-000001.tar/in/2.PNG"


def test_a_shard_of_the_tar_command(tmp_path):
    (tmp_path / "in/b").mkdir(parents=True)
    for name, data in (("a.png", png(1)), ("a.cls", b"1"), ("b/c.png", png(2)), ("b/c.cls", b"0"), (".DS_Store", b"x")):
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-cf", tmp_path / "out/s.tar", "--sort=name", "-C", tmp_path / "in", "."], check=True)
    found = images.load_folder(tmp_path / "out")
    assert [found.read(i) for i in range(2)] == [png(1), png(2)] and found.labels.tolist() == [1, 0]


def test_classes_that_are_numbers_keep_the_order_of_their_values(tmp_path):
    write_shard(tmp_path / "a.tar", {f"{n}.{end}": data for n in (10, 2, 0)
                                     for end, data in (("png", png(n)), ("cls", f"{n:02}"))})  # fmt: skip
    found = images.load_folder(tmp_path)
    assert found.class_names == ["0", "2", "10"] and found.labels.tolist() == [2, 1, 0]


def samples(first: int, count: int, classes: int = 2) -> dict[str, bytes | str]:
    return {f"{k}.{end}": data for k in range(first, first + count)
            for end, data in (("png", png(k)), ("cls", str(k % classes)))}  # fmt: skip


@pytest.mark.parametrize(
    "train, test",
    [("train/a.tar", "test/a.tar"), ("train/a.tar", "val/b.tar"), ("in-train-000.tar", "in-validation-000.tar")],
)
def test_train_and_test_by_folder_or_by_name(tmp_path, train, test):
    write_shard(tmp_path / train, samples(0, 4))
    write_shard(tmp_path / test, samples(4, 2))
    parts = [images.load_labelled(str(tmp_path), split) for split in ("train", "test")]
    assert [[part.read(i) for i in range(len(part))] for part in parts] == [
        [png(k) for k in range(4)],
        [png(k) for k in (4, 5)],
    ]
    write_shard(tmp_path / test, samples(4, 3, classes=3))
    with pytest.raises(DataError, match="has classes that .* lacks: 2$"):
        images.load_labelled(str(tmp_path), "test")


def test_one_image_in_five_is_held_out_where_names_have_no_part(tmp_path):
    write_shard(tmp_path / "a.tar", samples(0, 60))
    names = [{part.name(i) for i in range(len(part))} for split in ("train", "test")
             for part in [images.load_labelled(str(tmp_path), split)]]  # fmt: skip
    assert not names[0] & names[1] and len(names[0]) + len(names[1]) == 60 and 5 <= len(names[1]) <= 20


def test_archives_beside_class_folders_are_not_read(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/0.png").write_bytes(png(0))
    (tmp_path / "cat.tar").write_bytes(b"what it came from")
    assert images.load_folder(tmp_path).name(0) == str(tmp_path / "cat/0.png")


WHOLE = {"0.png": png(0), "0.cls": "0"}


@pytest.mark.parametrize(
    "members, message",
    [
        ({"0.png": png(0)}, "a.tar: 0.png has no label: there is neither 0.cls nor 0.json"),
        ({"0.png": png(0), "0.json": "[1]"}, "0.json has no 'label' or 'cls'"),
        ({"0.png": png(0), "0.json": "{"}, "0.json is no JSON"),
        ({"0.png": png(0), "0.json": "[" * 100_000}, "0.json is no JSON"),
        ({"0.png": png(0), "0.cls": b"\xff"}, "0.cls is no text"),
        ({"0.png": png(0), "0.cls": ""}, "0.cls has the label '': neither a number from 0 on nor a name"),
        ({"0.png": png(0), "0.cls": "-1"}, "0.cls has the label '-1'"),
        ({"0.png": png(0), "0.json": '{"label": true}'}, "0.json has the label 'True'"),
        ({"0.png": png(0), "0.json": '{"label": 1.5}'}, "0.json has the label '1.5'"),
        ({"0.png": png(0), "0.cls": "0" * 2_000_000}, "0.cls has 2000000 bytes, too many for a label"),
        ({**WHOLE, "0.jpg": b"x"}, "0.png and 0.jpg are two images of one sample, 0"),
        ({**WHOLE, "1.png": png(1), "1.cls": "dog"}, "1.png has the label 'dog', and .*0.png the number 0"),
        ({**WHOLE, "1\n.png": png(1)}, r"control characters: '1\\n.png'"),
        ({"0.txt": "a"}, "no images in the shards of"),
    ],
)
def test_what_is_wrong_with_a_sample_is_one_line(tmp_path, members, message):
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as error:
        images.load_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_member_twice_and_a_link_are_refused(tmp_path):
    shard = write_shard(tmp_path / "a.tar", WHOLE)
    with tarfile.open(shard, "a") as archive:
        archive.addfile(tarfile.TarInfo("0.cls"))
    with pytest.raises(DataError, match=r"a.tar holds 0.cls twice"):
        images.load_folder(tmp_path)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        with tarfile.open(shard, "w") as archive:
            member = tarfile.TarInfo("0.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(DataError, match=r"a.tar: 0.png is a link or the like"):
            images.load_folder(tmp_path)


def test_a_shard_that_is_cut_off_or_damaged_anywhere_is_refused(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {**WHOLE, "1.png": png(1), "1.cls": "1"})
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        ends = [member.offset for member in archive.getmembers()][1:] + [archive.offset]
    for size in [*ends, *(end + 100 for end in ends[:-1]), ends[-1] - 512, 100, 0]:
        shard.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a.tar (is cut off or damaged behind|is no tar file)"):
            images.load_folder(tmp_path)
    for end in ends[:-1]:  # the name in a header
        shard.write_bytes(whole[:end] + b"?" + whole[end + 1 :])
        with pytest.raises(DataError, match="a.tar is cut off or damaged behind"):
            images.load_folder(tmp_path)
    shard.write_bytes(whole)
    found = images.load_folder(tmp_path)
    shard.write_bytes(whole[: ends[1] + 600])
    assert found.read(0) == png(0)
    with pytest.raises(DataError, match="a.tar is cut off within 1.png"):
        found.read(1)


def test_a_damaged_image_of_a_shard_is_named(tmp_path):
    write_shard(tmp_path / "a.tar", {**WHOLE, "1.jpg": b"no image", "1.cls": "0"})
    with pytest.raises(DataError, match=r"a.tar/1.jpg is (no image|damaged)"):
        batch(images.load_folder(tmp_path))


def test_compressed_shards_and_names_of_two_kinds_are_refused(tmp_path):
    write_shard(tmp_path / "a/x.tar.gz", WHOLE)
    with pytest.raises(DataError, match=r"x.tar.gz is compressed: unpack it to a .tar file"):
        images.load_folder(tmp_path / "a")
    write_shard(tmp_path / "b/x.tar", WHOLE)
    write_shard(tmp_path / "b/x-train.0.tar", WHOLE)
    with pytest.raises(DataError, match=r"b/x.tar: its name has none of train, test, val"):
        images.load_labelled(str(tmp_path / "b"), "train")
    (tmp_path / "b/x.tar").rename(tmp_path / "b/x-train-1.tar")
    with pytest.raises(DataError, match="has shards of train by their names: it needs train and one of test"):
        images.load_labelled(str(tmp_path / "b"), "train")


def test_labels_of_json_may_be_names_or_numbers(tmp_path):
    for label, expected in ((7, "7"), ("7", "7"), ("tabby cat", "tabby cat")):
        write_shard(tmp_path / "a.tar", {"0.png": png(0), "0.json": json.dumps({"label": label, "width": 16})})
        [image] = tar_shards.images_in([tmp_path / "a.tar"])
        assert image.label == expected
