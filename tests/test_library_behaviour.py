"""What other libraries do where this code relies on it: the rows of docs/library_behaviour.md that have no other test.

A failure after raising a version says which assumption no longer holds; the document says who makes it.
"""

import io
import os
import pathlib
import re

import av
import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.video_files import numbered, write_video


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of some pixels' size, uint8[height, width, 3]: neither flat nor all edges."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def saved(pixels: np.ndarray, form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


# ---- Pictures -------------------------------------------------------------------------------------------------------
def test_a_cropped_jpeg_is_the_crop_of_the_whole_but_for_its_outer_columns():
    data = saved(noise(96, 128), "JPEG", quality=90)
    whole = tf.io.decode_jpeg(data, channels=3).numpy()
    for y, x, height, width in ((0, 0, 96, 128), (3, 16, 40, 50), (17, 33, 60, 44), (50, 7, 46, 121)):
        crop = tf.io.decode_and_crop_jpeg(data, [y, x, height, width], channels=3).numpy()
        np.testing.assert_array_equal(crop[:, 1:-1], whole[y : y + height, x + 1 : x + width - 1])


def test_tensorflows_jpeg_is_the_fast_one_and_opencvs_and_pillows_the_exact_one():
    data = saved(noise(96, 128), "JPEG", quality=75)
    exact = np.asarray(Image.open(io.BytesIO(data)))
    flags = cv2.IMREAD_COLOR_RGB
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), flags), exact)
    np.testing.assert_array_equal(tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy(), exact)
    fast = np.abs(tf.io.decode_jpeg(data).numpy().astype(int) - exact)
    assert 0 < fast.max() <= 20 and fast.mean() < 2


def test_tensorflow_takes_a_palette_in_a_bmp_file_for_grey_levels_and_lacks_formats():
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(indices)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "BMP")
    np.testing.assert_array_equal(tf.io.decode_image(file.getvalue(), channels=3).numpy(), np.stack([indices] * 3, -1))
    moving = saved(noise(16, 16), "WEBP", save_all=True, append_images=[Image.fromarray(noise(16, 16, 1))])
    for data in (moving, saved(noise(16, 16), "TIFF")):
        with pytest.raises(tf.errors.InvalidArgumentError):
            tf.io.decode_image(data, channels=3, expand_animations=False)


