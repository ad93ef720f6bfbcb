"""ImageNet-Vid-Robust: the paper's counts and intervals, neighbours, label sets, 1000 to 30 classes, bad input."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from evaluation import vid_robust
from vivi_jax import export
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.export import torch_names
from vivi_jax.models import build_encoder

MAPPING = [list(range(5 * k, 5 * k + 1 + k % 5)) for k in range(30)]  # one to five ImageNet classes each


@pytest.mark.parametrize(
    "k, low, high, printed", [(754, 65.15, 70.73, (65.2, 70.7)), (553, 46.88, 52.85, (46.9, 52.9))]
)
def test_intervals_of_the_paper(k, low, high, printed):
    """Of 1109 anchors. The last bound is 52.8496: printed with one digit it is 52.8, rounded twice the paper's 52.9."""
    interval = [100 * bound for bound in vid_robust.clopper_pearson(k, 1109)]
    np.testing.assert_allclose(interval, (low, high), atol=0.005)
    assert [round(round(bound, 2) + 1e-9, 1) for bound in interval] == list(printed)

    def at_least(k, p):  # P(X >= k) of 1109
        return sum(
            math.exp(math.log(math.comb(1109, i)) + i * math.log(p) + (1109 - i) * math.log(1 - p))
            for i in range(k, 1110)
        )

    assert at_least(k, interval[0] / 100) == pytest.approx(0.025, rel=1e-6)
    assert 1 - at_least(k + 1, interval[1] / 100) == pytest.approx(0.025, rel=1e-6)


def test_intervals_at_the_ends_have_closed_forms():
    """No success of n: 1 - (alpha / 2) ** (1 / n); all of n: its mirror image."""
    bound = 1 - 0.025 ** (1 / 40)
    assert vid_robust.clopper_pearson(0, 40) == (0.0, pytest.approx(bound))
    assert vid_robust.clopper_pearson(40, 40) == (pytest.approx(1 - bound), 1.0)


def write_metadata(folder, anchors, neighbours):
    """`anchors` videos; the anchor is frame 100, its neighbours are at the given distances; class = video mod 30."""
    names = {v: {d: f"val/video{v:04d}/{100 + d:06d}.JPEG" for d in (0, *neighbours)} for v in range(anchors)}
    (folder / "pmsets.json").write_text(json.dumps({of[0]: [of[d] for d in neighbours] for of in names.values()}))
    labels = {name: [v % 30, (v + 7) % 30] for v, of in names.items() for name in of.values()}
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "rev_class_idx_map.json").write_text(json.dumps({str(k): classes for k, classes in enumerate(MAPPING)}))
    return names


def test_metadata_and_predictions_with_byte_order_marks(tmp_path):
    write_metadata(tmp_path, 2, (-1, 1))
    plain = vid_robust.load_metadata(str(tmp_path))
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert vid_robust.load_metadata(str(tmp_path)) == plain
    lines = [f"{name},{','.join(['0.5'] * 30)}" for name in plain.names]
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + " \r\n".join([*lines, "", " "]).encode())
    names, logits = vid_robust.read_predictions(str(tmp_path / "p.csv"))
    assert names == plain.names and logits.shape == (6, 30) and (logits == 0.5).all()


def logits_for(predicted, width):
    """float[N, width] whose largest value among the mapped classes is in class predicted[i]; classes of ImageNet that
    no class of the 30 has are larger still, and must not count."""
    logits = np.random.default_rng(0).normal(size=(len(predicted), width))
    if width == 1000:
        logits[:, 150:] += 50
    for row, k in zip(logits, predicted, strict=True):
        row[MAPPING[k][-1] if width == 1000 else k] = 20
    return logits


