"""The runner of the fine-tuning protocols: known means, folders that belong to one evaluation, nothing done twice."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from configs import common
from evaluation import transfer
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.methods.base import MethodState, init_network

STEPS_TIMES_RATE = 0.3 + 0.2 + 0.1  # of the schedule below


class Line(nn.Module):
    @nn.compact
    def __call__(self, x_Bx2, *, train):
        return nn.Dense(1, use_bias=False, name="encoder")(x_Bx2)


class Descent:
    """A method whose gradient is the mean of the batch: after training, weights have moved by a known sum."""

    network = Line()

    def batch_spec(self, batch_size, data):
        return {"x": jax.ShapeDtypeStruct((batch_size, 2), jnp.float32)}

    def init(self, key, batch):
        return MethodState(*init_network(self.network, key, jnp.zeros((1, 2)), train=True))

    def embed(self, params, model_state, target, batch, keys):
        return self.network.apply({"params": params}, batch["x"], train=True), model_state, target

    def loss(self, embeddings, batch, loss_state, step):
        return embeddings.mean(), loss_state, {}


def make_config(**changes) -> ml_collections.ConfigDict:
    sections = dict(
        name="descent",
        seed=1,
        repeats=2,
        batch_size=8,
        micro_batches=1,
        data={},
        schedule=dict(name="poly", total_steps=3, lr=0.3, power=1.0),
        optimizer=dict(name="sgd", weight_decay=0.0, momentum=0.0),
        run=common.run_section(log_every=1).to_dict(),
    )
    return ml_collections.ConfigDict(sections | changes)


def evaluate(workdir, *, trained: list[int], source="RUN", kernel=5.0, **changes) -> dict:
    """Batches of a repeat are its seed everywhere; `trained` gets the seeds of repeats that ask for data."""
    config = make_config(**changes)
    pretrained = {"params": {"encoder": {"kernel": np.full((2, 1), kernel, np.float32)}}}

    def repeat(seed: int) -> transfer.Repeat:
        def batches(first_step):
            trained.append(seed)
            while True:
                yield {"x": np.full((8, 2), seed, np.float32)}

        def score(variables, directory):
            assert directory == workdir / f"repeat_{seed - 1}"
            return {"weight": float(variables["params"]["encoder"]["kernel"][0, 0]), "examples": 8}

        return transfer.Repeat(seed, transfer.make_experiment(config, Descent(), 100, seed=seed), batches, score)

    return transfer.evaluate(
        config,
        transfer.numbered(config, repeat),
        pretrained,
        source=source,
        data=str(workdir),
        workdir=str(workdir),
        summary=lambda results: {"repeats_done": len(results)},
        markdown=lambda result: f"{result['weight']:.2f}\n",
    )


def test_repeats_start_from_the_weights_and_their_scores_are_averaged(tmp_path):
    trained = []
    result = evaluate(tmp_path, trained=trained)
    weights = {f"repeat_{n}": 5 - STEPS_TIMES_RATE * (n + 1) for n in range(3)}  # the gradient is the seed, n + 1
    assert {name: repeat["weight"] for name, repeat in result["repeats"].items()} == pytest.approx(
        {name: weights[name] for name in ("repeat_0", "repeat_1")}, abs=1e-5
    )
    assert result["weight"] == pytest.approx(5 - 1.5 * STEPS_TIMES_RATE, abs=1e-5)
    assert result["repeats"]["repeat_1"] | {"weight": 0} == {"weight": 0, "examples": 8, "seed": 2, "steps": 3}
    assert {
        "config": "descent",
        "checkpoint": "RUN",
        "data": str(tmp_path),
        "repeats_done": 2,
    }.items() <= result.items()
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "result.md").read_text() == f"{result['weight']:.2f}\n"

    assert trained == [1, 2]
    assert evaluate(tmp_path, trained=trained) == result and trained == [1, 2]  # nothing is done twice
    (tmp_path / "repeat_1" / "result.json").unlink()  # killed between training and score: it is only scored
    assert evaluate(tmp_path, trained=trained) == result and trained == [1, 2]
    more = evaluate(tmp_path, trained=trained, repeats=3)
    assert trained == [1, 2, 3] and more["repeats"]["repeat_2"]["weight"] == pytest.approx(
        weights["repeat_2"], abs=1e-5
    )


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    evaluate(tmp_path, trained=[], repeats=1)
    for changes, message in (
        (dict(source="OTHER"), "checkpoint: 'RUN' there, 'OTHER' here"),
        (dict(seed=2), "config.seed: 1 there, 2 here"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(tmp_path, trained=[], repeats=1, **changes)
    evaluate(tmp_path, trained=[], repeats=1, run=common.run_section(log_every=2).to_dict())  # changes no result


def test_what_cannot_work_is_refused_before_the_folder_exists(tmp_path):
    with pytest.raises(ConfigError, match="8 rows of 'x' in a batch do not divide over 8 device"):
        evaluate(tmp_path / "w", trained=[], micro_batches=3)
    with pytest.raises(ConfigError, match="exactly one of total_steps, epochs, examples"):
        evaluate(tmp_path / "w", trained=[], schedule=dict(name="poly", lr=0.3, power=1.0))
    assert not (tmp_path / "w").exists()


def test_weights_of_another_shape_are_named():
    params = {"encoder": {"kernel": np.zeros((2, 1))}, "head": {"kernel": np.zeros(3)}}
    given = {"params": {"encoder": {"kernel": np.ones((2, 1)), "classifier": np.ones(9)}, "projector": {}}}
    loaded, _ = transfer.with_pretrained(params, {}, given)
    assert loaded["encoder"]["kernel"].all() and not loaded["head"]["kernel"].any()
    assert set(loaded) == set(params) and set(loaded["encoder"]) == {"kernel"}
    wrong = {"params": {"encoder": {"kernel": np.ones((3, 1))}}}
    with pytest.raises(
        CheckpointError, match=r"params\['encoder'\]\['kernel'\] has the shape \(2, 1\) here and \(3, 1\)"
    ):
        transfer.with_pretrained(params, {}, wrong)
