"""MoCo v3 and its ViT: against PyTorch's own layers, the loss in closed form, the parts of the moving average."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import moco_v3
from vivi_jax import export, optim
from vivi_jax.build import build
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import safetensors_files
from vivi_jax.methods.moco_v3 import MocoV3
from vivi_jax.models import build_encoder
from vivi_jax.models.vit import VisionTransformer, positions
from vivi_jax.train_step import create, make_train_step

TINY = dict(patch=8, width=24, depth=2, heads=3, image_size=32)
BATCH = 8


@functools.cache
def random_vit() -> tuple[VisionTransformer, dict]:
    """An encoder all of whose parameters are random, so that none can be forgotten."""
    encoder = VisionTransformer(**TINY)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(1)
    return encoder, jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape, np.float32)), shapes)


def method(**changes) -> MocoV3:
    return MocoV3(build_encoder("vit", **TINY), **dict(hidden=16, out=8, temperature=0.2) | changes)


def batch() -> dict:
    return {"views": np.random.default_rng(0).integers(0, 256, (BATCH, 2, 32, 32, 3), dtype=np.uint8)}


@functools.cache
def one_step():
    """(state before, state after, metrics) of one step of SGD."""
    spec = method().batch_spec(BATCH, ml_collections.ConfigDict({"image_size": 32, "views": 2}))
    schedule = optax.constant_schedule(0.1)
    optimizer = optim.sgd(schedule, weight_decay=0.1, momentum=0.9)
    step = make_train_step(method(), optimizer, schedule, optim.ema_constant(10, decay=0.9), seed=0, micro_batches=1)
    before = jax.jit(lambda: create(method(), optimizer, spec, 0))()
    return (before, *jax.jit(step)(before, batch()))


def test_the_papers_encoder_has_its_size():
    """12 blocks of 12 C^2 + 13 C parameters, the projection of patches, class token and last norm; 21.6 M."""
    config = moco_v3.get_config()
    width = 384
    expected = 12 * (12 * width**2 + 13 * width) + (16 * 16 * 3 + 1) * width + width + 2 * width
    shapes = jax.eval_shape(
        lambda x: build_encoder(**config.encoder).init(jax.random.key(0), x, train=False), jnp.zeros((1, 224, 224, 3))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 21_590_016


def test_positions_are_sines_and_cosines_of_row_and_column():
    table = np.asarray(positions(3, 4, 8))
    frequencies = np.array([1.0, 0.01])
    for y in range(3):
        for x in range(4):
            waves = [np.sin(y * frequencies), np.cos(y * frequencies), np.sin(x * frequencies), np.cos(x * frequencies)]
            np.testing.assert_allclose(table[y, x], np.concatenate(waves), atol=1e-6)


@pytest.mark.parametrize("size", [32, 30])
def test_features_are_those_of_pytorchs_layers(size, tmp_path):
    """The exported file in torch.nn.functional, written from timm's description alone; 30 px are filled to 32."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[torch]'")
    F = torch.nn.functional
    encoder, variables = random_vit()
    export.export_encoder("timm", encoder, variables, str(tmp_path / "vit.safetensors"))
    state, metadata = safetensors_files.load_safetensors(tmp_path / "vit.safetensors")
    w = {name: torch.from_numpy(array) for name, array in state.items()}
    images = np.random.default_rng(0).random((3, size, size, 3), np.float32)
    x = torch.from_numpy((images - np.float32(encoder.input_mean)) / np.float32(encoder.input_std)).permute(0, 3, 1, 2)
    x = F.pad(x, (0, 32 - size, 0, 32 - size), mode="replicate")
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(3, 1, -1), x], 1) + w["pos_embed"]
    for i in range(2):
        name = f"blocks.{i}."
        y = F.layer_norm(x, (24,), w[name + "norm1.weight"], w[name + "norm1.bias"], 1e-6)
        qkv = F.linear(y, w[name + "attn.qkv.weight"], w[name + "attn.qkv.bias"]).reshape(3, 17, 3, 3, 8)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(3, 17, 24)
        x = x + F.linear(y, w[name + "attn.proj.weight"], w[name + "attn.proj.bias"])
        y = F.layer_norm(x, (24,), w[name + "norm2.weight"], w[name + "norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w[name + "mlp.fc1.weight"], w[name + "mlp.fc1.bias"]))
        x = x + F.linear(y, w[name + "mlp.fc2.weight"], w[name + "mlp.fc2.bias"])
    expected = F.layer_norm(x, (24,), w["norm.weight"], w["norm.bias"], 1e-6)

    pooled, maps = jax.jit(lambda v, x: encoder.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(pooled, expected[:, 0], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(maps["block2"].reshape(3, 16, 24), expected[:, 1:], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(maps["attention"].sum((1, 2)), 1, rtol=1e-5)
    assert "num_heads=3" in metadata["loads_strictly_into"]


def test_an_export_is_read_back_bit_for_bit(tmp_path):
    encoder, variables = random_vit()
    path = tmp_path / "vit.safetensors"
    export.export_encoder("timm", encoder, variables, str(path))
    config, loaded = export.load_encoder(path)
    assert build_encoder(**config).clone(freeze_patches=True) == encoder
    chex.assert_trees_all_equal(dict(variables), loaded)


def test_what_a_format_does_not_hold_is_one_line(tmp_path):
    encoder, variables = random_vit()
    with pytest.raises(ConfigError, match="format torchvision has no VisionTransformer; use --format=timm"):
        export.export_encoder("torchvision", encoder, variables, str(tmp_path / "x"))
    vdim = build_encoder("vdim", table="small")
    with pytest.raises(ConfigError, match="format timm has no VdimEncoder; use --format=onnx"):
        export.export_encoder("timm", vdim, {}, str(tmp_path / "x"))
    state = export.vit.pos_embed(24, 4) + 0.1
    with pytest.raises(CheckpointError, match="its positions were learned"):
        export.vit.read({"patch_embed.proj.weight": np.zeros((24, 3, 8, 8)), "pos_embed": state}, {})


def test_loss_of_equal_and_of_own_embeddings():
    """All alike: log B for each of 2 queries. Each its own key: log(1 + (B - 1) exp(-1 / tau)). Both times 2 tau."""
    tau, equal = 0.2, jnp.tile(jnp.eye(1, BATCH)[None], (BATCH, 2, 1)) / 0.2**0.5
    loss, _, _ = method().loss({"queries": equal, "keys": equal}, {}, {}, 0)
    np.testing.assert_allclose(loss, 2 * tau * 2 * np.log(BATCH), rtol=1e-6)
    own = jnp.tile(jnp.eye(BATCH)[:, None], (1, 2, 1)) / tau**0.5
    loss, _, _ = method().loss({"queries": own, "keys": own}, {}, {}, 0)
    np.testing.assert_allclose(loss, 2 * tau * 2 * np.log1p((BATCH - 1) * np.exp(-1 / tau)), rtol=1e-5)


def test_the_momentum_encoder_starts_as_a_copy_and_averages_the_parts_it_has():
    before, after, metrics = one_step()
    assert set(before.target["params"]) == {"encoder", "projector"} and "predictor" in before.params
    online = {part: before.params[part] for part in before.target["params"]}
    chex.assert_trees_all_equal(before.target["params"], online)
    online = {part: after.params[part] for part in before.target["params"]}
    average = jax.tree.map(lambda xi, theta: 0.9 * xi + 0.1 * theta, before.target["params"], online)
    chex.assert_trees_all_close(after.target["params"], average, atol=1e-6)
    assert float(metrics["ema_decay"]) == pytest.approx(0.9)


def test_frozen_patches_neither_learn_nor_decay():
    before, after, _ = one_step()
    old, new = (state.params["encoder"]["patches"] for state in (before, after))
    chex.assert_trees_all_equal(old, new)
    old, new = (state.params["encoder"]["block1"]["qkv"]["kernel"] for state in (before, after))
    assert not np.array_equal(old, new)


def test_two_crops_and_two_frames_build():
    for argument, views in (("", 2), ("video", 2), ("demo", 2)):
        experiment = build(moco_v3.get_config(argument))
        assert experiment.batch_spec["views"].shape[1] == views
