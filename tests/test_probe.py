"""k-NN and linear probe: against oracles and closed forms, on real images, with errors of one line."""

import json
import shutil

import jax
import numpy as np
import pytest
import scipy.optimize
from PIL import Image

from evaluation import encoders, probe
from helpers.networks import TinyEncoder
from input_pipeline import images
from vivi_jax import export
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.export import torch_names
from vivi_jax.models import build_encoder


@pytest.fixture(scope="module")
def encoder():
    """(encoder, variables): random weights, and statistics unlike those of any batch."""
    module = TinyEncoder()
    variables = module.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    stats = jax.tree.map(lambda x: x + np.linspace(-0.2, 0.2, x.size).astype(np.float32), variables["batch_stats"])
    return module, {"params": variables["params"], "batch_stats": stats}


def oracle_knn(train, labels, test, *, k, temperature, num_classes):
    """Wu et al. 2018, section 3.4, one query at a time in float64."""
    predicted = []
    for query in test.astype(np.float64):
        cosine = np.array([row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in train.astype(float)])
        votes = np.zeros(num_classes)
        for i in sorted(range(len(train)), key=lambda i: -cosine[i])[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        predicted.append(int(np.argmax(votes)))
    return predicted


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (7, 0.07), (60, 1.0)])
def test_knn_equals_the_float64_oracle(k, temperature):
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, 16)).astype(np.float32) for n in (60, 33))
    labels = rng.integers(0, 4, 60)
    got = probe.knn_predict(train, labels, test, num_classes=4, k=k, temperature=temperature, chunk=10)
    assert got.tolist() == oracle_knn(train, labels, test, k=k, temperature=temperature, num_classes=4)


def test_knn_votes_are_weighted_and_ignore_length():
    """One neighbour at cosine 1 outvotes two at cosine 0.6 at a low temperature, and not at a high one."""
    train = np.array([[100, 0], [0.6, 0.8], [0.06, 0.08]], np.float32)
    labels, query = np.array([0, 1, 1]), np.array([[3, 0]], np.float32)
    # votes: exp(1/T) against 2 exp(0.6/T); equal at T = 0.4 / log 2 = 0.577
    low, high = (probe.knn_predict(train, labels, query, num_classes=2, k=3, temperature=t) for t in (0.55, 0.60))
    assert (low.tolist(), high.tolist()) == ([0], [1])


def test_knn_refuses_more_neighbours_than_there_are():
    bank = np.eye(3, dtype=np.float32)
    with pytest.raises(ConfigError, match="k=4 neighbours of 3 training images"):
        probe.knn_predict(bank, np.arange(3), bank, num_classes=3, k=4)


def test_linear_probe_has_the_closed_form_solution():
    """One feature at -1 and +1, a class each: the minimum of log(1 + exp(-w)) + l2/2 w^2 has l2 w = sigmoid(-w)."""
    features, labels = np.array([[-1.0], [1.0]] * 8), np.array([0, 1] * 8)
    for l2 in (0.05, 0.5):
        w = scipy.optimize.brentq(lambda w, l2=l2: l2 * w - 1 / (1 + np.exp(w)), 0, 100)
        fitted = probe.linear_probe(5 * features + 3, labels, l2=l2)  # standardising takes the 5 and the 3 out again
        assert fitted.predict_proba([[8.0]])[0, 1] == pytest.approx(1 / (1 + np.exp(-w)), abs=1e-4)


def test_linear_probe_separates_blobs_that_knn_cannot():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 40)).astype(np.float32) * 10  # 37 directions of noise
    features[:, :3] = np.eye(3)[labels]
    fitted = probe.linear_probe(features[:200], labels[:200])
    assert (fitted.predict(features[200:]) == labels[200:]).all()
    assert (probe.knn_predict(features[:200], labels[:200], features[200:], num_classes=3) == labels[200:]).mean() < 0.6


def test_features_do_not_depend_on_batches_and_padding(encoder):
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8), np.arange(20, dtype=np.int32)

    def batches(size):
        return [{"image": pictures[i : i + size], "label": labels[i : i + size]} for i in range(0, 20, size)]

    alone, _ = encoder[0].apply(encoder[1], pictures / np.float32(255), train=False)
    assert np.std(alone, axis=0).mean() > 1e-3
    assert len(jax.devices()) == 8  # 13 is padded to 16, the last batch of 7 too
    for size in (20, 13):
        features, got = encoders.extract_features(*encoder, batches(size))
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, alone, rtol=1e-4, atol=1e-5)
        assert got.tolist() == labels.tolist()


