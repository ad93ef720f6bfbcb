"""Weights of other projects: read without their libraries, strictly, to the same features; and what is refused."""

import argparse
import collections
import datetime
import functools
import pathlib
import pickle
import subprocess
import sys
import zipfile

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from evaluation.encoders import load_encoder
from helpers.commands import assert_one_line_error, run_module
from helpers.networks import random_variables
from vivi_jax import export
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import elsewhere, torch_names, unpickle, weight_files
from vivi_jax.export.torch_names import TIMM, TORCHVISION
from vivi_jax.models import build_encoder
from vivi_jax.models.resnet import ResNet, standardize_kernel

TINY = ResNet(depth=18, width=0.125)
BIT = ResNet(depth=18, width=0.125, version=2, norm="group", weight_standardization=True)


def torch_state(encoder: ResNet = TINY, **arrays) -> dict[str, np.ndarray]:
    """The encoder's weights in torchvision's names, without the fc that stands for no classifier."""
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    return {n: a for n, a in state.items() if encoder.num_classes or not n.startswith("fc.")} | arrays


def pixels(size: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(count, size, size, 3)).astype(np.float32)


def normalised(encoder, images: np.ndarray) -> np.ndarray:
    return ((images - np.float32(encoder.input_mean)) / np.float32(encoder.input_std)).transpose(0, 3, 1, 2)


def pooled(encoder, variables, images) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(encoder.apply, train=False))(variables, images)[0])


def write_pickle(path: pathlib.Path, tree, protocol: int = 2) -> pathlib.Path:
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


# ---- Prefixes and containers ----------------------------------------------------------------------------------------


def prefixed(prefix: str, *beside: str) -> dict:
    """The encoder's entries under a prefix, and some others."""
    return {f"{prefix}{name}": array for name, array in torch_state().items()} | dict.fromkeys(beside, ONE)


ONE = np.ones((3, 4), np.float32)
FORMS = {
    "plain": torch_state,
    "data parallel": lambda: {"state_dict": prefixed("module."), "epoch": 3, "best_acc1": 0.5},
    "MoCo v1": lambda: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": prefixed("module.encoder_q.", "module.encoder_q.fc.weight", "module.encoder_q.fc.bias")
        | prefixed("module.encoder_k.", "module.queue", "module.queue_ptr"),
    },
    "MoCo v2": lambda: {
        "state_dict": prefixed("module.encoder_q.", "module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias")
        | prefixed("module.encoder_k.")
    },
    "MoCo v3": lambda: {
        "state_dict": prefixed("module.base_encoder.", "module.base_encoder.fc.0.weight", "module.predictor.0.weight")
        | prefixed("module.momentum_encoder.")
    },
    "DINO": lambda: {
        "student": {"module.backbone.conv1.weight": ONE},
        "teacher": prefixed("module.backbone.", "module.head.mlp.0.weight", "module.head.last_layer.weight_v"),
        "epoch": 100,
        "args": argparse.Namespace(lr=0.1, arch="resnet50"),
    },
    "SimSiam": lambda: {
        "state_dict": prefixed("module.encoder.", "module.encoder.fc.6.weight", "module.predictor.0.weight")
    },
    "VFS": lambda: {
        "meta": {"env_info": "text"},
        "state_dict": {"img_head.fc.weight": ONE} | {f"backbone.{mmaction(n)}": a for n, a in torch_state().items()},
    },
}


def mmaction(name: str) -> str:
    """torchvision's name -> mmaction's, whose convolutions hold their norm."""
    parts = name.split(".")
    if "downsample" in parts:
        at = parts.index("downsample") + 1
        return ".".join([*parts[:at], "conv" if parts[at] == "0" else "bn", *parts[at + 1 :]])
    last = parts[-2]
    return ".".join([*parts[:-2], f"conv{last[-1]}", "conv" if last.startswith("conv") else "bn", parts[-1]])


@pytest.mark.parametrize("form", FORMS)
def test_the_encoder_of_each_projects_file_is_found(form, tmp_path):
    tree = FORMS[form]()
    loaded = load_encoder(str(write_pickle(tmp_path / "a.pkl", tree)))
    assert loaded.encoder == TINY
    chex.assert_trees_all_equal(loaded.variables, random_variables(TINY))
    if all(isinstance(array, np.ndarray) for array in tree.values()):
        safetensors.numpy.save_file(tree, tmp_path / "a.safetensors")
        chex.assert_trees_all_equal(load_encoder(str(tmp_path / "a.safetensors")).variables, loaded.variables)


