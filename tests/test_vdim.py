"""VDIM: the encoder is the paper's Table 1, the loss its Eq. 3 without same-clip negatives, the step does not depend on
how a batch is divided."""

import json
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from configs import vdim
from helpers.commands import one_device
from helpers.networks import PlainEncoder, count
from helpers.video_files import write_video
from input_pipeline.preparation.local import prepare
from vivi_jax import losses, optim, train_step
from vivi_jax.build import build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.methods.vdim import Vdim
from vivi_jax.models import build_encoder
from vivi_jax.models.heads import ResidualMlp
from vivi_jax.models.resnet import make_norm
from vivi_jax.models.vdim_encoder import TABLES, UNIT_INIT, ConvBlock, ResBlock, SpatialConv

PAPER_INPUT, SMALL_INPUT = (1, 32, 128, 128, 3), (1, 8, 48, 48, 3)
BATCH, FRAMES, SIZE = 8, 2, 8
DIM = 128  # so that each of GroupNorm's 32 groups has four channels: of one or two it would leave nothing but signs


def variables(module, shape):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=True))


# ---- Encoder --------------------------------------------------------------------------------------------------------
def test_encoder_and_phi_of_the_global_layer_have_the_papers_17_3_million_parameters():
    encoder = count(variables(build_encoder("vdim"), PAPER_INPUT)["params"])
    phi = count(variables(ResidualMlp(512), (1, 1, 1, 1, 512))["params"])
    assert (encoder, phi) == (16_508_864, 788_992) and encoder + phi == 17_297_856


@pytest.mark.parametrize(
    "table, shape, sizes",
    [
        (
            "paper",
            PAPER_INPUT,
            [
                (64, 16, 64, 64),
                (64, 14, 62, 62),
                (128, 14, 30, 30),
                (256, 14, 14, 14),
                (512, 7, 7, 7),
                (512, 5, 5, 5),
                (512, 3, 3, 3),
                (512, 1, 1, 1),
            ],
        ),
        (
            "small",
            SMALL_INPUT,
            [(32, 7, 12, 12), (32, 5, 10, 10), (64, 5, 4, 4), (128, 4, 3, 3), (128, 3, 2, 2), (128, 1, 1, 1)],
        ),
    ],
)
def test_every_row_has_its_size(table, shape, sizes):
    encoder = build_encoder("vdim", table=table)
    (_, views), captured = jax.eval_shape(
        lambda v: encoder.apply(
            v, jnp.zeros(shape), train=False, capture_intermediates=lambda m, _: isinstance(m, ConvBlock | ResBlock)
        ),
        variables(encoder, shape),
    )
    blocks = captured["intermediates"]
    assert len(blocks) == len(TABLES[table]) == len(sizes)
    for i, (channels, *places) in enumerate(sizes, 1):
        assert blocks[f"block{i}"]["__call__"][0].shape == (1, *places, channels), f"row {i}"
    named = {row.view: size for row, size in zip(TABLES[table], sizes, strict=True) if row.view}
    assert {name: (x.shape[-1], *x.shape[1:4]) for name, x in views.items()} == named


@pytest.mark.slow
def test_receptive_fields_by_gradients():
    """Frames and pixels that a central location's features depend on; longer than the paper's clips, to see 35, 131."""
    shape, rng = (1, 40, 148, 148, 3), np.random.default_rng(0)
    encoder = build_encoder("vdim", width=1 / 16)
    # Positive, as zeros (which some of them start as) and ReLUs would hide what is connected.
    params = jax.tree.map(lambda p: np.float32(rng.random(p.shape) / p.size), variables(encoder, shape))
    clip = np.float32(rng.random(shape))

    def views(clip):  # at evaluation: the batch's statistics would look at all of the clip
        return encoder.apply(params, clip, train=False)[1]

    outputs = jax.eval_shape(views, clip)
    gradient = jax.jit(lambda cotangents: jax.vjp(views, clip)[1](cotangents)[0])
    for view, expected in {"local1": (11, 35), "local2": (19, 67), "global": (35, 131)}.items():
        middle = tuple(n // 2 for n in outputs[view].shape[1:4])
        cotangents = {name: np.zeros(x.shape, np.float32) for name, x in outputs.items()}
        cotangents[view][(0, *middle)] = 1
        seen = np.abs(gradient(cotangents)[0]).sum(-1) > 0  # [T, H, W]
        spans = [np.ptp(np.flatnonzero(seen.any(axes))) + 1 for axes in ((1, 2), (0, 2), (0, 1))]
        assert spans == [expected[0], expected[1], expected[1]], view


@pytest.mark.slow
def test_an_image_is_a_clip_without_motion():
    encoder = build_encoder("vdim", table="small", width=1 / 8, frames=8)
    image = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3))
    init = jax.jit(lambda: encoder.init(jax.random.key(0), image, train=True))()
    apply = jax.jit(lambda x: encoder.apply(init, x, train=False)[0])
    pooled = apply(image)
    assert pooled.shape == (2, 16) and pooled.dtype == jnp.float32 and pooled.std() > 0
    np.testing.assert_allclose(apply(jnp.repeat(image[:, None], 8, axis=1)), pooled, rtol=1e-5)


