"""Exports: the same features in PyTorch, nothing lost on the way there and back, damage noticed."""

import functools
import os
import pathlib
import resource
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from helpers.commands import assert_one_line_error, run_module
from helpers.networks import random_variables
from vivi_jax import export
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import safetensors_files, torch_names
from vivi_jax.export.torch_names import TIMM, TORCHVISION
from vivi_jax.models import build_encoder
from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD
from vivi_jax.models.resnet import ResNet

TINY = dict(depth=18, width=0.125)
BIT = dict(version=2, norm="group", weight_standardization=True)
V2 = dict(version=2, norm="batch")


def test_a_resnet_50_has_torchvisions_320_entries_and_an_fc_of_zeros():
    encoder = ResNet(depth=50)
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    assert len(state) == 320
    assert sum(a.size for n, a in state.items() if "running" not in n and "num_batches" not in n) == 25_557_032
    assert state["conv1.weight"].shape == (64, 3, 7, 7) and state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["layer1.0.downsample.1.running_var"].shape == (256,)
    assert state["fc.weight"].shape == (1000, 2048) and not state["fc.weight"].any()
    assert state["bn1.num_batches_tracked"].dtype == np.int64 and state["bn1.num_batches_tracked"].shape == ()


@pytest.mark.parametrize(
    "write, options",
    [
        ("torchvision", TINY),
        ("torchvision", dict(TINY, depth=50, num_classes=7)),
        ("torchvision", dict(TINY, stem="small")),
        ("timm", TINY | V2),
        ("timm", dict(TINY, depth=50, num_classes=7) | BIT),
        ("timm", dict(TINY, stem="small") | BIT),
    ],
)
def test_round_trip_through_a_file_is_exact(write, options, tmp_path):
    encoder = ResNet(input_mean=(0.5, 0.4, 0.3), **options)
    variables = random_variables(encoder)
    export.export_encoder(write, encoder, variables, tmp_path / "a.safetensors")
    config, loaded = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    chex.assert_trees_all_equal(loaded, variables)


def test_a_larger_eps_moves_into_the_variances_that_libraries_read(tmp_path):
    """VIVI's BatchNorm adds 1e-3, torch's 1e-5: a library's network, without our metadata, gives the same features."""
    encoder = ResNet(norm_eps=1e-3, norm_decay=0.99, **TINY, **V2)
    variables = random_variables(encoder)
    variables["batch_stats"] = jax.tree.map(lambda x: 0.01 * x, variables["batch_stats"])  # or eps would hardly count
    images = np.float32(np.random.default_rng(0).uniform(size=(2, 32, 32, 3)))
    features, _ = encoder.apply(variables, images, train=False)
    export.export_encoder("timm", encoder, variables, tmp_path / "a.safetensors")
    library = ResNet(**TINY, **V2)
    loaded = torch_names.from_torch(TIMM, library, safetensors.numpy.load_file(tmp_path / "a.safetensors"))
    np.testing.assert_allclose(library.apply(loaded, images, train=False)[0], features, rtol=1e-4, atol=1e-4)
    assert np.abs(library.apply(variables, images, train=False)[0] - features).max() > 0.01
    config, again = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    chex.assert_trees_all_close(again, variables, atol=1e-9)
    grouped = ResNet(norm_eps=1e-3, **TINY, **BIT)
    with pytest.raises(ConfigError, match="has norms of eps=1e-05, this encoder of norm_eps=0.001"):
        export.export_encoder("timm", grouped, random_variables(grouped), tmp_path / "b.safetensors")


def test_every_difference_is_listed_in_one_error():
    encoder = ResNet(**TINY)
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    state["layer9.weight"] = state.pop("layer2.0.conv1.weight")
    state["bn1.bias"] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError) as error:
        torch_names.from_torch(TORCHVISION, encoder, state)
    for words in (
        "3 entries",
        "missing layer2.0.conv1.weight",
        "unexpected layer9.weight",
        "bn1.bias has shape (5,), not (8,)",
    ):
        assert words in str(error.value)
    with pytest.raises(CheckpointError, match="missing layer3"):
        torch_names.to_torch(TORCHVISION, ResNet(depth=34, width=0.125), random_variables(encoder))


