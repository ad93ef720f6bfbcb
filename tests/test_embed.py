"""Features of folders, and the Python API: what is computed, in which order, and what is said of the rest."""

import csv
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest

import vivi_jax
from evaluation import embed
from helpers.networks import random_variables
from helpers.video_files import write_video
from vivi_jax import export
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.models.resnet import ResNet

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    encoder = ResNet(depth=18, width=0.125)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    export.export_torchvision(encoder, random_variables(encoder), path)
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two pictures, a video of 2 seconds that changes in the middle, a broken picture and a text."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    (root / "sub").mkdir()
    cv2.imwrite(str(root / "a.png"), rng.integers(0, 255, (40, 50, 3), np.uint8))
    cv2.imwrite(str(root / "sub" / "b.png"), rng.integers(0, 255, (64, 48, 3), np.uint8))
    first, second = (np.full((48, 64, 3), value, np.uint8) for value in (60, 200))
    write_video(root / "c.mp4", [first] * 20 + [second] * 20, fps=20)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff, and no more")
    (root / "notes.txt").write_text("no video")
    return root


def run(media, weights, out, *options) -> None:
    embed.main([str(media), f"--checkpoint={weights}", f"--out={out}", f"--image_size={SIZE}", *options])


def test_the_table_has_every_picture_and_names_the_rest(media, weights, tmp_path, capsys):
    run(media, weights, tmp_path / "a.npz", "--fps=2", "--batch_size=3")
    said = capsys.readouterr()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as rows:
        assert rows["names"].tolist() == ["a.png", "c.mp4", "sub/b.png"]
        assert rows["frames"].tolist() == [1, 4, 1] and np.isnan(rows["seconds"]).all()
        features = rows["features"]
    assert features.shape == (3, 64) and features.dtype == np.float32
    assert "3 rows of 64 features; 2 of 5 files could not be read" in said.out
    left_out = {line.split(":")[0] for line in said.err.splitlines() if line.startswith("left out")}
    assert left_out == {"left out broken.jpg", "left out notes.txt"}

    # The first picture by hand: the central 35 x 35 of 40 x 50, resized.
    picture = cv2.imread(str(media / "a.png"))[2:37, 7:42, ::-1]
    picture = cv2.resize(np.ascontiguousarray(picture), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    expected = vivi_jax.load(str(weights)).features(picture)
    np.testing.assert_allclose(features[:1], expected, rtol=1e-4, atol=1e-5)

    run(media, weights, tmp_path / "b.csv", "--fps=2", "--batch_size=3", "--per_frame")
    with open(tmp_path / "b.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header[:4] == ["name", "seconds", "frames", "feature0"] and len(header) == 3 + 64
    assert [line[:3] for line in lines] == [
        ["a.png", "", "1"], *[["c.mp4", str(k / 2), "1"] for k in range(4)], ["sub/b.png", "", "1"],
    ]  # fmt: skip
    of_video = np.array([line[3:] for line in lines[1:5]], np.float64)
    assert np.abs(of_video[0] - of_video[3]).max() > 0.01  # its two halves
    np.testing.assert_allclose(of_video.mean(axis=0), features[1], rtol=1e-4, atol=1e-5)


def test_parquet_has_the_same_columns(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = embed.Rows(["a", "b"], np.array([math.nan, 0.5]), np.array([1, 2], np.int32), np.eye(2, 3, dtype=np.float32))
    (tmp_path / "a.parquet").write_bytes(embed.content(rows, ".parquet"))
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert table == {"name": ["a", "b"], "seconds": [None, 0.5], "frames": [1, 2], "features": [[1, 0, 0], [0, 1, 0]]}


@pytest.mark.parametrize(
    "option, message",
    [
        ("--out=a.txt", "its name must end in .parquet, .npz, .csv"),
        ("--fps=0", "--fps=0.0: must be above 0"),
        ("--fps=nan", "--fps=nan: must be above 0"),
        ("--batch_size=0", "--batch_size=0: must be 1 or more"),
    ],
)
def test_impossible_options_are_one_line(option, message, media, weights, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(media, weights, tmp_path / "a.npz", option)


def test_nothing_that_can_be_read_is_an_error(weights, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="1 of 1 files could not be read: nothing was written"):
        run(tmp_path / "in", weights, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_load_takes_bytes_and_floats_of_any_size(weights):
    loaded = vivi_jax.load(str(weights))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 33, 40, 3), np.uint8)
    features = loaded.features(pixels)
    assert features.shape == (2, 64) and features.dtype == np.float32
    np.testing.assert_allclose(loaded.features(pixels / 255), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loaded.features(pixels[0]), features[:1], rtol=1e-4, atol=1e-5)
    maps = loaded.maps(pixels)
    assert maps["stage4"].shape == (2, 2, 2, 64) and set(maps) == {"features", "stage1", "stage2", "stage3", "stage4"}
    for wrong in (pixels.astype(np.float32), pixels[..., :2], pixels.astype(np.int32), pixels / np.nan):
        with pytest.raises(DataError, match="images are"):
            loaded.features(wrong)


def test_importing_the_package_loads_no_jax():
    code = "import sys, vivi_jax; print(vivi_jax.__version__, sorted({'jax', 'numpy', 'absl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0 []"
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        vivi_jax.laod  # noqa: B018


def test_parquet_without_pyarrow_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="needs the package pyarrow: pip install pyarrow"):
        embed.pyarrow()