def test_clips_too_small_for_the_table_are_refused():
    encoder = build_encoder("vdim")
    with pytest.raises(ConfigError, match="16 frames of 128 x 128.*row 7 needs 3 frames of 3 x 3, it gets 1 of"):
        variables(encoder, (1, 16, 128, 128, 3))
    with pytest.raises(ConfigError, match="32 frames of 64 x 64 pixels are too small.*row 7"):
        variables(encoder, (1, 32, 64, 64, 3))
    with pytest.raises(ValueError, match="uint8"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros(PAPER_INPUT, jnp.uint8), train=True))
    with pytest.raises(ConfigError, match="table='papr'"):
        build_encoder("vdim", table="papr")


# ---- Loss -----------------------------------------------------------------------------------------------------------
def locations(seed: int, n: int, m: int, batch: int = 3, dim: int = 3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, n, dim)) * 3, rng.normal(size=(batch, m, dim)) * 3


@jax.jit
def nce_and_gradients(pair, bound: float):
    """((loss, mean squared score), gradients of the loss)."""
    return jax.value_and_grad(lambda pair: losses.deep_infomax_nce(*pair, clip_score=bound), has_aux=True)(pair)


def nce_oracle(antecedents, consequents, bound: float) -> tuple[float, float]:
    """(mean loss, mean squared score) with a loop over clips and pairs of locations."""
    batch, n, dim = antecedents.shape
    scores = {
        (b, i, c, k): antecedents[b, i] @ consequents[c, k] / np.sqrt(dim)
        for b in range(batch)
        for i in range(n)
        for c in range(batch)
        for k in range(consequents.shape[1])
    }
    share = {key: np.exp(bound * np.tanh(s / bound)) for key, s in scores.items()}
    terms = []
    for (b, i, c, _), positive in share.items():
        if c == b:
            others = sum(e for (b2, i2, c2, _), e in share.items() if (b2, i2) == (b, i) and c2 != b)
            terms.append(-np.log(positive / (positive + others)))
    return np.mean(terms), np.mean(np.square(list(scores.values())))


