"""VIVI: the heads' closed forms, micro-batches and devices, and the config of every row of the paper."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import vivi
from helpers.networks import TinyEncoder, TinyVideoEncoder
from vivi_jax import optim
from vivi_jax.build import build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.methods.vivi import Vivi, rotations
from vivi_jax.models import ENCODERS
from vivi_jax.models.resnet import ResNet
from vivi_jax.models.video_heads import ShotOrder, ShotPredictor
from vivi_jax.train_step import create, make_train_step

VIDEOS, SHOTS, FRAMES, IMAGES, SIZE, CLASSES = 16, 2, 2, 16, 8, 5
OPTIONS = dict(
    triplet_margin=0.5,
    triplet_groups=1,
    lambda_video=0.5,
    gamma=2.0,
    exemplar_dim=6,
    shot_dim=7,
    predictor_hidden=4,
    predictor_out=3,
    lstm_layers=1,
    order_hidden=5,
    num_classes=CLASSES,
    color="none",
    labelled_color="none",
    hsv=False,
    grey_prob=0.0,
    standardize=False,
)
DATA = ml_collections.ConfigDict(
    dict(unlabelled="videos", shots=SHOTS, frames=FRAMES, image_size=SIZE, labelled_batch_size=IMAGES)
)


def method(norm: str = "group", **losses) -> Vivi:
    return Vivi(
        TinyEncoder(norm=norm), **{**OPTIONS, **dict(frame_loss="none", shot_loss="none", video_loss="none"), **losses}
    )


@functools.cache
def batch() -> dict:
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 256, (VIDEOS, SHOTS, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    images = rng.integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    return {"shots": shots, "image": images, "label": rng.integers(0, CLASSES, IMAGES).astype(np.int32)}


@functools.cache
def one_step(micro_batches: int = 1, devices: int = 1):
    """State and metrics after one step of triplet, InfoNCE and labelled loss on `devices` devices, fetched."""
    vivi_method = method(shot_loss="triplet", video_loss="info_nce")
    schedule, _ = optim.piecewise(1, lr=0.1, total_steps=10, warmup_steps=0, boundaries=(5,), factor=0.1)
    optimizer = optim.sgd(schedule, weight_decay=1e-4, momentum=0.9)
    step = make_train_step(vivi_method, optimizer, schedule, None, seed=0, micro_batches=micro_batches)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state = jax.device_put(
        jax.jit(lambda: create(vivi_method, optimizer, batch(), seed=0))(), sharding.replicated(mesh)
    )
    return jax.device_get(jax.jit(step)(state, jax.device_put(batch(), sharding.batch_sharding(mesh))))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches, devices", [(2, 1), (2, 8), (1, 8)])
def test_micro_batches_and_devices_equal_the_whole_batch(micro_batches, devices):
    (state, metrics), (whole_state, whole) = one_step(micro_batches, devices), one_step()
    assert {"shot_loss", "video_loss", "labelled_loss"} < metrics.keys()
    for name in whole:
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-4, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(state, whole_state, atol=1e-5)


@pytest.mark.slow
def test_kernels_standardised_once_for_both_streams_give_what_the_network_itself_gives():
    encoder = ResNet(depth=18, width=0.0625, version=2, norm="group", weight_standardization=True, stem="small")
    vivi_method = Vivi(encoder, **{**OPTIONS, **dict(frame_loss="none", shot_loss="none", video_loss="order")})
    data = {name: batch()[name][:2].repeat(4, axis=-2).repeat(4, axis=-3) for name in ("shots", "image")}  # 32 pixels
    params, model_state, *_ = jax.jit(vivi_method.init)(jax.random.key(0), data)
    params["classifier"]["kernel"] = jax.random.normal(jax.random.key(2), params["classifier"]["kernel"].shape)
    frames, images = (data[name].astype(np.float32) / 255 for name in ("shots", "image"))
    keys = {name: jax.random.split(jax.random.key(1), len(x)) for name, x in data.items()}

    def of_method(params):
        embeddings = vivi_method.embed(params, model_state, {}, data, keys)[0]
        return (embeddings["order_logits"] ** 2).sum() + embeddings["class_logits"].sum(), embeddings

    def of_network(params, reversed_N):
        embeddings = vivi_method.network.apply({"params": params}, frames, reversed_N, images, train=True)
        return (embeddings["order_logits"] ** 2).sum() + embeddings["class_logits"].sum(), embeddings

    gradient, embeddings = jax.jit(jax.grad(of_method, has_aux=True))(params)
    plain_gradient, plain = jax.jit(jax.grad(of_network, has_aux=True))(params, embeddings["reversed"] > 0)
    for found, expected in ((embeddings, plain), (gradient, plain_gradient)):
        chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(gradient["encoder"]["stem_conv"]["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_the_total_is_the_weighted_sum():
    vivi_method = method(shot_loss="triplet", video_loss="info_nce")

    @jax.jit
    def loss_and_metrics():
        keys = {name: jax.random.split(jax.random.key(1), len(x)) for name, x in batch().items()}
        embeddings, _, _ = vivi_method.embed(*vivi_method.init(jax.random.key(0), batch())[:3], batch(), keys)
        return vivi_method.loss(embeddings, batch(), {}, 0)

    loss, _, metrics = loss_and_metrics()
    np.testing.assert_allclose(
        loss, metrics["shot_loss"] + 0.5 * metrics["video_loss"] + 2.0 * metrics["labelled_loss"], rtol=1e-6
    )
    np.testing.assert_allclose(metrics["labelled_loss"], np.log(CLASSES), rtol=1e-6)  # its classifier starts at zero


@pytest.mark.parametrize(
    "losses, head, chance",
    [
        (dict(frame_loss="rotation"), "rotation_head", {"frame_loss": np.log(4), "rotation_accuracy": 0.25}),
        (dict(video_loss="order"), "order", {"video_loss": np.log(2)}),
    ],
)
def test_a_head_of_zeros_is_at_chance(losses, head, chance):
    vivi_method = method(**losses)
    videos = {"shots": batch()["shots"]}

    @jax.jit
    def metrics_of_zeros():
        params, state, target, _ = vivi_method.init(jax.random.key(0), videos)
        params = params | {head: jax.tree.map(jnp.zeros_like, params[head])}
        keys = {"shots": jax.random.split(jax.random.key(1), VIDEOS)}
        embeddings, _, _ = vivi_method.embed(params, state, target, videos, keys)
        return vivi_method.loss(embeddings, videos, {}, 0)[2], embeddings

    metrics, embeddings = metrics_of_zeros()
    np.testing.assert_allclose([metrics[name] for name in chance], list(chance.values()), rtol=1e-5)
    if "reversed" in embeddings:
        assert set(np.unique(embeddings["reversed"])) == {0.0, 1.0}


def test_rotations_are_quarter_turns_in_order():
    images = np.random.default_rng(0).random((2, 3, 4, 4, 3), np.float32)
    turned = rotations(images)
    assert turned.shape == (2, 3, 4, 4, 4, 3)
    for turns in range(4):
        np.testing.assert_array_equal(turned[1, 2, turns], np.rot90(images[1, 2], turns))


def test_shot_order_sees_the_reversed_order():
    shots = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    head, reverse = ShotOrder(hidden=5), np.array([False, True, False, True])
    variables = head.init(jax.random.key(0), shots, reverse)
    by_hand = np.where(reverse[:, None, None], shots[:, ::-1], shots)
    np.testing.assert_allclose(
        head.apply(variables, shots, reverse), head.apply(variables, by_hand, np.zeros(4, bool)), rtol=1e-5
    )


@pytest.mark.parametrize("shots, predictions", [(2, 1), (4, 3)])
def test_a_shot_is_predicted_from_those_before_it_alone(shots, predictions):
    e = np.random.default_rng(0).normal(size=(3, shots, 5)).astype(np.float32)
    predictor = ShotPredictor(hidden=4, out=4, lstm_layers=2)
    variables = jax.jit(predictor.init)(jax.random.key(0), e)
    optim.decay_mask(variables["params"])  # has a rule for every parameter, or raises
    apply = jax.jit(predictor.apply)
    predicted, mapped = apply(variables, e)
    assert predicted.shape == (3, predictions, 4) and mapped.shape == (3, shots, 4)
    for k in range(1, shots):  # prediction k - 1 is of shot k
        changed = e.copy()
        changed[:, k:] += 1
        again, _ = apply(variables, changed)
        np.testing.assert_array_equal(again[:, :k], predicted[:, :k])
        assert (np.abs(again[:, k:] - predicted[:, k:]).max(axis=-1) > 1e-6).all()


def test_losses_without_their_data_and_data_without_losses_are_refused():
    with pytest.raises(ConfigError, match="unlabelled='none' does not go with .*shot_loss='triplet'"):
        method(shot_loss="triplet").batch_spec(8, ml_collections.ConfigDict({**DATA, "unlabelled": "none"}))
    with pytest.raises(ConfigError, match="unlabelled='videos' does not go with"):
        method().batch_spec(8, DATA)
    with pytest.raises(ConfigError, match="did you mean 'triplet'"):
        method(shot_loss="tripel")
    with pytest.raises(ConfigError, match="needs two shots"):
        ShotPredictor().init(jax.random.key(0), jnp.zeros((2, 1, 3)))


# ---- The config -----------------------------------------------------------------------------------------------------
# row: N, K, M, labelled images; learning rate, steps, boundaries (None: the paper does not say)
UNSUPERVISED = (0.8, 120_000, (90_000, 110_000))
# The baselines': [33]'s 35 epochs, decays after 15 and 25 and warm-up of 5, stretched to 120,000 steps.
STRETCHED = (0.8, 120_000, (round(120_000 * 15 / 35), round(120_000 * 25 / 35)))
NUMBERS = {
    "VIVI-Ex(4)": ((512, 4, 8, 0), UNSUPERVISED),
    "VIVI-Ex(2)": ((1024, 2, 8, 0), UNSUPERVISED),
    "VIVI-Ex-Order": ((1024, 2, 8, 0), UNSUPERVISED),
    "VIVI-Rot(4)": ((512, 4, 4, 0), UNSUPERVISED),
    "VIVI-Rot(2)": ((1024, 2, 4, 0), UNSUPERVISED),
    "Ex-YT-S": ((512, 4, 8, 0), UNSUPERVISED),
    "Ex-YT-F": ((2048, 1, 8, 0), STRETCHED),
    "Rot-YT-F": ((2048, 1, 1, 0), STRETCHED),
    "Ex-ImageNet": ((2048, 1, 8, 0), STRETCHED),
    "Rot-ImageNet": ((2048, 1, 1, 0), STRETCHED),
    "VIVI-Ex(4)-Co(10%)": ((512, 4, 8, 256), (None, 100_000, None)),
    "VIVI-Ex(4)-Co(100%)": ((512, 4, 8, 2048), (None, 100_000, None)),
    "VIVI-Ex(4)-Co(100%)-Big": ((512, 4, 8, 2048), (None, 100_000, None)),
}


@pytest.mark.parametrize("row", NUMBERS)
def test_the_papers_numbers(row):
    (videos, shots, frames, labelled), (lr, steps, boundaries) = NUMBERS[row]
    config = vivi.get_config(vivi.PAPER[row])
    spec = build(config).batch_spec
    assert spec["shots"].shape == (videos, shots, frames, 224, 224, 3)
    assert ("image" in spec and spec["image"].shape[0]) == labelled
    assert config.schedule.total_steps == steps
    assert lr is None or (config.schedule.lr, config.schedule.boundaries) == (lr, boundaries)
    if (baseline := NUMBERS[row][1] == STRETCHED) or not labelled:
        assert config.schedule.warmup_steps == (round(120_000 * 5 / 35) if baseline else 0)
    exemplar_baseline = row in ("Ex-YT-F", "Ex-ImageNet")
    assert (config.method.grey_prob, config.method.standardize) == ((0.66, True) if exemplar_baseline else (0, False))
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.encoder.norm_decay, config.encoder.norm_eps) == (0.99, 1e-5 if labelled else 1e-3)
    assert config.encoder.norm == ("group" if labelled else "batch")


@pytest.mark.parametrize("row", vivi.PAPER)
def test_every_row_of_the_paper_builds_and_has_a_demo(row):
    experiment = build(vivi.get_config(vivi.PAPER[row]))
    assert experiment.total_steps in (100_000, 120_000)
    demo = build(vivi.get_config(vivi.PAPER[row] + ",demo"))
    assert demo.total_steps == 250 and demo.batch_spec.keys() == experiment.batch_spec.keys()


@functools.cache
def abstract_losses(argument: str, demo: bool = True) -> set[str]:
    """Names of the losses of an abstract step, whose state must keep its shapes."""
    experiment = build(vivi.get_config(argument + ",demo" * demo))
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    new_state, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new_state)
    return {name for name in metrics if name.endswith("_loss")}


@pytest.mark.slow
@pytest.mark.parametrize("row", vivi.PAPER)
def test_every_row_of_the_paper_takes_an_abstract_step_at_full_size(row):
    assert abstract_losses(vivi.PAPER[row], demo=False) == abstract_losses(vivi.PAPER[row])


@pytest.mark.parametrize(
    "argument, names",
    [
        ("ex4,co=10", {"shot_loss", "video_loss", "labelled_loss"}),
        ("ex-s", {"shot_loss"}),
        ("rot-f", {"frame_loss"}),
        ("rot2", {"frame_loss", "video_loss"}),
        ("order", {"shot_loss", "video_loss"}),
        ("sup,co=100", {"labelled_loss"}),
        ("rot-images,co=100", {"frame_loss", "labelled_loss"}),
    ],
)
def test_a_row_has_its_losses(argument, names):
    assert abstract_losses(argument) == names


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["ex4,co=10", "rot4", "order", "ex-f,aa"])
def test_two_small_steps(argument, monkeypatch):
    config = vivi.get_config(f"{argument},demo")
    config.batch_size = 4
    config.encoder.width = 0.125
    if argument != "ex4,co=10":  # one row with its own encoder; the others are told apart by what follows it
        monkeypatch.setitem(ENCODERS, "tiny", TinyVideoEncoder)
        config.encoder = ml_collections.ConfigDict(dict(name="tiny", norm=config.encoder.norm))
    config.data.update(dict(image_size=32, frames=2))
    if config.data.labelled_batch_size:
        config.data.labelled_batch_size = 4
    experiment = build(config)
    rng = np.random.default_rng(0)
    small = {
        name: rng.integers(0, 256 if s.dtype == jnp.uint8 else 10, s.shape).astype(s.dtype)
        for name, s in experiment.batch_spec.items()
    }
    state = jax.jit(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))()
    step = jax.jit(experiment.train_step)
    for _ in range(2):
        state, metrics = step(state, small)
        assert all(np.isfinite(value) for value in metrics.values())
    assert int(state.step) == 2


@pytest.mark.parametrize(
    "argument, message",
    [
        ("ex4,rot4", "ex4 and rot4 exclude each other"),
        ("sup", "write sup,co=100"),
        ("ex5", "did you mean 'ex"),
        ("ex4,co=1", "unknown value of variant co '1'"),
    ],
)
def test_impossible_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        vivi.get_config(argument)


def test_autoaugment_and_hsv_go_where_the_paper_puts_them():
    colors = {
        argument: (config.color, config.labelled_color, config.hsv)
        for argument in ("ex4", "ex4,aa", "ex4,co=10", "ex4,co=100,big,aa")
        if (config := vivi.get_config(argument).method)
    }
    assert colors == {
        "ex4": ("inception", "inception", False),
        "ex4,aa": ("autoaugment", "inception", False),
        "ex4,co=10": ("inception", "inception", True),
        "ex4,co=100,big,aa": ("inception", "autoaugment", False),
    }


def test_big_is_three_times_as_wide():
    experiment = build(vivi.get_config("ex4,big"))
    assert experiment.method.network.encoder == dataclasses.replace(
        build(vivi.get_config("ex4")).method.network.encoder, width=3.0
    )
