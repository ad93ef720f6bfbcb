"""Swin: against PyTorch, its file formats both ways, stochastic depth per example, the config's demo."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import vito
from evaluation.protocols.detection.heads import pyramid_levels
from helpers.networks import count, random_variables
from vivi_jax import export, optim
from vivi_jax.build import build
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import swin, torch_names
from vivi_jax.models import build_encoder
from vivi_jax.models.swin import MASKED, SwinTransformer, separate_parts
from vivi_jax.train_step import create

TINY = dict(width=8, depths=(2, 1, 1, 1), heads=(1, 2, 2, 4), window=3, patch=2)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("depths, published", [((2, 2, 6, 2), 28_288_354), ((2, 2, 18, 2), 49_606_258)])
def test_the_sizes_are_the_published_ones(depths, published):
    """torchvision's documentation of Swin_T_Weights and Swin_S_Weights, with 1000 classes; no map has weights more."""
    encoder = SwinTransformer(depths=depths, num_classes=1000)
    assert count(torch_names.abstract_variables(encoder)) == published
    name = "swin_t" if depths[2] == 6 else "swin_s"
    config = vito.get_config(f"encoder={name}").encoder
    assert build_encoder(**config) == SwinTransformer(
        depths=depths, stochastic_depth=config.stochastic_depth, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    "options, sizes",
    [
        # Maps of 21 x 17 -> 11 x 9 -> 6 x 5 -> 3 x 3 places: odd, and not of whole windows.
        (TINY, [(42, 35)]),
        # Whole windows; a single one.
        pytest.param(TINY, [(48, 48), (9, 12)], marks=pytest.mark.slow),
        pytest.param({}, [(224, 224), (230, 197)], marks=pytest.mark.slow),
        pytest.param(dict(depths=(2, 2, 18, 2)), [(128, 160)], marks=pytest.mark.slow),
    ],
)
def test_features_equal_pytorchs(options, sizes):
    torch = pytest.importorskip("torch")
    from helpers.torch_swin import TorchSwin

    encoder = SwinTransformer(**options, num_classes=5)
    variables = random_variables(encoder)
    reference = TorchSwin(**options, num_classes=5).eval()
    state = swin.to_state(swin.TORCHVISION, encoder, variables)
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=True)
    for size in sizes:
        images = pixels(2, *size, 3)
        normalised = (images - np.float32(encoder.input_mean)) / np.float32(encoder.input_std)
        with torch.no_grad():
            logits, expected, expected_maps = reference(torch.from_numpy(normalised.transpose(0, 3, 1, 2)))
        pooled, maps = jax.jit(functools.partial(encoder.apply, train=False))(variables, images)
        np.testing.assert_allclose(pooled, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(maps["logits"], logits.numpy(), atol=1e-4)
        for stage, expected_map in enumerate(expected_maps, 1):
            if stage < 4:  # the network's own last norm is in the reference's last map
                expected_map = torch.nn.functional.layer_norm(expected_map, expected_map.shape[-1:])
            np.testing.assert_allclose(maps[f"stage{stage}"], expected_map.numpy(), atol=1e-4)
        assert 0.1 < np.std(pooled) < 10


@pytest.mark.slow
def test_maps_are_normalised_and_bfloat16_computes_the_same_function():
    encoder = SwinTransformer(**TINY)
    variables = random_variables(encoder)
    pooled, maps = jax.jit(functools.partial(encoder.apply, train=False))(variables, pixels(2, 48, 48, 3))
    for stage in (1, 2, 3):
        np.testing.assert_allclose(maps[f"stage{stage}"].mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(maps[f"stage{stage}"].std(-1), 1, atol=1e-2)
    half = encoder.clone(dtype="bfloat16")
    cast = {"params": half.cast_kernels(variables["params"])}
    rough, maps = jax.jit(functools.partial(half.apply, train=False))(cast, pixels(2, 48, 48, 3))
    assert {maps[stage].dtype for stage in half.feature_maps()} == {jnp.dtype("bfloat16")}
    assert rough.dtype == jnp.float32 and 0 < np.abs(rough - pooled).max() < 0.1


def test_parts_of_a_shifted_window_that_are_no_neighbours_do_not_attend():
    """Windows of 2 on a map of 4 x 4, shifted by 1: the last window's four places come from the map's four corners."""
    parts = separate_parts(2, 2, 2, (1, 1))
    assert parts.shape == (4, 4, 4) and not parts[0].any()
    np.testing.assert_array_equal(parts[3], np.where(np.eye(4), 0, MASKED))
    right = parts[1][0]  # of a window at the right edge: the place above left is joined by the one below it only
    np.testing.assert_array_equal(right, [0, MASKED, 0, MASKED])


@pytest.mark.parametrize("format_name", ["torchvision", "timm"])
@pytest.mark.parametrize("classes", [None, 7])
def test_round_trip_through_a_file_is_exact(format_name, classes, tmp_path):
    encoder = SwinTransformer(**TINY, num_classes=classes, input_mean=(0.5, 0.4, 0.3))
    variables = random_variables(encoder)
    export.export_encoder(format_name, encoder, variables, tmp_path / "a.safetensors")
    config, loaded = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    chex.assert_trees_all_equal(loaded, variables)
    state = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    state["layers.0.extra"] = state.pop("norm.bias")
    safetensors.numpy.save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="2 entries .* missing norm.bias; unexpected layers.0.extra"):
        export.load_encoder(tmp_path / "b.safetensors")


def test_names_and_shapes_are_the_libraries():
    """As seen in torchvision 0.28.0 and timm 1.0.31, whose own state_dicts are read and written strictly."""
    encoder = SwinTransformer()
    variables = {"params": jax.tree.map(lambda x: np.zeros(x.shape), torch_names.abstract_variables(encoder)["params"])}
    state = swin.to_state(swin.TORCHVISION, encoder, variables)
    assert len(state) == 185 and sum(a.size for n, a in state.items() if not n.endswith("index")) == 28_288_354
    for name, shape in {
        "features.0.0.weight": (96, 3, 4, 4),
        "features.0.2.bias": (96,),
        "features.1.1.attn.relative_position_bias_table": (169, 3),
        "features.1.1.attn.relative_position_index": (2401,),
        "features.2.reduction.weight": (192, 384),
        "features.6.norm.weight": (1536,),
        "features.7.1.attn.qkv.weight": (2304, 768),
        "features.7.1.mlp.3.weight": (768, 3072),
        "head.weight": (1000, 768),
    }.items():
        assert state[name].shape == shape
    state = swin.to_state(
        swin.TIMM,
        encoder.clone(num_classes=1000),
        {"params": variables["params"] | {"classifier": {"kernel": np.zeros((768, 1000)), "bias": np.zeros(1000)}}},
    )
    assert len(state) == 173
    for name, shape in {
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.norm.weight": (96,),
        "layers.1.downsample.reduction.weight": (192, 384),
        "layers.2.blocks.5.attn.proj.weight": (384, 384),
        "layers.3.blocks.1.mlp.fc1.weight": (3072, 768),
        "head.fc.weight": (1000, 768),
    }.items():
        assert state[name].shape == shape
    assert swin.model_name(encoder, 0) == "swin_t" and swin.model_name(encoder.clone(window=8), 1) is None


def test_files_of_swins_own_code_are_read(tmp_path):
    """Its names: merging belongs to the stage before, head without fc, buffers of masks and indices as entries."""
    encoder = SwinTransformer(**TINY, num_classes=3)
    variables = random_variables(encoder)
    state = swin.to_state(swin.TIMM, encoder, variables)
    for name in [n for n in state if "downsample" in n]:
        stage = int(name.split(".")[1])
        state[name.replace(f"layers.{stage}", f"layers.{stage - 1}", 1) + ".moved"] = state.pop(name)
    state = {name.removesuffix(".moved").replace("head.fc", "head"): array for name, array in state.items()}
    index = swin.relative_positions(3)
    state |= {
        "layers.0.blocks.1.attn_mask": np.zeros((4, 9, 9)),
        "layers.0.blocks.0.attn.relative_position_index": index,
    }
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    config, loaded = export.load_encoder(tmp_path / "a.safetensors")
    assert build_encoder(**config) == encoder
    chex.assert_trees_all_equal(loaded, variables)
    state["layers.0.blocks.0.attn.relative_position_index"] = index.T.copy()
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="relative_position_index is not the order"):
        export.load_encoder(tmp_path / "a.safetensors")