def test_only_opencv_turns_pictures_by_exif_and_it_can_be_told_not_to():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(noise(16, 32), "JPEG", exif=exif)
    array = np.frombuffer(data, np.uint8)
    assert cv2.imdecode(array, cv2.IMREAD_COLOR_RGB).shape == (32, 16, 3)
    stored = cv2.imdecode(array, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    assert stored.shape == tf.io.decode_jpeg(data).shape == (16, 32, 3)
    assert Image.open(io.BytesIO(data)).size == (32, 16)


def test_opencv_swaps_the_colours_of_avif_and_darkens_those_of_tiff_with_opacity():
    data = {form: saved(np.full((8, 8, 4), (200, 100, 10, 128), np.uint8), form) for form in ("PNG", "AVIF", "TIFF")}
    seen = {}
    for form, file in data.items():
        for flag in ("IMREAD_COLOR", "IMREAD_COLOR_RGB"):
            seen[form, flag] = cv2.imdecode(np.frombuffer(file, np.uint8), getattr(cv2, flag))[4, 4].astype(int)
    for form in data:
        assert np.array_equal(seen[form, "IMREAD_COLOR"], seen[form, "IMREAD_COLOR_RGB"]) is (form == "AVIF")
    np.testing.assert_array_equal(seen["TIFF", "IMREAD_COLOR_RGB"], (100, 50, 5))


def test_pillow_opens_a_file_by_its_header_alone():
    data = saved(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), "JPEG")
    image = Image.open(io.BytesIO(data[: len(data) // 2]))
    assert image.size == (96, 64)
    with pytest.raises(OSError, match="truncated"):
        image.load()


# ---- Videos ---------------------------------------------------------------------------------------------------------
def test_matroska_does_not_say_how_many_pictures_it_has(tmp_path):
    for suffix, frames in (("mkv", 0), ("mp4", 7)):
        with av.open(str(write_video(tmp_path / f"x.{suffix}", numbered(7)))) as container:
            assert container.streams.video[0].frames == frames
            assert sum(packet.size > 0 for packet in container.demux(video=0)) == 7


def test_pyav_converts_colours_by_their_tag_and_as_bt_601_without():
    yuv = np.stack([np.full((16, 16), value, np.uint8) for value in (173, 42, 26)])  # green, limited range, BT.709
    shown = {}
    for tag in (None, av.video.reformatter.Colorspace.ITU709, av.video.reformatter.Colorspace.ITU601):
        frame = av.VideoFrame.from_ndarray(yuv, format="yuv444p")
        if tag is not None:
            frame.colorspace = tag
        shown[tag] = frame.to_ndarray(format="rgb24")[8, 8].astype(int)
    none, bt709, bt601 = shown.values()
    np.testing.assert_array_equal(none, bt601)
    np.testing.assert_allclose(bt709, (0, 255, 0), atol=3)
    assert np.abs(bt601 - (0, 255, 0)).max() > 10


# ---- Files ----------------------------------------------------------------------------------------------------------
def test_a_cut_off_array_record_opens_as_an_empty_one(tmp_path):
    path = tmp_path / "x.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(100):
        writer.write(bytes([i]) * 1000)
    writer.close()
    assert array_record_module.ArrayRecordReader(str(path)).num_records() == 100
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader = array_record_module.ArrayRecordReader(str(path))
    assert not reader.ok() and reader.num_records() == 0
    with pytest.raises(RuntimeError):  # whatever the system says
        array_record_module.ArrayRecordWriter("/dev/full", "group_size:1").close()


def test_safetensors_writes_buffers_in_the_order_of_memory():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    back = safetensors.numpy.load(safetensors.numpy.save({"x": array.T}))["x"]
    assert back.shape == (3, 2) and not np.array_equal(back, array.T)
    back = safetensors.numpy.load(safetensors.numpy.save({"x": np.ascontiguousarray(array.T)}))["x"]
    np.testing.assert_array_equal(back, array.T)


def test_orbax_notices_neither_changed_arrays_nor_an_empty_step(tmp_path):
    state = {"x": np.zeros(4096, np.float32)}
    with ocp.CheckpointManager(tmp_path / "c", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        (tmp_path / "c" / "7").mkdir()
    with ocp.CheckpointManager(tmp_path / "c", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        assert manager.latest_step() == 7
    markers = [*(tmp_path / "c" / "1").rglob("commit_success.txt")]
    for marker in markers:
        marker.unlink()
    with ocp.CheckpointManager(tmp_path / "c", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        np.testing.assert_array_equal(manager.restore(1, args=ocp.args.StandardRestore(state))["x"], state["x"])


def test_orbax_saves_two_arrays_under_one_name(tmp_path):
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save(tmp_path / "c", {"a.b": np.zeros(2, np.float32), "a": {"b": np.ones(2, np.float32)}})
    back = checkpointer.restore(tmp_path / "c")
    np.testing.assert_array_equal(back["a.b"], back["a"]["b"])


def test_beams_files_are_packed_by_their_names_unless_told_not_to(tmp_path):
    filesystem = pytest.importorskip("apache_beam.io.filesystem")
    systems = pytest.importorskip("apache_beam.io.filesystems").FileSystems
    for kind, expected in ((filesystem.CompressionTypes.UNCOMPRESSED, True), (filesystem.CompressionTypes.AUTO, False)):
        path = str(tmp_path / f"{kind}.gz")
        with systems.create(path, compression_type=kind) as file:
            file.write(b"as it is")
        with open(path, "rb") as file:
            assert (file.read() == b"as it is") is expected


# ---- TFDS -----------------------------------------------------------------------------------------------------------
class Grey(tfds.core.GeneratorBasedBuilder):
    """Five grey pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2}


def test_tfds_reads_each_format_in_one_way_only(tmp_path):
    made = {name: Grey(data_dir=str(tmp_path / name), file_format=name) for name in ("tfrecord", "array_record")}
    for builder in made.values():
        builder.download_and_prepare()
    with pytest.raises(NotImplementedError, match="not implemented for ArrayRecord"):
        made["array_record"].as_dataset(split="train")
    with pytest.raises(NotImplementedError, match="file format"):
        made["tfrecord"].as_data_source(split="train")
    source = made["array_record"].as_data_source(
        split="train", decoders=tfds.decode.PartialDecoding({"label": True}, decoders={})
    )
    with pytest.raises(ValueError, match="PartialDecoding"):
        source[0]
    with pytest.raises(ValueError, match="incompatible with 5 examples"):
        _ = made["tfrecord"].info.splits["train[:6]"].num_examples
    assert made["tfrecord"].info.splits["train[3:]"].num_examples == 2


# ---- Scorers --------------------------------------------------------------------------------------------------------
def coco(annotations: list[dict], categories=(1,)) -> COCO:
    made = COCO()
    made.dataset = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "categories": [{"id": i, "name": str(i)} for i in categories],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def box(**more) -> dict:
    return {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0, **more}


def average_precision(truth: COCO, detections: COCO) -> float:
    scorer = COCOeval(truth, detections, "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return float(scorer.stats[0])


def test_pycocotools_on_ids_and_empty_results(capsys):
    assert average_precision(coco([box()]), coco([box(score=0.9)])) == pytest.approx(1)
    assert average_precision(coco([box(id=0)]), coco([box(score=0.9)])) == 0  # an object with the id 0 is none
    stray = box(id=2, category_id=7, score=0.99)
    assert average_precision(coco([box()]), coco([box(score=0.9), stray])) == pytest.approx(1)  # category left out
    with pytest.raises(IndexError):
        coco([box()]).loadRes([])
    assert np.unique([7, "07"]).dtype.kind == "U"  # how it sorts ids: numbers among text become text


# ---- JAX ------------------------------------------------------------------------------------------------------------
def test_top_k_takes_the_first_of_equals():
    values, index = jax.lax.top_k(np.array([1.0, 3.0, 2.0, 3.0, 3.0, 2.0], np.float32), 4)
    assert values.tolist() == [3, 3, 3, 2] and index.tolist() == [1, 3, 4, 2]


def test_resizing_in_jax_smooths_only_where_it_shrinks():
    row = np.random.default_rng(0).random((1, 16, 1), np.float32)
    larger = [jax.image.resize(row, (1, 64, 1), "linear", antialias=flag) for flag in (True, False)]
    np.testing.assert_allclose(larger[0], larger[1], atol=1e-6)
    by_hand = np.interp((np.arange(64) + 0.5) / 4 - 0.5, np.arange(16), row[0, :, 0])
    np.testing.assert_allclose(np.asarray(larger[0])[0, 2:-2, 0], by_hand[2:-2], atol=1e-6)
    smaller = [jax.image.resize(row, (1, 4, 1), "linear", antialias=flag) for flag in (True, False)]
    assert np.abs(smaller[0] - smaller[1]).max() > 0.05


# ---- Python ---------------------------------------------------------------------------------------------------------
def test_names_of_files_that_are_no_utf_8_are_text_that_print_refuses(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb"):
        pass
    [name] = os.listdir(tmp_path)
    assert name == "caf\udce9" and os.fsencode(name) == b"caf\xe9"
    with pytest.raises(UnicodeEncodeError):
        name.encode()
    assert np.array([name]).tolist() == [name]  # so a store's index keeps it


# ---- The document ---------------------------------------------------------------------------------------------------
ROOT = pathlib.Path(__file__).resolve().parents[1]


def rows() -> list[tuple[str, ...]]:
    lines = (ROOT / "docs" / "library_behaviour.md").read_text().splitlines()
    table = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines if line.startswith("|")]
    return [row for row in table if row[0] != "Library" and not row[0].startswith("---")]


def test_every_row_names_code_that_is_there_and_a_test():
    found = rows()
    assert len(found) > 25
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for row in found:
        assert len(row) == 4, row
        assert row[0] == "Python 3.11" or tuple(row[0].split()) in pins, row
        for cell in row[2:]:
            file, name = cell.strip("`").split(":")
            assert f"def {name}(" in (ROOT / file).read_text(), row
        assert row[3].startswith("`tests/test_") and ":test_" in row[3], row
    own = {name for name in globals() if name.startswith("test_")}
    named = {row[3].strip("`").split(":")[1] for row in found if "test_library_behaviour" in row[3]}
    assert own - named == {test_every_row_names_code_that_is_there_and_a_test.__name__}