@pytest.mark.parametrize("n, m", [(4, 1), (1, 4), (2, 3)])
def test_loss_value_and_gradient_equal_the_loop_over_locations(n, m):
    pair = locations(0, n, m)
    value, grads = jax.device_get(nce_and_gradients(tuple(map(np.float32, pair)), 5.0))
    np.testing.assert_allclose(value, nce_oracle(*pair, 5.0), rtol=1e-5)
    for which, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):
            step = np.zeros(grad.shape)
            step[index] = 1e-6
            up, down = ([x + sign * step if k == which else x for k, x in enumerate(pair)] for sign in (1, -1))
            slope = (nce_oracle(*up, 5.0)[0] - nce_oracle(*down, 5.0)[0]) / 2e-6
            np.testing.assert_allclose(grad[index], slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("n, m", [(1, 5), (5, 1)])
def test_locations_of_the_same_clip_are_no_negatives(n, m):
    """All scores within a clip are 12, all others 0. Were a clip's own locations negatives, this would cost log(m)."""
    batch, dim = 4, 16
    e = np.eye(batch, dim, dtype=np.float32) * np.sqrt(12 * np.sqrt(dim))
    pair = tuple(np.repeat(e[:, None], k, axis=1) for k in (n, m))
    (nce, _), grads = nce_and_gradients(pair, 1e4)
    np.testing.assert_allclose(nce, np.log1p((batch - 1) * m * np.exp(-12)), rtol=1e-3)
    assert max(np.abs(g).max() for g in grads) < 1e-3
    (alone, _), grads = nce_and_gradients(tuple(np.float32(x) for x in locations(1, n, m, batch=1)), 20.0)
    assert alone == 0 and all((g == 0).all() for g in grads)  # one clip has no negatives at all


def test_scores_are_clipped_softly_but_penalised_in_full():
    pair = tuple(np.float32(100 * x) for x in locations(2, 4, 1))
    (nce, squared), _ = nce_and_gradients(pair, 20.0)
    assert nce <= 40 + np.log(3) and squared > 1e6
    np.testing.assert_allclose(losses.soft_clip(jnp.array([-1e9, 0.0, 0.01, 1e9]), 20.0), [-20, 0, 0.01, 20], rtol=1e-5)


def test_one_device_equals_eight():
    pair = tuple(np.float32(x) for x in locations(3, 5, 1, batch=16, dim=8))
    split = jax.device_put(pair, sharding.batch_sharding(sharding.make_mesh(jax.devices()[:8])))
    one, many = nce_and_gradients(pair, 20.0), nce_and_gradients(split, 20.0)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    chex.assert_trees_all_close(many[1], one[1], rtol=1e-5, atol=1e-7)


# ---- Method and step ------------------------------------------------------------------------------------------------
class TinyClipEncoder(PlainEncoder):
    """Two layers of locations and a norm at the output: all that these properties hang on, and quick to compile."""

    def feature_maps(self):
        return ("global", "local2")

    @nn.compact
    def __call__(self, x, *, train):
        local = nn.relu(SpatialConv(8, 4, 4, UNIT_INIT, name="local")(x))
        x = SpatialConv(DIM, 2, 2, UNIT_INIT, name="global")(local).mean(1, keepdims=True)
        x = make_norm(self.norm, name="norm")(x, train)
        return x.mean((1, 2, 3)), {"local2": local, "global": x}


def tiny(norm: str, micro_batches: int = 1, difference: bool = True):
    method = Vdim(
        TinyClipEncoder(norm=norm),
        layers=("local2", "global"),
        embed_dim=DIM,
        color="none",
        clip_score=20.0,
        score_penalty=0.05,
    )
    schedule, _ = optim.piecewise(8, lr=1e-2, total_steps=9, warmup_steps=0, boundaries=(), factor=1.0)
    optimizer = optim.sgd(schedule, weight_decay=0.0, momentum=0.9)
    data = ml_collections.ConfigDict(dict(frames=FRAMES, image_size=SIZE, difference=difference))
    spec = method.batch_spec(BATCH, data)
    state = jax.jit(lambda: train_step.create(method, optimizer, spec, 0))()
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 256, x.shape, dtype=np.uint8) for name, x in spec.items()}
    step = train_step.make_train_step(method, optimizer, schedule, None, seed=0, micro_batches=micro_batches)
    return method, state, batch, step


def one_step(norm: str, micro_batches: int = 1, devices: int = 1):
    _, state, batch, step = tiny(norm, micro_batches)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state, batch = (
        jax.device_put(state, sharding.replicated(mesh)),
        jax.device_put(batch, sharding.batch_sharding(mesh)),
    )
    return jax.device_get(jax.jit(step)(state, batch))


@pytest.fixture(scope="module")
def group_norm_step():
    return one_step("group")


@pytest.mark.slow
def test_micro_batches_on_devices_equal_the_whole_batch_with_group_norm(group_norm_step):
    state, metrics = one_step("group", micro_batches=2, devices=4)
    np.testing.assert_allclose(metrics["loss"], group_norm_step[1]["loss"], rtol=1e-5)
    chex.assert_trees_all_close(state.params, group_norm_step[0].params, atol=1e-5)


@pytest.mark.slow
def test_batch_norm_sees_the_global_batch_and_differs_per_micro_batch():
    one, many, micro = one_step("batch"), one_step("batch", devices=8), one_step("batch", micro_batches=2)
    np.testing.assert_allclose(many[1]["loss"], one[1]["loss"], rtol=1e-4)
    chex.assert_trees_all_close(many[0].model_state, one[0].model_state, atol=1e-4)
    assert abs(micro[1]["loss"] - one[1]["loss"]) > 1e-3


