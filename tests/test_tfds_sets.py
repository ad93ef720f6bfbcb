"""Sets of TFDS: the line that prepares one, both formats on disk read alike, parts that must not share images."""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from evaluation.protocols.vtab import data as vtab_data
from evaluation.protocols.vtab.tasks import TASKS
from input_pipeline import images, tfds_sets
from vivi_jax.errors import DataError


class TinyScenes(tfds.core.GeneratorBasedBuilder):
    """Pictures of one colour, with 0, 1 or 2 objects."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"size": tf.int64, "place": tfds.features.Tensor(shape=(3,), dtype=tf.float32)}
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 12), "test": self._generate_examples(12, 17)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            objects = [{"size": k, "place": np.full(3, i + k, np.float32)} for k in range(i % 3)]
            yield i, {"image": np.full((4, 5, 3), i, np.uint8), "label": i % 2, "objects": objects}


def code_of(command: str) -> str:
    """What a shell gives Python to run."""
    assert command.startswith("python -c ")
    shell = ["sh", "-c", command.replace("python -c", "printf %s", 1)]
    return subprocess.run(shell, capture_output=True, text=True, check=True).stdout


def prepare(cls: Any, folder: pathlib.Path, file_format: str) -> Any:
    made = cls(data_dir=str(folder), file_format=file_format)
    made.download_and_prepare()
    return made


def test_the_line_that_prepares_a_set_does(tmp_path):
    folder = tmp_path / 'it\'s $HOME `x` "y"'
    code = code_of(tfds_sets.command("tiny_scenes", str(folder)))
    assert code.startswith("import tensorflow, ")
    exec(code, {})  # noqa: S102
    assert tfds_sets.builder("tiny_scenes", str(folder)).is_prepared()
    assert tfds_sets.command("mnist") == (
        "python -c \"import tensorflow, tensorflow_datasets as tfds; tfds.builder('mnist').download_and_prepare()\""
    )


@pytest.mark.slow
def test_the_line_that_prepares_a_set_starts_in_this_environment():
    """Up to TFDS's own work; its command "tfds build" needs packages that are not there."""
    code = code_of(tfds_sets.command("no_such_set"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DatasetNotFoundError" in done.stderr and "ModuleNotFoundError" not in done.stderr


def test_both_formats_give_the_same_examples(tmp_path):
    for file_format in ("tfrecord", "array_record"):
        prepare(TinyScenes, tmp_path / file_format, file_format)
    made = [tfds_sets.builder("tiny_scenes", str(tmp_path / name)) for name in ("tfrecord", "array_record")]
    fields = {"image": True, "label": True, "objects": {"size": True, "place": True}}
    for split in ("train", "test", "train[:3]+test[1:4]"):
        one, other = (list(tfds_sets.examples(b, split, fields, encoded=("image",))) for b in made)
        assert len(one) == len(other) == {"train": 12, "test": 5}.get(split, 6)
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys() == fields.keys()
            assert isinstance(b["image"], bytes) and a["image"] == b["image"] and a["label"] == b["label"]
            for name in ("size", "place"):
                assert a["objects"][name].shape == b["objects"][name].shape
                np.testing.assert_array_equal(a["objects"][name], b["objects"][name])
    pixels = [next(iter(tfds_sets.examples(b, "test")))["image"] for b in made]
    np.testing.assert_array_equal(pixels[0], pixels[1])


def like(name: str, parts: dict[str, list[tuple[int, str]]]) -> Any:
    """The class of a builder with the name, version and features of TFDS's, and these (label, file name) in it."""
    true = tfds.builder(name)

    def examples(rows):
        for i, (label, file) in enumerate(rows):
            values = {"image": np.full((32, 32, 3), i, np.uint8), "label": label}
            more = {"image/file_name": file, "id": file}
            yield i, values | {key: value for key, value in more.items() if key in true.info.features}

    with tfds.core.registered.skip_registration():

        class Like(tfds.core.GeneratorBasedBuilder):
            VERSION = true.version

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=true.info.features, supervised_keys=true.info.supervised_keys
                )

            def _split_generators(self, dl_manager):
                return {part: examples(rows) for part, rows in parts.items()}

            def _generate_examples(self):
                raise NotImplementedError

    Like.name = name
    return Like


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_sets_by_name_are_read_in_both_formats(tmp_path, file_format):
    parts = {"train": [(i % 10, f"{i}") for i in range(20)], "test": [(3, "x")] * 4}
    prepare(like("cifar10", parts), tmp_path, file_format)
    found = images.load_labelled("cifar10", "train", data_dir=str(tmp_path))
    assert sorted(found.labels.tolist()) == sorted([*range(10)] * 2) and len(found.class_names) == 10
    pixels = [p["image"] for p in images.eval_batches(found, batch_size=8, image_size=28)]
    colours = np.concatenate(pixels)[:, 0, 0, 0]
    np.testing.assert_array_equal(colours % 10, found.labels)
    assert sorted(colours.tolist()) == [*range(20)]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_parts_that_share_images_are_refused(tmp_path, file_format):
    one = [(label, f"image_{i:04d}.jpg") for label in (0, 1) for i in range(5)]
    other = [(label, f"image_{i:04d}.jpg") for label in (2, 3) for i in range(5)]  # the names stand once in each class
    for name, test in (("good", other), ("bad", other + one[3:5])):
        prepare(like("caltech101", {"train": one, "test": test}), tmp_path / name, file_format)
    task, good, bad = TASKS["caltech101"], str(tmp_path / "good"), str(tmp_path / "bad")
    assert len(images.load_labelled("caltech101", "train", data_dir=good)) == 10
    assert vtab_data.find(task, good, check_sizes=False)("test").size == 10
    with pytest.raises(
        DataError, match=r"caltech101: .* has too few examples for train\[:2754\] \(Requested slice"
    ):  # 20 images are not Caltech101, but are disjoint
        vtab_data.find(task, good, check_sizes=True)
    message = (
        r"2 images are in two parts, such as image_000\d.jpg in train and in test: .*delete this folder and run: python"
    )
    for read in (
        lambda: images.load_labelled("caltech101", "test", data_dir=bad),
        lambda: vtab_data.find(task, bad, check_sizes=True),
    ):
        with pytest.raises(DataError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_tfds_own_builder_draws_disjoint_parts_of_caltech101(tmp_path):
    """With TensorFlow imported first, as the printed line does; else NumPy's state moves between seed and draw."""
    for name in ("ant", "bass", "crab"):
        folder = tmp_path / "unpacked" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for i in range(45):
            (folder / f"image_{i:04d}.jpg").write_bytes(tf.io.encode_jpeg(np.full((4, 4, 3), i, np.uint8)).numpy())
    code = f"""
with tfds.core.registered.skip_registration():
    class Local(tfds.builder_cls("caltech101")):
        pkg_dir_path = tfds.builder_cls("caltech101").pkg_dir_path
        name = "caltech101"
        def _split_generators(self, dl_manager):
            folder = {str(tmp_path / "unpacked")!r}
            return {{"train": self._generate_examples(folder, True), "test": self._generate_examples(folder, False)}}
made = Local(data_dir={str(tmp_path / "data")!r})
made.download_and_prepare()
from input_pipeline import tfds_sets
tfds_sets.check_disjoint(made)
print({{name: part.num_examples for name, part in made.info.splits.items()}})
"""
    start = code_of(tfds_sets.command("x")).rsplit(";", 1)[0]
    done = subprocess.run([sys.executable, "-c", start + "\n" + code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("{'train': 90, 'test': 45}"), done.stderr[-2000:]