def test_a_classifier_of_a_data_parallel_model_stays(tmp_path):
    encoder = TINY.clone(num_classes=5)
    state = {f"module.{n}": a for n, a in torch_state(encoder).items()}
    config, variables = export.load_encoder(write_pickle(tmp_path / "a.pth", state))
    assert build_encoder(**config) == encoder
    chex.assert_trees_all_equal(variables, random_variables(encoder))


@pytest.mark.parametrize(
    "tree, words",
    [
        (
            lambda: prefixed("net.", "decoder.conv.weight"),
            r"1 entries belong neither .* net\.\*, .* decoder.conv",
        ),
        (lambda: prefixed("a.") | prefixed("b."), r"several encoders, under a\. and b\."),
        (lambda: prefixed("backbone.", "backbone.extra.weight"), "unexpected extra.weight"),
        (lambda: {"state_dict": {"x": ONE}}, "has no entry conv1.weight"),
        (lambda: [1, 2], "no dict of weights"),
    ],
)
def test_what_is_left_over_is_one_line(tree, words, tmp_path):
    with pytest.raises(CheckpointError, match=words) as error:
        export.load_encoder(write_pickle(tmp_path / "a.pkl", tree()))
    assert "\n" not in str(error.value) and "a.pkl" in str(error.value)


def test_every_command_takes_the_files(tmp_path):
    path = write_pickle(tmp_path / "a.pth.tar", {"state_dict": prefixed("module.encoder_q.")})
    done = run_module("vivi_jax.export", f"--checkpoint={path}", f"--out={tmp_path}/b.safetensors")
    assert done.returncode == 0, done.stderr
    _, variables = export.load_encoder(tmp_path / "b.safetensors")
    chex.assert_trees_all_equal(variables, random_variables(TINY))
    done = run_module("vivi_jax.export", f"--checkpoint={tmp_path}/none.pth", f"--out={tmp_path}/c.safetensors")
    assert_one_line_error(done, "none.pth")
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(CheckpointError, match="notes.txt cannot be read: it is damaged, or no pickle"):
        load_encoder(str(tmp_path / "notes.txt"))


# ---- torch.save without torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_form", [True, False])
def test_torchs_files_are_read_without_torch(new_form, tmp_path):
    torch = pytest.importorskip("torch")
    storage = torch.arange(24, dtype=torch.float32)
    tree = {
        "whole": storage.reshape(2, 3, 4),
        "transposed": storage.reshape(4, 6).T,
        "part": storage[5:9],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "half": torch.linspace(-2, 2, 5, dtype=torch.float16),
        "bfloat16": torch.linspace(-2, 2, 5, dtype=torch.bfloat16),
        "counter": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nested": [{"a": torch.tensor([True, False])}, (torch.zeros(1, dtype=torch.uint8),), torch.Size([3])],
        "text": "words",
        "number": 0.5,
        "numpy": np.float64(2.5),
    }
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=new_form)
    found, _ = weight_files.load(tmp_path / "a.pth")
    assert list(found) == list(tree) and found["text"] == "words" and found["number"] == 0.5
    assert found["numpy"] == 2.5 and found["nested"][2] == [3]
    for name in ("whole", "transposed", "part", "half", "bfloat16", "counter"):
        np.testing.assert_array_equal(found[name], tree[name].float().numpy())
    assert found["half"].dtype == np.float16 and found["empty"].shape == (0, 3) and found["counter"].shape == ()
    np.testing.assert_array_equal(found["parameter"], np.ones((2, 2)))
    np.testing.assert_array_equal(found["nested"][0]["a"], [True, False])


@pytest.mark.parametrize("new_form", [True, False])
def test_a_torchvision_model_saved_by_torch_gives_its_features(new_form, tmp_path):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet

    reference = TorchResNet(18, 0.125, num_classes=5).eval()
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in torch_state(TINY.clone(num_classes=5)).items()})
    torch.save({"state_dict": torch.nn.DataParallel(reference).state_dict()}, tmp_path / "a.pth",
               _use_new_zipfile_serialization=new_form)  # fmt: skip
    encoder, variables, _ = load_encoder(str(tmp_path / "a.pth"))
    with torch.no_grad():
        expected, _ = reference(torch.from_numpy(normalised(encoder, pixels(33))))
    np.testing.assert_allclose(pooled(encoder, variables, pixels(33)), expected.numpy(), atol=1e-4)


# ---- What else a pickle may say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"a": collections.Counter("a")}, "it holds collections.Counter, and weights need arrays"),
        ({"a": datetime.date(2020, 1, 1)}, "it holds datetime.date"),
        (pathlib.PurePosixPath("a"), "it holds pathlib"),
        (ValueError("a"), r"it holds (builtins|exceptions)\.ValueError"),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".npy", ".pth"])