def test_the_loss_is_the_sum_over_layer_pairs_both_ways(group_norm_step):
    metrics = group_norm_step[1]
    assert {name for name in metrics if name.startswith("nce")} == {
        "nce_local2_global",
        "nce_global_local2",
        "nce_global_global",
    }
    nce = metrics["nce_local2_global"] + metrics["nce_global_local2"] + 2 * metrics["nce_global_global"]
    assert 0 < metrics["loss"] - nce < metrics["loss"]  # the rest is the penalty on scores
    assert metrics["gradient_norm"] > 0.1  # these steps do compute something
    method, state, batch, _ = tiny("group")
    keys = train_step.example_keys(0, 0, batch)
    embeddings, _, _ = jax.eval_shape(method.embed, state.params, state.model_state, {}, batch, keys)
    for view in ("view1", "view2"):
        assert {name: x.shape for name, x in embeddings[view].items()} == {
            "local2": (BATCH, FRAMES * 4, DIM),
            "global": (BATCH, 1, DIM),
        }


def test_differences_of_equal_halves_say_nothing_of_the_clip():
    method, state, batch, _ = tiny("group")
    half = batch["view2"][:, :FRAMES]
    embed = jax.jit(method.embed)
    keys = train_step.example_keys(0, 0, batch)
    for second, differs in ((half, False), (np.roll(half, 1, axis=0), True)):
        batch["view2"] = np.concatenate([half, second], axis=1)
        view2 = embed(state.params, state.model_state, {}, batch, keys)[0]["view2"]
        assert (view2["local2"].std(axis=0).max() > 1e-3) == differs


# ---- Config ---------------------------------------------------------------------------------------------------------
VARIANTS = [
    "",
    "layers=68",
    "layers=8",
    "color=lab",
    "rotate",
    "offset=0",
    "difference=yes",
    "down=3",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_demo_takes_an_abstract_step(variant):
    build(vdim.get_config(variant))
    experiment = build(vdim.get_config(f"demo,{variant}".strip(",")))
    state = jax.eval_shape(lambda: train_step.create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    new_state, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new_state)


@pytest.mark.parametrize("variant, steps, view2", [("", 50_000, 64), ("data=kinetics600", 100_000, 32)])
def test_the_papers_config_has_the_papers_numbers(variant, steps, view2):
    config = vdim.get_config(variant)
    experiment = build(config)
    state = jax.eval_shape(lambda: train_step.create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
    assert experiment.total_steps == steps
    assert experiment.batch_spec["view1"].shape == (240, 32, 128, 128, 3)
    assert experiment.batch_spec["view2"].shape == (240, view2, 128, 128, 3)
    assert count(state.params) == 16_508_864 + 3 * 788_992
    schedule, _ = optim.piecewise(240, **{k: v for k, v in config.schedule.items() if k != "name"})
    np.testing.assert_allclose([schedule(0), schedule(steps - 1)], 2e-4)
    assert (config.data.downsample, config.data.offset, config.data.rotate) == (2, 0, False)
    assert config.data.difference == (view2 == 64)


def test_layers_without_the_global_one_are_refused():
    config = vdim.get_config()
    config.method.layers = ("local1",)
    with pytest.raises(ConfigError, match="'global' must be among them"):
        build(config)


# ---- The whole path -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_from_video_files_resumes_bit_for_bit(tmp_path):
    (tmp_path / "videos").mkdir()
    for i in range(8):
        texture = np.random.default_rng(i).integers(0, 256, (6, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(tmp_path / "videos" / f"{i}.mp4", [texture[:, t : t + 48] for t in range(20 + i)])
    prepare(str(tmp_path / "videos"), str(tmp_path / "store"), workers=2)
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "vivi_jax.main",
        "--config=configs/vdim.py:demo",
        f"--workdir={run}",
        f"--config.data.path={tmp_path / 'store'}",
        "--config.batch_size=8",
        "--config.encoder.width=0.125",
        "--config.schedule.total_steps=4",
        "--config.schedule.warmup_steps=1",
        "--config.run.checkpoint_every=2",
    ]

    def final_state() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=one_device())
        assert done.returncode == 0, done.stderr
        return json.loads((run / "summary.json").read_text())["state_sha256"]

    straight = final_state()
    shutil.rmtree(run / "checkpoints" / "4")  # as if it had been killed after step 2
    assert final_state() == straight