# ---- Training -------------------------------------------------------------------------------------------------------


def test_stochastic_depth_is_drawn_for_each_example_and_keeps_the_mean():
    encoder = SwinTransformer(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=2, patch=2, stochastic_depth=0.5)
    variables, image = random_variables(encoder), pixels(1, 16, 16, 3)
    keys = jax.random.split(jax.random.key(0), 512)

    @jax.jit
    def features(images, keys):
        return encoder.apply({**variables, "noise": {"keys": keys}}, images, train=True)[1]["stage2"]

    many = np.asarray(features(np.repeat(image, 512, axis=0), keys))
    shuffled = np.asarray(features(np.repeat(image, 512, axis=0), keys[::-1]))
    np.testing.assert_allclose(shuffled, many[::-1], atol=1e-5)  # whatever else is in the batch
    # The first block is always there; the second (rate 1/6) has two branches: four kinds of examples.
    kinds, counts = np.unique(many.reshape(512, -1).round(2), axis=0, return_counts=True)
    assert len(kinds) == 4
    both = max(counts) / 512
    assert abs(both - (5 / 6) ** 2) < 0.06
    assert encoder.without_noise() == encoder.clone(stochastic_depth=0.0)
    with pytest.raises(ConfigError, match="stochastic_depth=0.5: this method leaves out no blocks"):
        encoder.apply(variables, image, train=True)