@pytest.mark.parametrize("options", [dict(version=2), dict(norm="group"), dict(weight_standardization=True)])
def test_other_architectures_are_refused(options):
    with pytest.raises(ConfigError, match="format torchvision holds ResNet version=1"):
        torch_names.to_torch(TORCHVISION, ResNet(**TINY, **options), {})


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
            safetensors_files.load_safetensors(path)
    path.write_bytes(good[:-100])
    pathlib.Path(f"{path}.sha256").unlink()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        safetensors_files.load_safetensors(path)
    with pytest.raises(CheckpointError, match="no file"):
        safetensors_files.load_safetensors(tmp_path / "b.safetensors")


def test_damage_is_noticed_without_the_file_beside_it_too(tmp_path):
    encoder = ResNet(**TINY)
    path = tmp_path / "a.safetensors"
    export.export_torchvision(encoder, random_variables(encoder), path)
    pathlib.Path(f"{path}.sha256").unlink()
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little") + 8
    rng = np.random.default_rng(0)
    for position in rng.integers(header, len(good), size=20):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged: its content has not the SHA-256"):
            safetensors_files.load_safetensors(path)
    for old, new in ((b"[0.485, 0.456", b"[0.485, 0.457"), (b'"sha256"', b'"sha257"')):
        assert old in good
        path.write_bytes(good.replace(old, new))
        with pytest.raises(CheckpointError, match="damaged: its content has not the SHA-256"):
            safetensors_files.load_safetensors(path)


def test_a_damaged_checksum_file_is_one_line(tmp_path):
    encoder = ResNet(**TINY)
    path = tmp_path / "a.safetensors"
    export.export_torchvision(encoder, random_variables(encoder), path)
    for content in (b"\xff\xfe\x00", b"", b"cut"):
        pathlib.Path(f"{path}.sha256").write_bytes(content)
        with pytest.raises(CheckpointError, match="a.safetensors.sha256 is damaged: it holds no SHA-256"):
            safetensors_files.load_safetensors(path)