def test_anything_but_arrays_and_containers_is_refused_by_name(tree, words, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, np.array(tree, dtype=object), allow_pickle=True)
    elif suffix == ".pkl":
        write_pickle(path, tree)
    else:  # torch's zip form
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(tree, 2))
    with pytest.raises(CheckpointError, match=words) as error:
        weight_files.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_all_protocols_are_read(protocol, tmp_path):
    tree = {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.arange(6).reshape(2, 3).T, "s": np.float32(3)}
    found, _ = weight_files.load(write_pickle(tmp_path / "a.pkl", tree, protocol))
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array)


def test_damaged_files_are_one_line(tmp_path):
    good = pickle.dumps({"a": np.arange(1000.0)}, 4)
    path = tmp_path / "a.pkl"
    for content in (good[: len(good) // 2], b"", b"words", b"PK" + good):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a.pkl cannot be read: it is damaged") as error:
            weight_files.load(path)
        assert "\n" not in str(error.value)
    (tmp_path / "a.npz").write_bytes(good)
    with pytest.raises(CheckpointError, match="no .npz file of arrays"):
        weight_files.load(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="no file"):
        weight_files.load(tmp_path / "b.pth")


def test_the_reader_has_a_limit_on_memory(tmp_path):
    path = write_pickle(tmp_path / "a.pkl", {"a": np.zeros(1 << 24, np.float32)}, 4)
    command = [sys.executable, "-P", unpickle.__file__, str(path), str(tmp_path), "100", "60"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 1 and "more than 100 MiB of memory" in done.stderr


# ---- Other names and other functions --------------------------------------------------------------------------------


def torch_resnet(depth: int):
    """(a PyTorch ResNet, its parameters and state as haiku has them)."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet
    from helpers import same_resnet

    encoder = ResNet(depth=depth, width=0.125, num_classes=3)
    reference = TorchResNet(depth, 0.125, num_classes=3).eval()
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in torch_state(encoder).items()})
    return reference, *same_resnet.haiku_trees(reference)


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_haikus_weights_give_the_features_of_its_padding(depth, tmp_path):
    """Where a layer with a stride meets an even size, torch's padding makes another function of the same weights."""
    torch = pytest.importorskip("torch")
    from helpers import same_resnet

    reference, params, state = torch_resnet(depth)
    np.save(tmp_path / "a.npy", {"params": params, "state": state}, allow_pickle=True)
    encoder, variables, _ = load_encoder(str(tmp_path / "a.npy"))
    assert encoder == ResNet(depth=depth, width=0.125, padding="same")
    for size in (48, 65):  # 65, 33, 17, 9, 5: all odd
        images = pixels(size)
        with torch.no_grad():
            expected = same_resnet.features(reference, torch.from_numpy(normalised(encoder, images))).numpy()
        np.testing.assert_allclose(pooled(encoder, variables, images), expected, atol=1e-4)
        other = pooled(encoder.clone(padding="torch"), variables, images)
        assert (np.abs(other - expected).max() > 1e-2) == (size == 48)


def test_haikus_trees_are_found_in_all_forms(tmp_path):
    _, params, state = torch_resnet(18)
    expected = random_variables(ResNet(depth=18, width=0.125, num_classes=3))
    del expected["params"]["classifier"]  # haiku_trees leaves it out
    forms = {
        "pair": (params, state),
        "BYOL": {"online_params": params, "online_state": state, "target_params": params, "step": 7},
        "flat": {f"{module}/{name}": x for module, of in (params | state).items() for name, x in of.items()},
    }
    for form, tree in forms.items():
        encoder, variables, _ = load_encoder(str(write_pickle(tmp_path / f"{form}.pkl", tree, 4)))
        assert encoder == ResNet(depth=18, width=0.125, padding="same")
        chex.assert_trees_all_equal(variables, expected)


def test_an_encoder_with_other_padding_is_not_exported_under_torchs_names(tmp_path):
    encoder = ResNet(depth=18, width=0.125, padding="same")
    with pytest.raises(ConfigError, match="pads symmetrically, this encoder as TensorFlow"):
        export.export_encoder("torchvision", encoder, random_variables(encoder), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="padding='valid'"):
        ResNet(padding="valid")


def bit_file(path: pathlib.Path, state: dict[str, np.ndarray]) -> pathlib.Path:
    """Weights in timm's names as BiT's .npz has them (its names as timm's loader spells them, one by one)."""
    arrays = {}
    for name, array in state.items():
        parts = name.split(".")
        if name == "stem.conv.weight":
            key = "resnet/root_block/standardized_conv2d/kernel"
        elif parts[0] == "norm":
            key = f"resnet/group_norm/{'gamma' if parts[1] == 'weight' else 'beta'}"
        elif parts[0] == "head":
            key = f"resnet/head/conv2d/{'kernel' if parts[2] == 'weight' else 'bias'}"
        else:
            unit = f"resnet/block{int(parts[1]) + 1}/unit{int(parts[3]) + 1:02d}"
            if parts[4] == "downsample":
                key = f"{unit}/a/proj/standardized_conv2d/kernel"
            elif parts[4].startswith("conv"):
                key = f"{unit}/{'abc'[int(parts[4][4]) - 1]}/standardized_conv2d/kernel"
            else:
                letter = "abc"[int(parts[4][4]) - 1]
                key = f"{unit}/{letter}/group_norm/{'gamma' if parts[5] == 'weight' else 'beta'}"
        arrays[key] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("depth, classes", [(18, 6), pytest.param(50, None, marks=pytest.mark.slow)])
def test_bits_arrays_and_timms_names_give_the_features(depth, classes, tmp_path):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNetV2

    encoder = BIT.clone(depth=depth, num_classes=classes)
    state = torch_names.to_torch(TIMM, encoder, random_variables(encoder))
    reference = TorchResNetV2(depth, 0.125, "group", classes or 0).eval()
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    found = {
        "bit": load_encoder(str(bit_file(tmp_path / "a.npz", state))),
        "timm": load_encoder(str(tmp_path / "timm.pth")),
    }
    half = dict(input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    assert found["bit"].encoder == encoder.clone(**half)
    assert found["timm"].encoder == encoder.clone(kernel_eps=1e-8, **half)
    with torch.no_grad():
        expected, _ = reference(torch.from_numpy(normalised(found["bit"].encoder, pixels(48))))
    for loaded in found.values():
        chex.assert_trees_all_equal(loaded.variables, random_variables(encoder))
        features = pooled(loaded.encoder, loaded.variables, pixels(48))
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-4, rtol=1e-3)  # 50 layers in float32, two sums


def test_the_epsilon_of_standardisation_is_a_field_of_the_encoder(tmp_path):
    """Kernels of a variance of 1e-8: adding as much halves it, adding 1e-10 does not."""
    kernel = np.random.default_rng(0).normal(0, 1e-4, (3, 3, 8, 4)).astype(np.float32)
    variance = np.float64(kernel).var(axis=(0, 1, 2))
    for eps in (1e-8, 1e-10):
        found = np.asarray(standardize_kernel(kernel, eps)).astype(np.float64).var(axis=(0, 1, 2))
        np.testing.assert_allclose(found, variance / (variance + eps), rtol=1e-4)
    encoder = BIT.clone(kernel_eps=1e-8)
    export.export_timm(encoder, random_variables(encoder), tmp_path / "a.safetensors")
    config, _ = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    assert encoder.cast_kernels(random_variables(encoder)["params"])["stem_conv"]["kernel"].std() == pytest.approx(
        1, 1e-3
    )


def test_a_hub_folder_is_read_or_its_architecture_is_named(tmp_path):
    """timm's names are ours; of others the message says what config.json does."""
    encoder = ResNet(depth=18, width=0.0625)
    variables = random_variables(encoder)
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir(), other.mkdir()
    export.export_torchvision(encoder, variables, ours / "model.safetensors")
    (ours / "config.json").write_text('{"architecture": "resnet18"}')
    chex.assert_trees_all_equal(load_encoder(str(ours)).variables, variables)
    safetensors.numpy.save_file({"embeddings.weight": np.zeros((2, 2), np.float32)}, other / "model.safetensors")
    for text, named in (
        ('{"architectures": ["BertModel"], "model_type": "bert"}', "BertModel"),
        ('{"model_type": "bert"}', "bert"),
        ("[]", "no architecture"),
    ):
        (other / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"/other has no entry .*config.json names {named}"):
            load_encoder(str(other))


def test_bits_and_haikus_files_are_strict(tmp_path):
    arrays = dict(np.load(bit_file(tmp_path / "a.npz", torch_names.to_torch(TIMM, BIT, random_variables(BIT)))))
    arrays["resnet/more"] = arrays.pop("resnet/block1/unit01/a/group_norm/beta")
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match="2 entries .* missing block1/unit01/a/group_norm/beta; unexpected more"):
        export.load_encoder(tmp_path / "a.npz")
    tree = {"net/~/initial_conv": {"w": np.zeros((7, 7, 3, 8), np.float32)}, "decoder/linear": {"w": ONE}}
    with pytest.raises(CheckpointError, match="1 entries belong neither to net/ nor to a known head: decoder/linear/w"):
        export.load_encoder(write_pickle(tmp_path / "b.pkl", (tree, {})))
    with pytest.raises(CheckpointError, match="parameters and state both have a/w"):
        elsewhere.state_dict([{"a": {"w": ONE}}, {"a": {"w": ONE}}])