@pytest.mark.slow
def test_the_target_network_leaves_out_no_blocks_and_the_demo_takes_steps():
    config = vito.get_config("demo,encoder=swin_t")
    config.batch_size, config.data.image_size = 8, 32
    config.encoder.update(dict(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), stochastic_depth=0.5))
    config.method.update(dict(attention_hidden=8, projector_hidden=16, projector_out=8))
    experiment = build(config)
    method = experiment.method
    assert method.target_network.encoder.stochastic_depth == 0 and method.online_network.encoder.stochastic_depth == 0.5
    state = jax.jit(lambda: create(method, experiment.optimizer, experiment.batch_spec, 0))()
    before = jax.tree.map(np.asarray, state.params)
    step = jax.jit(experiment.train_step)
    batch = {"views": np.random.default_rng(0).integers(0, 256, (8, 2, 32, 32, 3), dtype=np.uint8)}
    for _ in range(3):
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before)
    assert all(jax.tree.leaves(changed))  # every parameter, the tables of positions too


def test_tables_of_positions_have_no_weight_decay():
    params = torch_names.abstract_variables(SwinTransformer(**TINY))["params"]
    decayed = optim.decay_mask(params)["stage1_block1"]
    assert not decayed["relative_position_bias_table"] and decayed["qkv"]["kernel"] and not decayed["qkv"]["bias"]


def test_transfer_and_dense_forms_have_the_same_weights():
    encoder = SwinTransformer(**TINY, num_classes=3, stochastic_depth=0.2)
    assert encoder.for_transfer() == SwinTransformer(**TINY)
    assert encoder.for_dense(8, False) == encoder and encoder.head_norm == "batch" and encoder.num_classes == 3


def test_a_pyramid_for_detection_takes_its_maps():
    """Strides 8, 16 and 32 of 64 x 96 pixels; recomputing blocks is a field that detection sets."""
    encoder = SwinTransformer(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=2).clone(remat=True)
    sizes, strides = pyramid_levels(encoder, (64, 96))
    assert sizes == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)] and strides == [8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(depths=(2, 2)), "depths and heads need four numbers"),
        (dict(window=0), "all must be 1 or more"),
        (dict(heads=(5, 6, 12, 24)), "5 do not divide the 96 channels of stage1"),
        (dict(stochastic_depth=1.0), "from 0 to below 1"),
    ],
)
def test_impossible_values_are_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        SwinTransformer(**options)
    with pytest.raises(ConfigError, match="smaller than a patch"):
        SwinTransformer(**TINY).init(jax.random.key(0), jnp.zeros((1, 1, 9, 3)), train=False)