def test_real_images(encoder, sample_data):
    """An untrained network on CIFAR-10: all images used, both scores possible, k-NN above chance as known for it."""
    hook = probe.make_evaluator(
        encoder[0], dataset=str(sample_data / "cifar10_mini"), image_size=32, batch_size=128, linear=True
    )
    scores = hook(encoder[1])
    assert set(scores) == {"knn_top1", "linear_top1"}
    for score in scores.values():
        assert score * 100 == pytest.approx(round(score * 100))  # of 100 test images
        assert 0.05 < score < 0.6


@pytest.fixture
def coloured(tmp_path):
    """Red and blue pictures in class folders: any encoder tells them apart."""
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in (("blue", (10, 20, 200)), ("red", (200, 20, 10))):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), tuple(c + i for c in colour)).save(
                    tmp_path / "set" / split / name / f"{i}.png"
                )
    return tmp_path / "set"


@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_command_line_on_an_export(coloured, tmp_path, mode, capsys):
    resnet = build_encoder("resnet", depth=18, width=0.125)
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.ones(x.shape, np.float32)
            if path[-1].key in ("scale", "var")
            else rng.normal(0, 0.2, x.shape).astype(np.float32)
        ),
        torch_names.abstract_variables(resnet),
    )
    export.export_torchvision(resnet, variables, tmp_path / "e.safetensors")
    probe.main(
        [
            f"--checkpoint={tmp_path}/e.safetensors",
            f"--data={coloured}",
            f"--mode={mode}",
            "--k=5",
            "--image_size=32",
            f"--out={tmp_path}/result.json",
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result[f"{mode}_top1"] == 1.0
    assert (result["train_images"], result["test_images"], result["classes"]) == (24, 10, 2)


def test_bad_data_sets_are_refused_before_anything_runs(encoder, coloured):
    with pytest.raises(DataError, match="25 neighbours cannot be found among the 24 training images"):
        probe.make_evaluator(encoder[0], dataset=str(coloured), image_size=32, batch_size=8, linear=False, k=25)
    shutil.rmtree(coloured / "train" / "red")
    shutil.rmtree(coloured / "test" / "red")
    with pytest.raises(DataError, match="all 12 training images of .* are 'blue'"):
        probe.load_sets(str(coloured), k=1)
    shutil.rmtree(coloured / "train" / "blue")
    with pytest.raises(DataError, match="no images in"):
        probe.load_sets(str(coloured), k=1)


def test_command_line_errors_are_one_line(coloured, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: no {tmp_path}/config.json: is {tmp_path} a run directory"):
        probe.main([f"--checkpoint={tmp_path}", f"--data={coloured}"])
    with pytest.raises(SystemExit, match=f"^error: no file {tmp_path}/e.safetensors"):
        probe.main([f"--checkpoint={tmp_path}/e.safetensors", f"--data={coloured}"])


def test_low_shot_takes_the_same_share_of_every_class():
    labels = np.repeat(np.arange(3, dtype=np.int32), (100, 40, 4))
    labelled = images.LabelledImages("here", labels, list("abc"), lambda i: b"", str)
    few = probe.low_shot(labelled, 0.1)
    assert np.bincount(few.labels).tolist() == [10, 4, 1]
    names = [few.name(i) for i in range(len(few))]
    assert len(set(names)) == 15 and all(labels[int(name)] == few.labels[i] for i, name in enumerate(names))
    assert names == [probe.low_shot(labelled, 0.1).name(i) for i in range(15)]
    assert names != [probe.low_shot(labelled, 0.1, seed=1).name(i) for i in range(15)]
    assert len(probe.low_shot(labelled, 1.0)) == 144
    with pytest.raises(ConfigError, match="a share of 10.0"):
        probe.low_shot(labelled, 10.0)


def test_features_come_from_the_cache_only_for_the_same_weights_and_images(encoder, coloured, tmp_path):
    module, variables = encoder
    test = images.load_labelled(str(coloured), "test")
    size = dict(image_size=16, batch_size=8, cache=str(tmp_path / "cache"))
    first = probe.cached_features(module, variables, test, **size)
    (file,) = (tmp_path / "cache").iterdir()
    np.savez(file, features=first[0] + 1, labels=first[1])  # to see where the answer comes from
    assert (probe.cached_features(module, variables, test, **size)[0] == first[0] + 1).all()
    other = jax.tree.map(lambda x: x * 1.01, variables)
    for weights, labelled, image_size in (
        (other, test, 16),
        (variables, test.take(np.arange(9)), 16),
        (variables, test, 24),
    ):
        got, _ = probe.cached_features(module, weights, labelled, **size | {"image_size": image_size})
        assert abs(got.mean() - first[0].mean()) < 0.5
    assert len(list((tmp_path / "cache").iterdir())) == 4
