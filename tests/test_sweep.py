"""The sweep over learning rate and weight decay: the best held-out score wins, and nothing is done twice."""

import json
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import action, detection, segmentation
from evaluation.protocols import sweep
from evaluation.protocols.action.data import Part
from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection.data import DetectionSet
from evaluation.protocols.segmentation.evaluate import evaluate as evaluate_segmentation
from vivi_jax.errors import ConfigError


def make_config(**grid) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            name="toy",
            repeats=5,
            schedule=dict(lr=1.0),
            optimizer=dict(weight_decay=1.0),
            sweep=dict(lr=(1.0, 2.0, 4.0), weight_decay=(0.5, 0.0), held_out=0.25) | grid,
        )
    )


def toy(seen: list):
    """A protocol whose held-out score is best at a rate of 2 and no decay, and whose official one at 4."""

    def protocol(config: ml_collections.ConfigDict, *, source: str, data: str, workdir: str) -> dict:
        seen.append((pathlib.Path(workdir), config.to_dict()))
        lr, held_out = config.schedule.lr, config.get("held_out")
        best = 2.0 if held_out else 4.0
        score = 1.0 - 0.1 * abs(lr - best) - 0.1 * config.optimizer.weight_decay
        return {"config": config.name, "checkpoint": source, "data": data, "score": score, "other": 0.0}

    return protocol


def test_the_best_held_out_score_makes_the_evaluation(tmp_path):
    seen = []
    arguments = dict(source="RUN", data="DATA", workdir=str(tmp_path))
    result = sweep.evaluate(toy(seen), make_config(), sweep=True, **arguments)
    assert result["score"] == pytest.approx(0.8)  # at a rate of 2: official data have not chosen
    names = [f"lr{lr}-decay{decay}" for lr in (1, 2, 4) for decay in (0.5, 0)]
    assert [path for path, _ in seen] == [*(tmp_path / "sweep" / name for name in names), tmp_path]
    assert all(config["held_out"] == 0.25 and config["repeats"] == 1 for _, config in seen[:-1])
    final = seen[-1][1]
    assert (final["schedule"], final["optimizer"], final["repeats"]) == ({"lr": 2.0}, {"weight_decay": 0.0}, 5)
    assert "held_out" not in final and not any("sweep" in config for _, config in seen)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["chosen"] == {"lr": 2.0, "weight_decay": 0.0} and found["score"] == "score"
    assert [trial["score"] for trial in found["trials"]] == pytest.approx([0.85, 0.9, 0.95, 1.0, 0.75, 0.8])
    text = (tmp_path / "sweep.md").read_text()
    assert "| 2 | 0 | 100.0 | chosen |" in text and text.count("chosen") == 1 and "25 % of the training data" in text


def test_without_the_option_the_protocol_runs_as_it_is(tmp_path):
    seen, config = [], make_config()
    sweep.evaluate(toy(seen), config, sweep=False, source="RUN", data="DATA", workdir=str(tmp_path))
    ((path, ran),) = seen
    assert path == tmp_path and ran == {k: v for k, v in config.to_dict().items() if k != "sweep"}
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"config.sweep.lr=\(\) is not allowed: .* at least one"):
        sweep.evaluate(toy(seen), make_config(lr=()), sweep=True, source="", data="", workdir=str(tmp_path))


@pytest.mark.parametrize("count, share", [(10, 0.1), (11, 0.1), (7, 0.5), (100, 0.15)])
def test_held_out_examples_are_evenly_spread_and_no_training_examples(count, share):
    training, held = sweep.hold_out(count, share)
    assert sorted([*training, *held]) == list(range(count))
    every = round(1 / share)
    np.testing.assert_array_equal(held, np.arange(every - 1, count, every))


@pytest.mark.parametrize("count, share", [(1, 0.5), (4, 0.1), (10, 0.0), (10, 1.0), (10, 0.9)])
def test_nothing_to_train_on_or_to_score_is_one_line(count, share):
    with pytest.raises(ConfigError, match="leaves none"):
        sweep.hold_out(count, share)