def test_files_are_as_readable_as_any_other(tmp_path):
    """safetensors' own writer makes them readable by their owner alone, whatever the umask."""
    encoder = ResNet(**TINY)
    before = os.umask(0o027)
    try:
        export.export_torchvision(encoder, random_variables(encoder), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    encoder = ResNet(**TINY)
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(ConfigError, match="cannot write .*a.safetensors"):
            export.save("torchvision", encoder, random_variables(encoder), target, export.About(32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


UNUSABLE = [
    ({"input_std": "[0.2, 0.0, 0.2]"}, "input_std=.* is not allowed: .* above 0"),
    ({"input_std": "[0.2, NaN, 0.2]"}, "input_std='.*', which are not three numbers"),
    ({"input_mean": "[0.5]"}, "input_mean='.0.5.', which are not three numbers"),
    ({"input_mean": "half"}, "input_mean='half', which are not three numbers"),
    ({"norm_eps": "much"}, "norm_eps='much', which is no number"),
]


@pytest.mark.parametrize("metadata, message", UNUSABLE)
def test_what_no_encoder_could_use_is_not_read(metadata, message, tmp_path):
    encoder = ResNet(**TINY)
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CheckpointError, match=f"a.safetensors: .*{message}"):
        export.load_encoder(tmp_path / "a.safetensors")


def test_weights_that_are_no_numbers_are_neither_written_nor_read(tmp_path):
    encoder = ResNet(**TINY)
    variables = random_variables(encoder)
    good = torch_names.to_torch(TORCHVISION, encoder, variables)
    for name, value, message in (
        ("layer2.0.conv1.weight", np.nan, "1 of 100 arrays hold NaN or infinity, such as params/stage2_block1/conv1"),
        ("bn1.running_var", -2.0, "1 variances are negative, such as batch_stats/stem_norm/var"),
    ):
        state = {n: a.copy() for n, a in good.items()}
        state[name][..., 0] = value
        safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=message):
            export.load_encoder(tmp_path / "a.safetensors")
        broken = torch_names.from_torch(TORCHVISION, encoder, state)
        with pytest.raises(CheckpointError, match=message):
            export.export_encoder("torchvision", encoder, broken, tmp_path / "b.safetensors")
    flat_std = ResNet(**TINY, input_std=(0.2, 0.0, 0.2))
    with pytest.raises(CheckpointError, match="divides by zero"):
        export.export_encoder("torchvision", flat_std, variables, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_files_from_elsewhere_are_read_or_refused_with_the_reason(tmp_path):
    encoder = ResNet(**TINY)
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({n: a for n, a in state.items() if not n.startswith("fc.")}, path)  # no metadata
    config, _ = export.load_encoder(path)
    assert config["input_mean"] == list(IMAGENET_MEAN) and config["num_classes"] is None
    safetensors.numpy.save_file({n: a for n, a in state.items() if not n.startswith("layer4.1")}, path)
    with pytest.raises(CheckpointError, match=r"\(2, 2, 2, 1\) blocks per stage"):
        export.load_encoder(path)
    safetensors.numpy.save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no entry conv1.weight, stem.conv.weight or patch_embed"):
        export.load_encoder(path)


@pytest.mark.parametrize("form", ["without counters", "counters of one element", "float16", "bfloat16"])
def test_weights_in_the_forms_that_older_and_smaller_files_have(form, tmp_path):
    """All load in PyTorch strictly, into the same function; half precision rounds the weights and nothing else."""
    encoder = ResNet(**TINY, num_classes=5)
    state = torch_names.to_torch(TORCHVISION, encoder, random_variables(encoder))
    if form == "without counters":
        state = {n: a for n, a in state.items() if not n.endswith("num_batches_tracked")}
    elif form == "counters of one element":
        state |= {n: a.reshape(1) for n, a in state.items() if n.endswith("num_batches_tracked")}
    else:
        dtype = jnp.dtype(form)
        state = {n: a.astype(dtype) if a.dtype == np.float32 else a for n, a in state.items()}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    config, loaded = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    leaves = flatten_dict(loaded)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    expected = {path: state[TORCHVISION.name(path)].astype(np.float32) for path in leaves}
    for path, leaf in leaves.items():
        axes = torch_names.TORCH_AXES[leaf.ndim]
        np.testing.assert_array_equal(leaf.transpose(axes), expected[path])


def test_names_and_shapes_are_timms():
    """As timm's own models have them, whose files load here strictly and ours there (seen with timm 1.0.31)."""
    encoder = ResNet(**BIT, num_classes=1000)
    shapes = torch_names.expected_shapes(TIMM, encoder)
    assert len(shapes) == 153 and sum(np.prod(shape) for shape in shapes.values()) == 25_549_352
    assert shapes["stem.conv.weight"] == (64, 3, 7, 7)
    assert shapes["stages.0.blocks.0.downsample.conv.weight"] == (256, 64, 1, 1)
    assert shapes["stages.3.blocks.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["stages.0.blocks.0.norm1.weight"] == (64,) and shapes["norm.bias"] == (2048,)
    assert shapes["head.fc.weight"] == (1000, 2048, 1, 1) and shapes["head.fc.bias"] == (1000,)
    shapes = torch_names.expected_shapes(TIMM, ResNet(**V2))
    assert "head.fc.weight" not in shapes and shapes["norm.num_batches_tracked"] == ()
    assert shapes["stages.1.blocks.0.norm2.running_var"] == (128,)


@pytest.mark.parametrize(
    "options, loads",
    [
        (BIT, "timm.create_model('resnetv2_50x1_bit', num_classes=0)"),
        (dict(BIT, width=3.0, num_classes=10), "timm.create_model('resnetv2_50x3_bit', num_classes=10)"),
        (V2, "timm.create_model('resnetv2_50', num_classes=0, stem_type='fixed')"),
        (dict(BIT, stem="small"), "none (custom depth, width or stem)"),
        (dict(BIT, depth=18), "none (custom depth, width or stem)"),
    ],
)
def test_the_metadata_say_which_model_of_timm_loads_the_file(options, loads):
    assert export.resnet.timm_model(ResNet(**options)) == loads


def test_v2_files_from_elsewhere(tmp_path):
    path = tmp_path / "a.safetensors"
    encoder = ResNet(**TINY, **BIT)
    state = torch_names.to_torch(TIMM, encoder, random_variables(encoder))
    safetensors.numpy.save_file(state, path)  # no metadata
    config, _ = export.load_encoder(path)
    assert config["input_mean"] == [0.5] * 3 and build_encoder(**config) == encoder.clone(
        input_mean=(0.5,) * 3, input_std=(0.5,) * 3, kernel_eps=1e-8
    )
    encoder = ResNet(**TINY, **V2)
    safetensors.numpy.save_file(torch_names.to_torch(TIMM, encoder, random_variables(encoder)), path)
    with pytest.raises(CheckpointError, match="a.safetensors: its max-pool is padded with -inf"):
        export.load_encoder(path)
    state.pop("stages.2.blocks.1.norm2.bias")
    safetensors.numpy.save_file(state, path)
    with pytest.raises(CheckpointError, match="1 entries .* missing stages.2.blocks.1.norm2.bias"):
        export.load_encoder(path)
    for options in ({}, dict(version=2, norm="group"), dict(V2, weight_standardization=True)):
        with pytest.raises(ConfigError, match="format timm holds ResNet version=2, norm='batch', .* or version=2"):
            torch_names.to_torch(TIMM, ResNet(**TINY, **options), {})


@pytest.mark.parametrize(
    "options, size",
    [
        pytest.param(dict(depth=50, **BIT), 224, marks=pytest.mark.slow),
        pytest.param(dict(depth=50, width=0.25, **V2), 97, marks=pytest.mark.slow),
        (dict(depth=18, width=0.5, num_classes=5, **BIT), 65),
        (dict(depth=18, width=0.25, num_classes=5, **V2), 64),
    ],
)
def test_v2_features_equal_pytorchs(options, size):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNetV2

    encoder = ResNet(**options)
    variables = random_variables(encoder)
    reference = TorchResNetV2(
        options["depth"], options.get("width", 1), options["norm"], options.get("num_classes", 0)
    ).eval()
    state = torch_names.to_torch(TIMM, encoder, variables)
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    images = np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)
    normalised = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    with torch.no_grad():
        expected, logits = reference(torch.from_numpy(normalised.transpose(0, 3, 1, 2)))
    pooled, outputs = jax.jit(functools.partial(encoder.apply, train=False))(variables, images)
    np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-4)
    if encoder.num_classes:
        np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-4)
    assert 0.1 < np.std(pooled) < 10


def test_the_command_ends_with_one_line_on_a_run_that_is_not_there(tmp_path):
    result = run_module("vivi_jax.export", f"--workdir={tmp_path}/no", f"--out={tmp_path}/a")
    assert_one_line_error(result, f"{tmp_path}/no")
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, size", [(dict(depth=50), 224), (dict(depth=50, width=0.25), 97), (dict(depth=18, width=0.25), 64)]
)
def test_features_equal_pytorchs(options, size):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_resnet import TorchResNet

    encoder = ResNet(**options)
    variables = random_variables(encoder)
    reference = TorchResNet(**options).eval()
    state = torch_names.to_torch(TORCHVISION, encoder, variables)
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
    variables = torch_names.from_torch(TORCHVISION, encoder, reference.state_dict())
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
