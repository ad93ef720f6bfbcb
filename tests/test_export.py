"""Exports: the same features in PyTorch, nothing lost on the way there and back, damage noticed."""
import functools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from vivi_jax import export
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.models import build_encoder
from vivi_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet

TINY = dict(depth=18, width=0.125)


def random_variables(encoder: ResNet) -> dict:
    """Random parameters and BatchNorm statistics that keep activations around 1, drawn with NumPy."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            return rng.normal(0, np.sqrt(1 / np.prod(shape[:-1])), shape)
        return rng.uniform(0.5, 1.5, shape) if name in ("scale", "var") else rng.normal(0, 0.1, shape)

    shapes = export.abstract_variables(encoder)
    return jax.tree.map(np.float32, jax.tree_util.tree_map_with_path(draw, shapes))


def test_a_resnet_50_has_torchvisions_320_entries_and_an_fc_of_zeros():
    encoder = ResNet(depth=50)
    state = export.to_torchvision(encoder, random_variables(encoder))
    assert len(state) == 320
    assert sum(a.size for n, a in state.items() if "running" not in n and "num_batches" not in n) == 25_557_032
    assert state["conv1.weight"].shape == (64, 3, 7, 7) and state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["layer1.0.downsample.1.running_var"].shape == (256,)
    assert state["fc.weight"].shape == (1000, 2048) and not state["fc.weight"].any()
    assert state["bn1.num_batches_tracked"].dtype == np.int64 and state["bn1.num_batches_tracked"].shape == ()


@pytest.mark.parametrize("options", [TINY, dict(TINY, depth=50, num_classes=7), dict(TINY, stem="small")])
def test_round_trip_through_a_file_is_exact(options, tmp_path):
    encoder = ResNet(input_mean=(0.5, 0.4, 0.3), **options)
    variables = random_variables(encoder)
    export.export_torchvision(encoder, variables, tmp_path / "a.safetensors")
    config, loaded = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_every_difference_is_listed_in_one_error():
    encoder = ResNet(**TINY)
    state = export.to_torchvision(encoder, random_variables(encoder))
    state["layer9.weight"] = state.pop("layer2.0.conv1.weight")
    state["bn1.bias"] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError) as error:
        export.from_torchvision(encoder, state)
    for words in ("3 entries", "missing layer2.0.conv1.weight", "unexpected layer9.weight",
                  "bn1.bias has shape (5,), not (8,)"):
        assert words in str(error.value)
    with pytest.raises(CheckpointError, match="missing layer3"):
        export.to_torchvision(ResNet(depth=34, width=0.125), random_variables(encoder))


@pytest.mark.parametrize("options", [dict(version=2), dict(norm="group"), dict(weight_standardization=True)])
def test_other_architectures_are_refused(options):
    with pytest.raises(ConfigError, match="format torchvision holds ResNet version=1"):
        export.to_torchvision(ResNet(**TINY, **options), {})


def test_a_flipped_bit_a_cut_file_and_a_missing_file_are_noticed(tmp_path):
    encoder = ResNet(**TINY)
    path = tmp_path / "a.safetensors"
    export.export_torchvision(encoder, random_variables(encoder), path)
    subprocess.run(["sha256sum", "--check", "--quiet", "a.safetensors.sha256"], cwd=tmp_path, check=True)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(good), size=20):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
            export.load_safetensors(path)
    path.write_bytes(good[:-100])
    pathlib.Path(f"{path}.sha256").unlink()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export.load_safetensors(path)
    with pytest.raises(CheckpointError, match="no file"):
        export.load_safetensors(tmp_path / "b.safetensors")


def test_files_from_elsewhere_are_read_or_refused_with_the_reason(tmp_path):
    encoder = ResNet(**TINY)
    state = export.to_torchvision(encoder, random_variables(encoder))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({n: a for n, a in state.items() if not n.startswith("fc.")}, path)  # no metadata
    config, _ = export.load_encoder(path)
    assert config["input_mean"] == list(IMAGENET_MEAN) and config["num_classes"] is None
    safetensors.numpy.save_file({n: a for n, a in state.items() if not n.startswith("layer4.1")}, path)
    with pytest.raises(CheckpointError, match=r"\(2, 2, 2, 1\) blocks per stage"):
        export.load_encoder(path)
    safetensors.numpy.save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no entry conv1.weight"):
        export.load_encoder(path)


def test_the_command_ends_with_one_line_on_a_run_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "vivi_jax.export", f"--workdir={tmp_path}/no", f"--out={tmp_path}/a"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, size", [(dict(depth=50), 224), (dict(depth=50, width=0.25), 97),
                                           (dict(depth=18, width=0.25), 64)])
def test_features_equal_pytorchs(options, size):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet
    encoder = ResNet(**options)
    variables = random_variables(encoder)
    reference = TorchResNet(**options).eval()
    state = export.to_torchvision(encoder, variables)
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    images = np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)
    normalised = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    with torch.no_grad():
        expected, expected_stages = reference(torch.from_numpy(normalised.transpose(0, 3, 1, 2)))
    pooled, stages = jax.jit(functools.partial(encoder.apply, train=False))(variables, images)
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-4)
    for stage, expected_map in enumerate(expected_stages, 1):
        np.testing.assert_allclose(stages[f"stage{stage}"], expected_map.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    assert 0.1 < np.std(pooled) < 10


def test_training_mode_equals_pytorchs():
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet
    reference = TorchResNet(depth=18, width=0.25).train()
    encoder = ResNet(depth=18, width=0.25)
    variables = export.from_torchvision(encoder, reference.state_dict())
    images = np.random.default_rng(0).uniform(size=(4, 65, 65, 3)).astype(np.float32)
    normalised = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    expected, _ = reference(torch.from_numpy(normalised.transpose(0, 3, 1, 2)))
    apply = jax.jit(functools.partial(encoder.apply, train=True, mutable=["batch_stats"]))
    (pooled, _), updated = apply(variables, images)
    np.testing.assert_allclose(pooled, expected.detach().numpy(), atol=1e-4)
    # torch keeps the unbiased variance in its running statistics, we the biased one: n / (n - 1) lies between.
    state, places = reference.state_dict(), 4 * 33 * 33
    found = updated["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(found["mean"], state["bn1.running_mean"].numpy(), atol=1e-5)
    unbiased = 0.9 + (np.asarray(found["var"]) - 0.9) * places / (places - 1)
    np.testing.assert_allclose(unbiased, state["bn1.running_var"].numpy(), atol=1e-5)