def test_parts_of_data_sets_keep_what_belongs_together(tmp_path):
    rows = np.array([2, 0])
    found = DetectionSet(
        "a.json", [7, "8", 9], ["x", "y", "z"], np.arange(6).reshape(3, 2),
        [np.zeros((n, 4)) for n in range(3)],
        [np.full(n, n) for n in range(3)], [1], ["thing"],
    ).take(rows)  # fmt: skip
    assert found.files == ["z", "x"] and found.image_ids == [9, 7]
    assert found.sizes.tolist() == [[4, 5], [0, 1]]
    assert [len(boxes) for boxes in found.boxes] == [2, 0] == [len(classes) for classes in found.classes]
    contents = {
        "images": [{"id": i} for i in (7, 8, 9)],
        "annotations": [{"id": i, "image_id": 7 + i % 3} for i in range(6)],
        "categories": [{"id": 1}],
    }
    kept = detection_data.only_images(contents, found.image_ids)
    assert [row["id"] for row in kept["images"]] == [7, 9] and [row["id"] for row in kept["annotations"]] == [
        0,
        2,
        3,
        5,
    ]
    assert kept["categories"] == contents["categories"] and len(contents["images"]) == 3
    part = Part(None, np.array([5, 6, 7]), np.array([0, 1, 1])).take(rows)
    assert part.videos.tolist() == [7, 5] and part.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "file, variant",
    [*((segmentation, v) for v in ("voc", "ade20k")), *((detection, v) for v in detection.VARIANTS)]
    + [(action, v) for v in action.VARIANTS],
)
def test_the_papers_own_setting_is_in_every_grid(file, variant):
    config = file.get_config(variant)
    assert config.schedule.lr in config.sweep.lr and config.optimizer.weight_decay in config.sweep.weight_decay


@pytest.mark.slow
def test_segmentation_sweeps_on_its_training_images(tmp_path, sample_data):
    """Four training images of one class; the sweep trains on two of them, and never sees the official ones."""
    voc = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    source = sample_data / "voc" / "semantic_segmentation"
    for i in range(6):
        for folder, suffix, out in (
            ("JPEGImages", "jpg", ["JPEGImages"]),
            ("SegmentationClass", "png", ["SegmentationClass", "SegmentationClassAug"]),
        ):
            with Image.open(source / folder / f"2011_000003.{suffix}") as image:
                for target in out:
                    image.crop((40 * i, 0, 40 * i + 97, 97)).save(voc / target / f"{i}.{suffix}")
    for split, names in (("train", "0123"), ("val", "45")):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    config = segmentation.get_config("voc,demo")
    config.batch_size, config.schedule.epochs = 8, 8.0  # a row for each of the tests' devices
    config.encoder.width = 0.125
    config.sweep.update(dict(lr=(0.1, 1e-6), weight_decay=(1e-4,), held_out=0.5))
    arguments = dict(sweep=True, source="none", data=str(tmp_path), workdir=str(tmp_path / "out"))
    result = sweep.evaluate(evaluate_segmentation, config, **arguments)
    trials = [json.loads((p / "result.json").read_text()) for p in sorted((tmp_path / "out" / "sweep").iterdir())]
    sizes = [[trial["repeats"]["repeat_0"][k] for k in ("train_images", "val_images", "steps")] for trial in trials]
    assert sizes == [[2, 2, 2], [2, 2, 2]]  # 8 epochs of 2 images, in batches of 8
    final = result["repeats"]["repeat_0"]
    assert (final["train_images"], final["val_images"], final["steps"]) == (4, 2, 4)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert max(trial["miou"] for trial in found["trials"]) == next(
        trial["miou"] for trial in found["trials"] if trial["lr"] == found["chosen"]["lr"]
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    assert sweep.evaluate(evaluate_segmentation, config, **arguments) == result  # nothing is trained again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")} == before
    shutil.rmtree(tmp_path / "out")