@pytest.mark.parametrize("width, suffix", [(1000, ".npz"), (30, ".csv")])
def test_the_papers_numbers_from_predictions(width, suffix, tmp_path, capsys):
    """1109 anchors, 754 right, of which 553 with all neighbours; of the 201 others the wrong one is 1 to 10 away."""
    names = write_metadata(tmp_path, 1109, (-10, -1, 3, 10))
    flat, predicted = [], []
    for video, of in names.items():
        wrong = {0} if video >= 754 else ({-1, 10} if video % 2 else {-10}) if video >= 553 else set()
        for distance, name in of.items():
            flat.append(name)
            right = (video if video % 3 else video + 7) % 30  # either label of the set will do
            predicted.append((video + 1) % 30 if distance in wrong else right)
    logits = logits_for(predicted, width)
    path = tmp_path / f"predictions{suffix}"
    if suffix == ".npz":
        np.savez(path, names=np.array(flat), logits=logits)
    else:
        path.write_text(
            "".join(f"{name},{','.join(f'{x:.3f}' for x in row)}\n" for name, row in zip(flat, logits, strict=True))
        )
    vid_robust.main([f"--data={tmp_path}", f"--predictions={path}", f"--out={tmp_path}/r.json"])
    assert capsys.readouterr().out == (
        "PM-0: 68.0% [65.2, 70.7] of 1109 anchors\nPM-10: 49.9% [46.9, 52.8] of 1109 anchors\ndrop: 18.1\n"
    )
    counts = [row["right"] for row in json.loads((tmp_path / "r.json").read_text())["pm"]]
    odd = sum(video % 2 for video in range(553, 754))
    assert counts == [754] + [754 - odd] * 9 + [553]


def test_an_encoder_with_a_classifier(tmp_path, capsys):
    """The classifier's bias decides: one ImageNet class of the eighth of the 30 is predicted always."""
    names = write_metadata(tmp_path, 31, (-1, 1))
    for name in (name for of in names.values() for name in of.values()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 24), (200, 100, 50)).save(tmp_path / name, format="PNG")
    resnet = build_encoder("resnet", depth=18, width=0.0625, num_classes=1000)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), torch_names.abstract_variables(resnet))
    variables["params"]["classifier"]["bias"][MAPPING[8][1]] = 1
    variables["params"]["classifier"]["kernel"][0, 999] = 1  # not all zero: that would be a file without a classifier
    export.export_torchvision(resnet, variables, tmp_path / "e.safetensors")
    vid_robust.main([f"--data={tmp_path}", f"--checkpoint={tmp_path}/e.safetensors", "--image_size=16"])
    right = sum(8 in (v % 30, (v + 7) % 30) for v in range(31))
    assert right == 2 and capsys.readouterr().out.startswith(f"PM-0: {right / 31:.1%} [")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"error: no {tmp_path}/rev_class_idx_map.json; copy the files of"):
        vid_robust.main([f"--data={tmp_path}", "--predictions=x.npz"])
    names = write_metadata(tmp_path, 3, (1,))
    frames = vid_robust.load_metadata(str(tmp_path))
    with pytest.raises(DataError, match=r"1 of 6 frames have no logits: val/video0002/000101.JPEG"):
        vid_robust.evaluate(frames, frames.names[:5], np.zeros((5, 30)))
    with pytest.raises(DataError, match=r"logits of 6 frames have shape \(6, 31\): must be"):
        vid_robust.evaluate(frames, frames.names, np.zeros((6, 31)))
    with pytest.raises(DataError, match="logits of val/video0001/000100.JPEG are not finite"):
        vid_robust.evaluate(frames, frames.names, np.where(np.arange(6) == 2, np.nan, 0)[:, None] + np.zeros((6, 30)))
    with pytest.raises(ConfigError, match="the encoder has no classifier; .* needs ImageNet's 1000"):
        vid_robust.predict(build_encoder("resnet", depth=18), {}, frames, str(tmp_path), image_size=8, batch_size=2)
    with pytest.raises(DataError, match="6 of 6 frames are not in"):
        vid_robust.predict(
            build_encoder("resnet", depth=18, num_classes=1000), {}, frames, str(tmp_path), image_size=8, batch_size=2
        )
    with pytest.raises(DataError, match="no predictions in .*/p.csv .*: could not convert"):
        (tmp_path / "p.csv").write_text(f"{names[0][0]},1,abc\n")
        vid_robust.read_predictions(str(tmp_path / "p.csv"))
    labels = json.loads((tmp_path / "labels.json").read_text())
    del labels[names[1][1]]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match="labels.json lacks 1 frames of pmsets.json, the first val/video0001/000101"):
        vid_robust.load_metadata(str(tmp_path))
