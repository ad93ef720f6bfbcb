"""config.init_from: what a run takes from weights, what it refuses, and that it does so once."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from configs import vito
from helpers.frame_stores import jpeg, write_store
from helpers.networks import TinyEncoder
from helpers.runs import write_run
from vivi_jax import checkpoint, main, optim
from vivi_jax.build import build
from vivi_jax.config import without_name
from vivi_jax.errors import ConfigError
from vivi_jax.export.formats import npz
from vivi_jax.export.initial import check_same_encoder, initial_state
from vivi_jax.methods import METHODS
from vivi_jax.methods.base import MethodState, init_network
from vivi_jax.models import ENCODERS, build_encoder
from vivi_jax.models.base import Encoder
from vivi_jax.train_step import create


class Squares:
    """A method without augmentation, heads and target, whose step compiles at once: the mean square of the features."""

    class Network(nn.Module):
        encoder: nn.Module

        def __call__(self, images, train):
            return self.encoder(images, train=train)[0]

    def __init__(self, encoder: Encoder):
        self.network = self.Network(encoder)

    def batch_spec(self, batch_size, data):
        shape = (batch_size, data.views, data.image_size, data.image_size, 3)
        return {"views": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(self, key, batch):
        return MethodState(*init_network(self.network, key, jnp.zeros((1, *batch["views"].shape[2:]))))

    def embed(self, params, model_state, target, batch, keys):
        images = batch["views"][:, 0].astype(jnp.float32) / 255
        found, model_state = self.network.apply(
            {"params": params, **model_state}, images, train=True, mutable=["batch_stats"]
        )
        return found, model_state, target

    def loss(self, embeddings, batch, loss_state, step):
        return jnp.mean(embeddings**2), loss_state, {}


@pytest.fixture(scope="module", autouse=True)
def additions():
    """An encoder and a method, added as docs/extending.md says."""
    ENCODERS["tiny"], METHODS["squares"] = TinyEncoder, Squares
    yield
    del ENCODERS["tiny"], METHODS["squares"]


def small(**encoder):
    """A VITO of few channels, by default on the tiny encoder: steps of 8 examples, 4 of them."""
    config = vito.get_config("demo")
    config.encoder.unlock()
    config.encoder = encoder or {"name": "tiny", "dtype": "float32"}
    config.batch_size = 8
    config.data.image_size = 16
    config.method.update(projector_hidden=16, projector_out=8, attention_hidden=8)
    config.schedule.update(examples_per_epoch=8, epochs=4.0, warmup_epochs=1.0)
    config.run.update(log_every=1, checkpoint_every=2)
    return config


def fresh_of(config):
    experiment = build(config)
    return jax.jit(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 5))()


def initial(config, source, fresh, method="vito"):
    state, about = initial_state(str(source), build(config), method=method, seed=5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    return state, about


def equal(one, other) -> bool:
    return checkpoint.state_sha256(one) == checkpoint.state_sha256(other)


def assert_target_is_a_copy(state):
    assert equal(state.target, {"params": state.params, "model_state": state.model_state})
    pairs = zip(jax.tree.leaves(state.target["params"]), jax.tree.leaves(state.params), strict=True)
    assert not any(np.shares_memory(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run at step 7, with random weights in all its arrays."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", small())


@pytest.fixture(scope="module")
def fresh():
    return fresh_of(small())


def test_a_run_of_the_same_method_gives_all_its_parts_and_no_progress(run, fresh):
    state, about = initial(small(), run, fresh)
    there = checkpoint.load_state(run)
    assert equal(state.params, there["params"]) and equal(state.model_state, there["model_state"])
    assert not equal(fresh.params, there["params"]) and not equal(there["target"]["params"], there["params"])
    assert_target_is_a_copy(state)
    assert state.step == 0 and equal(state.opt_state, fresh.opt_state)
    assert (about["step"], about["taken"], about["random"]) == (7, ["encoder", "pool", "projector"], [])


def test_heads_of_other_sizes_or_of_another_method_are_random(run, fresh):
    there = checkpoint.load_state(run)["params"]
    wide = small()
    wide.method.projector_hidden = 32
    for config, new, method, taken in (
        (wide, fresh_of(wide), "vito", ["encoder", "pool"]),
        (small(), fresh, "moco_v3", ["encoder"]),
    ):
        state, about = initial(config, run, new, method)
        assert about["taken"] == taken and about["random"] == sorted(there.keys() - set(taken))
        for part in there:
            assert equal(state.params[part], (there if part in taken else new.params)[part])
        assert_target_is_a_copy(state)


def test_a_file_gives_the_encoder_without_its_classifier(tmp_path):
    kwargs: dict[str, Any] = dict(name="vit", patch=8, width=8, depth=1, heads=1)
    encoder, rng = build_encoder(**kwargs, num_classes=3), np.random.default_rng(1)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in npz.expected(encoder).items()}
    npz.write(encoder, arrays, tmp_path / "a.npz")
    config = small(**kwargs)
    config.method.stages = ("block1",)
    fresh = fresh_of(config)
    state, about = initial(config, tmp_path / "a.npz", fresh)
    params = unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})["params"]
    assert params.pop("classifier")
    assert equal(state.params, fresh.params | {"encoder": params}) and not equal(fresh.params["encoder"], params)
    assert_target_is_a_copy(state)
    assert (about["step"], about["taken"], about["random"]) == (None, ["encoder"], ["pool", "projector"])

    config.encoder.update(depth=2, width=16)
    config.method.stages = ("block2",)
    with pytest.raises(
        ConfigError,
        match=r"^config.init_from=.*a.npz: .* config.encoder.depth is 1 there, 2 here; "
        r"config.encoder.width is 8 there, 16 here$",
    ):
        initial(config, tmp_path / "a.npz", fresh)


def test_what_only_training_needs_may_differ():
    there = build_encoder("resnet", num_classes=3, dtype="float32")
    check_same_encoder(build_encoder("resnet", dtype="bfloat16", remat=True, last_scale=0.0, bn_groups=4), there)
    with pytest.raises(ConfigError, match=r"config.encoder.input_mean is \(0.4.*\) there, \(0.5, 0.5, 0.5\) here$"):
        check_same_encoder(build_encoder("resnet", input_mean=(0.5, 0.5, 0.5)), there)
    with pytest.raises(ConfigError, match="config.encoder.name is 'resnet' there, 'vit' here$"):
        check_same_encoder(build_encoder("vit"), there)


def test_what_is_no_weights_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("weights")
    shutil.copytree(run, tmp_path / "begun", ignore=lambda *_: ["checkpoints"])
    shutil.copytree(run, tmp_path / "damaged")
    next((tmp_path / "damaged" / "checkpoints" / "7").rglob("d/*")).write_bytes(b"")
    looked_for = (
        r"neither a file of weights \(.safetensors, .npz, .pth, .* nor a run directory \(a folder with config.json"
    )
    for name, message in (
        ("absent", looked_for),
        ("empty", looked_for),
        ("text.safetensors", "text.safetensors"),
        ("begun", "no checkpoint"),
        ("damaged", "no checkpoint|bytes, not"),
    ):
        with pytest.raises(ConfigError, match=f"^config.init_from={tmp_path / name}: .*({message})") as refused:
            initial_state(str(tmp_path / name), build(small()), method="vito", seed=0)
        assert "\n" not in str(refused.value)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Eight videos of three seconds."""
    directory = tmp_path_factory.mktemp("stores") / "store"
    pictures = [jpeg(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(8 * 30)]
    write_store(directory, [dict(frames=30, fps=10.0, height=16, width=16)] * 8, pictures)
    return str(directory)


def test_a_run_starts_from_weights_once_and_is_trained_longer(run, store, tmp_path):
    config, workdir = small(), tmp_path / "run"
    config.method.unlock()
    config.method, config.ema = {"name": "squares"}, {"name": "none"}
    config.data.path, config.init_from = store, str(tmp_path / "source")
    with pytest.raises(ConfigError, match="config.init_from=.*source: there is neither"):
        main.run(config, str(workdir))
    assert not workdir.exists()
    shutil.copytree(run, tmp_path / "source")
    config.schedule.base_lr = 1e-30
    config.optimizer.weight_decay = 0.0
    main.run(config, str(workdir))
    weights = checkpoint.load_state(run)["params"]["encoder"]
    state = checkpoint.load_state(workdir)
    assert state["step"] == 4 and equal(state["params"]["encoder"], weights)  # at so low a rate
    about = json.loads((workdir / "init_from.json").read_text())
    assert (
        about["init_from"] == str(tmp_path / "source") == json.loads((workdir / "config.json").read_text())["init_from"]
    )
    assert about["step"] == 7

    shutil.rmtree(tmp_path / "source")  # not needed any more
    config.schedule.epochs, config.schedule.base_lr = 6.0, 0.01
    with pytest.raises(ConfigError, match=r"schedule.epochs: 4.0 there, 6.0 here\); .* by --may_change=schedule$"):
        main.run(config, str(workdir))
    main.run(config, str(workdir), may_change=("schedule",))
    logged = lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    rate, _ = optim.cosine(8, **without_name(config.schedule))
    np.testing.assert_allclose([line["learning_rate"] for line in logged[4:]], np.array([rate(4), rate(5)]), rtol=1e-6)
    assert checkpoint.steps(workdir / "checkpoints") == [2, 4, 6]
    assert [line["step"] for line in lines(workdir / "config_changes.jsonl")] == [4]
    assert json.loads((workdir / "summary.json").read_text())["step"] == 6

    config.init_from = ""
    with pytest.raises(ConfigError, match="--may_change=init_from: .* is at step 6, .* before the first"):
        main.run(config, str(workdir), may_change=("init_from",))
