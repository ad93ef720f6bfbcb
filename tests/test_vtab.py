"""VTAB: the table against TFDS's schemas, labels at their edges, official preprocessing, protocols, resuming."""

import csv
import functools
import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import time

import cv2
import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

from configs import vtab as vtab_config
from evaluation import vtab as vtab_command
from evaluation.protocols.vtab import data as vtab_data
from evaluation.protocols.vtab import published as vtab_published
from evaluation.protocols.vtab import report as vtab_report
from evaluation.protocols.vtab import sweep as vtab
from evaluation.protocols.vtab import tasks as vtab_tasks
from evaluation.protocols.vtab.sweep import Setting
from evaluation.protocols.vtab.tasks import TASKS
from helpers.commands import assert_one_line_error, run_module, start_module
from helpers.networks import TinyEncoder
from vivi_jax.errors import ConfigError, DataError


# ---- Labels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distance, expected", [(8.0, 0), (8.2, 1), (8.5, 1), (9.1, 3), (10.0, 4), (12.0, 5)])
def test_clevr_distance(distance, expected):
    pixels = np.array([[0, 0, 99], [3, 5, distance], [1, 2, 50]], np.float32)
    assert vtab_tasks.clevr_distance({"objects": {"pixel_coords": pixels}}) == expected


def test_clevr_counts_three_to_ten_objects():
    assert [vtab_tasks.clevr_count({"objects": {"size": np.zeros(n)}}) for n in (3, 10)] == [0, 7]


@pytest.mark.parametrize(
    "types, depths, expected",
    [
        ([0, 3], [7.0, 1.0], 0),
        ([2], [8.0], 0),
        ([1, 0], [30.0, 8.1], 1),
        ([0], [20.0], 1),
        ([0], [20.5], 2),
        ([3, 7], [2.0, 3.0], 3),
        ([], [], 3),
        ([0], [-3.0], 0),
    ],
)
def test_kitti_takes_the_nearest_vehicle_or_none(types, depths, expected):
    location = np.array([[50, 60, z] for z in depths], np.float32).reshape(-1, 3)
    assert vtab_tasks.kitti_distance({"objects": {"type": np.array(types, int), "location": location}}) == expected


def test_dsprites_classes():
    orientations = [vtab_tasks.dsprites_orientation({"label_orientation": np.int64(i)}) for i in range(40)]
    assert orientations == [int(i / 2.5) for i in range(40)] and orientations[39] == 15
    assert [vtab_tasks.dsprites_x({"label_x_position": np.int64(i)}) for i in (0, 1, 2, 31)] == [0, 0, 1, 15]


# ---- The table ------------------------------------------------------------------------------------------------------
def test_19_tasks_in_three_groups():
    assert [sum(t.group == g for t in TASKS.values()) for g in vtab_tasks.GROUPS] == [7, 4, 8]
    assert [t.name for t in vtab_tasks.select("specialized,dtd,dtd")] == [
        "dtd",
        "eurosat",
        "resisc45",
        "patch_camelyon",
        "retinopathy",
    ]
    with pytest.raises(ConfigError, match="--tasks='kiti_dist' is unknown; did you mean 'kitti_dist'"):
        vtab_tasks.select("dtd,kiti_dist")
    with pytest.raises(ConfigError, match="names no task"):
        vtab_tasks.select(",")


def test_val200_begins_where_val_does():
    splits = {name: TASKS[name].split("train800val200") for name in ("pets", "dtd", "smallnorb_azim", "eurosat")}
    assert splits == {
        "pets": "train[:800]+train[2944:3144]",
        "dtd": "train[:800]+validation[0:200]",
        "smallnorb_azim": "train[:800]+test[0:200]",
        "eurosat": "train[:800]+train[16200:16400]",
    }


def tfds_sizes(task):
    """{TFDS split: examples} that make the task's splits."""
    train, val, test = task.sizes
    whole = {"train": train, "test": test}
    if task.val == "validation":
        return whole | {"validation": val}
    if task.val.startswith("test"):  # smallNORB
        return {"train": train, "test": val + test}
    if task.test.startswith("train"):
        return {"train": train + val + test}
    return {"train": train + val, "validation" if task.test == "validation" else "test": test}


def write_metadata(folder, task, sizes):
    """The folder of a TFDS data set that says it has these sizes; tfds.testing.mock_data invents the examples."""
    builder = tfds.builder(task.builder, data_dir=str(folder))
    path = pathlib.Path(builder.data_dir)
    path.mkdir(parents=True, exist_ok=True)
    info = {
        "name": builder.name,
        "version": str(builder.version),
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": name,
                "shardLengths": [str(n)],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for name, n in sizes.items()
        ],
    }
    if builder.builder_config:
        info["configName"] = builder.builder_config.name
    (path / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def official_sizes(tmp_path_factory):
    """A data_dir with all data sets in the table's sizes, and no examples."""
    folder = tmp_path_factory.mktemp("tfds")
    for task in TASKS.values():
        write_metadata(folder, task, tfds_sizes(task))
    return folder


@pytest.fixture
def mocked(official_sizes, monkeypatch):
    """The same, with examples that TFDS's own mock invents from the schemas."""
    # Ten objects in every picture: the mock's own lengths differ between the fields of one object. And other images for
    # each part, where the mock's own are the same: caltech101's may have none in common.
    plain, seeds = mocking.EncodedRandomFakeGenerator, itertools.count()
    monkeypatch.setattr(
        mocking,
        "EncodedRandomFakeGenerator",
        lambda *args, **options: plain(*args, **options | dict(constant_dynamic_shape=True, seed=next(seeds))),
    )
    with tfds.testing.mock_data(num_examples=12, data_dir=str(official_sizes)):
        yield str(official_sizes)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_from_its_schema(name, mocked):
    task = TASKS[name]
    load = vtab_data.find(task, mocked, check_sizes=True)
    assert load("train").classes == task.classes
    for split in ("train", "val", "trainval", "test", "train1000", "train800", "val200", "train800val200"):
        assert load(split).size == task.size(split), split
    batch = next(vtab_data.batches(load("train800"), batch_size=12, image_size=8))
    assert batch["image"].shape == (12, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and (0 <= batch["label"]).all() and (batch["label"] < task.classes).all()
    if name.startswith(("dsprites", "smallnorb")):
        assert (batch["image"][..., 0] == batch["image"][..., 1]).all()


@pytest.mark.parametrize(
    "name, split, wrong",
    [
        ("svhn", "train", 73258),
        ("eurosat", "train", 27001),
        ("kitti_dist", "validation", 422),
        ("smallnorb_elev", "test", 24299),
    ],
)
def test_wrong_split_sizes_are_refused(name, split, wrong, tmp_path):
    task = TASKS[name]
    write_metadata(tmp_path, task, tfds_sizes(task) | {split: wrong})
    with pytest.raises(DataError, match=rf"{name}: expected \d+ examples in '\w+', found \d+ in .*{tmp_path}"):
        vtab_data.find(task, str(tmp_path), check_sizes=True)


def test_absent_data_come_with_the_step_that_brings_them(tmp_path):
    with pytest.raises(vtab_data.Absent, match=r"run: python -c .*tfds.builder\('sun397/tfds'"):
        vtab_data.find(TASKS["sun397"], str(tmp_path), check_sizes=True)
    with pytest.raises(vtab_data.Absent, match=f"put NWPU-RESISC45.rar into {tmp_path}/downloads/manual, then run"):
        vtab_data.find(TASKS["resisc45"], str(tmp_path), check_sizes=True)


# ---- Pixels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "height, width, size", [(32, 32, 224), (375, 500, 224), (360, 480, 224), (96, 70, 224), (448, 448, 224)]
)
def test_preprocessing_is_the_official_one(height, width, size):
    """task_adaptation/data_loader.py: tf.image.resize, / 255; to one grey level."""
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (height // 3, width // 3, 3)).astype(np.uint8), (width, height))
    official = tf.image.resize(picture, [size, size]).numpy() / 255
    ours = vtab_data.preprocess(tf.io.encode_png(picture).numpy(), size).astype(np.float32) / 255
    assert np.abs(ours - official).max() <= 1 / 255


def test_dsprites_become_black_and_white():
    picture = np.zeros((64, 64, 1), np.uint8)
    picture[:, 32:] = 1
    ours = vtab_data.preprocess(tf.io.encode_png(picture).numpy(), 64, scale=255)
    assert ours.shape == (64, 64, 3) and (ours[:, :32] == 0).all() and (ours[:, 32:] == 255).all()


def in_memory(images, labels, classes=3):
    return vtab_data.Examples(
        "here", len(images), classes, lambda: zip(images, labels, strict=True), lambda i: f"nr {i}"
    )


def test_damaged_images_are_counted_and_named():
    good = tf.io.encode_png(np.zeros((4, 4, 3), np.uint8)).numpy()
    data = [b"no image" if i in (2, 5, 9) else good for i in range(11)]
    with pytest.raises(DataError, match="3 of 11 images of here are damaged and do not decode: nr 2, nr 5, nr 9;"):
        vtab_data.load_all(in_memory(data, [0] * 11), batch_size=4, image_size=8)
    with pytest.raises(DataError, match="3 of 11 images"):
        list(vtab_data.shuffled_stream(in_memory(data, [0] * 11), batch_size=4, image_size=8, buffer=3, seed=0))
    with pytest.raises(DataError, match="nr 1 has label 3, outside the 3 classes"):
        vtab_data.load_all(in_memory([good] * 3, [0, 3, 1]), batch_size=4, image_size=8)


def test_the_stream_is_a_seeded_shuffle_of_whole_passes():
    pictures = [tf.io.encode_png(np.full((2, 2, 3), i, np.uint8)).numpy() for i in range(10)]

    def first(seed, buffer=4):
        stream = vtab_data.shuffled_stream(
            in_memory(pictures, [0] * 10), batch_size=5, image_size=2, buffer=buffer, seed=seed
        )
        return np.concatenate([next(stream)["image"][:, 0, 0, 0] for _ in range(40)]).tolist()

    assert first(0) == first(0) != first(1)
    assert first(0, buffer=1) == list(range(10)) * 20
    counts = np.bincount(first(0))
    assert counts.sum() == 200 and counts.min() >= 19 - 1 and counts.max() <= 21 + 1  # a buffer of 4 may hold one back


# ---- Protocols and tables -------------------------------------------------------------------------------------------
A, B_, C = Setting(0.1, 2500), Setting(0.1, 10000), Setting(0.01, 2500)
SCORES = {"dtd": {A: 0.9, B_: 0.5, C: 0.6}, "pets": {A: 0.1, B_: 0.55, C: 0.6}, "svhn": {A: 0.1, B_: 0.9, C: 0.6}}


def test_v1_takes_the_best_mean_and_v2_the_best_of_each_task():
    assert vtab.choose_settings(SCORES, one_setting=True) == dict.fromkeys(SCORES, B_)  # means 0.37, 0.65, 0.6
    assert vtab.choose_settings(SCORES, one_setting=False) == {"dtd": A, "pets": C, "svhn": B_}
    tie = {"dtd": {A: 0.5, B_: 0.5}}
    assert vtab.choose_settings(tie, one_setting=True) == vtab.choose_settings(tie, one_setting=False) == {"dtd": A}


def test_protocols_train_and_measure_where_they_should():
    size = TASKS["dtd"].size
    assert {n: [size(s) for s in (*p.trial, *p.final)] for n, p in vtab.PROTOCOLS.items()} == {
        "v1": [1000, 1880, 1000, 1880],
        "v2": [800, 200, 1000, 1880],
        "full": [1880, 1880, 3760, 1880],
    }


def test_published_means_are_those_of_the_published_tasks():
    """VIVI's table 1 repeats three of the leaderboard's models: its means must follow from the per-task numbers."""
    assert list(vtab_published.BY_TASK) and set(vtab_published.BY_TASK) == set(TASKS)
    for model, column in (("Semi-Ex-10%", 3), ("Sup-100%", 4), ("Sup-Rot-100%", 5)):
        rows = [
            {"accuracy": values[column], "group": TASKS[name].group} for name, values in vtab_published.BY_TASK.items()
        ]
        got = [m["mean"] for m in vtab_report.means(rows).values()]
        np.testing.assert_allclose(got, vtab_published.MEANS[model], atol=0.11)


def test_the_tables_say_what_they_cover(tmp_path):
    def runs(name, values):
        cost = {
            "train_seconds": 10.0,
            "wait_seconds": 2.0,
            "train_images": 640,
            "measure_seconds": 6.0,
            "compilations": 1,
            "compile_seconds": 4.0,
        }
        return [
            {
                "task": name,
                "accuracy": v,
                "lr": 0.1,
                "steps": 20,
                "trained_on": ["train1000", 1000],
                "measured_on": ["test", 1880],
                "cost": cost,
            }
            for v in values
        ]

    finals = {"dtd": runs("dtd", [0.5, 0.7, 0.6]), "eurosat": runs("eurosat", [0.8, 0.8, 0.1])}
    report = vtab_report.write(
        tmp_path, finals, trials=[], absent={"pets": "pets: get it"}, protocol="v1", encoder="none", official=True
    )
    assert report["summary"] == (
        "VTAB v1: mean 70.0 (2 of 19 tasks), natural 60.0 (1 of 7 tasks), specialized 80.0 (1 of 4 tasks)"
    )
    assert report["cost"]["images_per_second"] == 64 and report["cost"]["runs"] == 6
    assert report["cost"]["share_not_in_steps"] == pytest.approx(1 - 8 / 20)
    assert json.loads((tmp_path / "vtab.json").read_text()) == report
    table = list(csv.DictReader((tmp_path / "vtab.csv").open()))
    assert [(r["task"], float(r["accuracy"])) for r in table] == [("dtd", 0.6), ("eurosat", 0.8)]
    text = (tmp_path / "vtab.md").read_text()
    assert "| dtd | 60.0 | 20.6 | 48.9 |" in text and "| **mean of 2 tasks** | 70.0 | 52.8 |" in text
    assert "- left out: pets: get it" in text and "| VIVI-Ex(4)-Co(100%)-Big | 71.7 |" in text
    assert cv2.imread(str(tmp_path / "vtab.png")).shape[0] > 100


# ---- Whole runs -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny():
    encoder = TinyEncoder()
    return encoder, encoder.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)


@pytest.mark.slow
def test_all_19_tasks_run_end_to_end(mocked, tiny, tmp_path):
    config = tiny_config()
    config.check_sizes = True
    run = functools.partial(
        vtab.evaluate,
        config,
        *tiny,
        name="tiny",
        tasks=vtab_tasks.select("all"),
        protocol="v2",
        data=mocked,
        workdir=str(tmp_path),
    )
    report = run()
    assert report["means"]["all"]["tasks"] == 19 and len(report["tasks"]) == 19
    classes = {task.classes for task in TASKS.values()}
    assert report["cost"]["runs"] == 19 * 3 and report["cost"]["compilations"] == len(classes)
    before = (tmp_path / "vtab.json").read_bytes()
    run()
    assert (tmp_path / "vtab.json").read_bytes() == before


def tiny_config():
    config = vtab_config.get_config("demo")
    config.update(dict(image_size=16, batch_size=16, learning_rates=(0.1,), steps=(1, 2), repeats=1))
    return config


@pytest.fixture
def folders(sample_data, tmp_path):
    """CIFAR-10 and DTD samples under the names of two tasks."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(sample_data / "cifar10_mini", data / "cifar100")
    for path in sorted((sample_data / "dtd_mini").glob("*/*.jpg")):
        place = data / "dtd" / ("test" if path == sorted(path.parent.iterdir())[0] else "train") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return data


def command(folders, workdir, *more):
    config = pathlib.Path(vtab_config.__file__)
    return [
        "evaluation.vtab",
        f"--config={config}:demo",
        "--config.image_size=16",
        "--config.batch_size=16",
        "--config.steps=(2, 3)",
        "--config.repeats=2",
        "--config.encoder.depth=18",
        "--config.encoder.width=0.0625",
        "--config.encoder.stem=small",
        "--checkpoint=none",
        f"--data={folders}",
        f"--workdir={workdir}",
        "--tasks=natural",
        *more,
    ]


def accuracies(workdir):
    return {str(p.relative_to(workdir)): json.loads(p.read_text())["accuracy"] for p in workdir.glob("runs/*/*.json")}


def table(workdir):
    report = json.loads((workdir / "vtab.json").read_text())
    return {key: report[key] for key in ("tasks", "means", "absent")}


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_changes_no_number(folders, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    out = run_module(*command(folders, straight))
    assert out.returncode == 0, out.stderr
    expected = accuracies(straight)
    assert len(expected) == 2 * (4 + 2) and len(set(expected.values())) > 1
    assert "2 of 19 tasks" in out.stdout and "split sizes not checked" in out.stdout
    assert out.stderr.count("left out: ") == 5
    for stop_after in (3, 9):  # in the trials, in the final runs
        process = start_module(*command(folders, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(accuracies(killed)) < stop_after and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = {name: (killed / name).stat().st_mtime_ns for name in accuracies(killed)}
        assert stop_after <= len(there) < len(expected)
    out = run_module(*command(folders, killed))
    assert out.returncode == 0, out.stderr
    assert accuracies(killed) == expected and table(killed) == table(straight)
    assert {name: (killed / name).stat().st_mtime_ns for name in there} == there  # nothing finished was done again


@pytest.mark.slow
def test_shards_together_are_the_whole_and_other_settings_are_refused(tiny, folders, tmp_path):
    def run(workdir, **changes):
        arguments = dict(name="tiny", tasks=vtab_tasks.select("natural"), protocol="v1", data=str(folders))
        return vtab.evaluate(tiny_config(), *tiny, workdir=str(tmp_path / workdir), **(arguments | changes))

    whole = run("whole")
    first = run("shards", shard=(0, 2))
    assert first["tasks"] == [] and first["summary"] == "VTAB v1: no task is finished"  # the other's trials are missing
    assert run("shards", shard=(1, 2))["means"]["all"]["tasks"] == 1
    assert run("shards", shard=(0, 2))["tasks"] == whole["tasks"] and len(whole["tasks"]) == 2
    with pytest.raises(ConfigError, match=r"shards was begun with other values \(protocol: 'v1' there, 'v2' here\)"):
        run("shards", protocol="v2")
    other = jax.tree.map(lambda x: x + 1, tiny[1])
    with pytest.raises(ConfigError, match="encoder_sha256: "):
        vtab.evaluate(
            tiny_config(),
            tiny[0],
            other,
            name="tiny",
            tasks=vtab_tasks.select("dtd"),
            protocol="v1",
            data=str(folders),
            workdir=str(tmp_path / "whole"),
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(protocol="v3"), "--protocol='v3' is unknown"),
        (dict(tasks=[TASKS["svhn"]]), "no task has data in .*; the first: svhn: .* run: python -c .*svhn_cropped"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(changes, message, tiny, folders, tmp_path):
    arguments = dict(name="tiny", tasks=[TASKS["dtd"]], protocol="v1", data=str(folders), workdir=tmp_path / "w")
    with pytest.raises((ConfigError, DataError), match=message):
        vtab.evaluate(tiny_config(), *tiny, **(arguments | changes))
    assert not (tmp_path / "w").exists()
    with pytest.raises(ConfigError, match="--shard=2/2: must be i/n"):
        vtab_command.parse_shard("2/2")


# ---- Own class folders ----------------------------------------------------------------------------------------------
def write_classes(folder, counts: dict[str, int]):
    """Pictures of one colour each, red or blue by their class, of other brightness each."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = np.zeros((20, 24, 3), np.uint8)
            picture[..., 2 if "red" in name else 0] = 150 + 3 * i  # OpenCV's order
            cv2.imwrite(str(folder / name / f"{i}.png"), picture)


def fine_tune_own(tiny, data, workdir, **changes):
    config = tiny_config()
    config.update(dict(learning_rates=(0.3, 1e-9), steps=(12,), repeats=2))
    arguments = dict(name="tiny", tasks=vtab_tasks.select("own"), protocol="full", data=str(data))
    return vtab.evaluate(config, *tiny, workdir=str(workdir), **(arguments | changes))


def test_own_class_folders_are_fine_tuned_once_and_scored_on_their_test_part(tiny, tmp_path):
    data, workdir = tmp_path / "mine", tmp_path / "w"
    write_classes(data / "train", {"red": 11, "blue": 9})
    write_classes(data / "test", {"red": 3, "blue": 5})
    result = fine_tune_own(tiny, data, workdir)
    assert result["accuracy"] == 1.0 and result["repeats"] == [1.0, 1.0] and result["lr"] == 0.3  # 1e-9 learns nothing
    assert result["trained_on"] == ["trainval", 20] and result["measured_on"] == ["test", 8] and result["classes"] == 2
    assert [len(list((workdir / "runs/own").glob(f"{stage}-*.json"))) for stage in ("trial", "final")] == [2, 2]
    assert json.loads((workdir / "own.json").read_text()) == result
    page = (workdir / "own.md").read_text()
    assert "20 images to train (trainval), 8 for the score (test)" in page and "| 0.3 | 12 | 100.0 | chosen |" in page
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/own/*.json")}
    assert fine_tune_own(tiny, data, workdir) == result
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("runs/own/*.json")} == before
    with pytest.raises(ConfigError, match="was begun with other values .*data: "):
        fine_tune_own(tiny, data / "train", workdir)


def test_one_folder_of_classes_has_a_held_out_share_and_val_is_used_where_it_is(tmp_path):
    write_classes(tmp_path / "one", {"red": 30, "blue": 30})
    load = vtab_data.find(vtab_tasks.OWN, str(tmp_path / "one"), check_sizes=True)
    parts = {split: [data for data, _ in load(split).read()] for split in ("train", "val", "test", "trainval")}
    held_out = len(parts["test"])
    assert 5 <= held_out <= 20 and len(parts["trainval"]) == 60 - held_out  # one in five, by a hash
    assert len(parts["val"]) == (60 - held_out) // 5 and parts["trainval"] == parts["train"] + parts["val"]
    for split, counts in {"train": 4, "val": 2, "test": 3}.items():
        write_classes(tmp_path / "three" / split, {"red": counts, "blue": counts})
    load = vtab_data.find(vtab_tasks.OWN, str(tmp_path / "three"), check_sizes=True)
    assert [load(split).size for split in ("train", "val", "test", "trainval")] == [8, 4, 6, 12]


@pytest.mark.parametrize(
    "counts, message",
    [
        ({}, "no images in .*: it must be .* hold one folder per class"),
        ({"train/red": 9, "test/red": 2}, "has one class: fine-tuning needs two or more"),
        ({"train/red": 2, "train/blue": 2, "test/red": 2}, "has 4 training images, of which 0 are held out"),
        ({"train/red": 9, "train/blue": 9}, "has train/ but none of test/, val/, validation/: add one"),
        ({"train/red": 9, "train/blue": 9, "test/green": 9}, "has classes that .* lacks: green"),
    ],
)
def test_own_folders_that_cannot_be_used_are_one_line(counts, message, tmp_path):
    (tmp_path / "data").mkdir()
    write_classes(tmp_path / "data", counts)
    with pytest.raises(DataError, match=message) as error:
        vtab.find_all([vtab_tasks.OWN], str(tmp_path / "data"), check_sizes=True)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="--tasks=dtd,own: own stands alone"):
        vtab_tasks.select("dtd,own")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message", [("--checkpoint=/no/run", "no /no/run/config.json"), ("--config.stepz=(1,)", "stepz")]
)
def test_mistakes_on_the_command_line_are_one_line(flag, message, folders, tmp_path):
    assert_one_line_error(run_module(*command(folders, tmp_path / "w", flag)), message)
    assert not (tmp_path / "w").exists()
