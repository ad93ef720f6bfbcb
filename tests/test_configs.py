"""Every config loads and builds; misspelt keys, values and variants are refused with the nearest valid name.

Every expanded config is also kept as text in testdata/configs, so that a changed number shows in a diff;
`UPDATE_GOLDEN=1 pytest tests/test_configs.py` writes these files anew.
"""

import functools
import importlib
import itertools
import os
import pathlib

import jax
import pytest

from configs import action, common, detection, segmentation, vdim, vito, vivi
from helpers.commands import assert_one_line_error, run_module
from helpers.networks import count
from vivi_jax.build import build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.train_step import create

DATA_VARIANTS = ["images", "moclr,images", "sampler=fixed_delay", "sampler=uniform_chunks", "crop=0.08", "clip=1.28"]
MODEL_VARIANTS = ["", "moclr", "views=3", "scales=2,pooling=average", "scales=1,pooling=attention", "encoder=swin_t"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "testdata" / "configs"
GOLDEN_ARGUMENTS = {
    "action": action.VARIANTS,
    "detection": detection.VARIANTS,
    "segmentation": segmentation.VARIANTS,
    "moco_v3": ("", "video"),
    "vdim": ("", "own", "data=kinetics600"),
    "vito": ("", "own", "moclr", "encoder=swin_t", "encoder=swin_s"),
    "vivi": ("", "own", *vivi.PAPER.values()),
    "vtab": ("",),
}
GOLDEN_TEXTS = {
    "-".join([module, *filter(None, argument.replace("=", "").split(","))]): (module, argument)
    for module, arguments in GOLDEN_ARGUMENTS.items()
    for argument in arguments
}


def as_text(section: dict, prefix: str = "") -> str:
    """Nested dict -> a line `dotted.key = repr(value)` for each of its values, sorted by key."""
    return "".join(
        as_text(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} = {value!r}\n"
        for key, value in sorted(section.items())
    )


@pytest.mark.parametrize("name", GOLDEN_TEXTS)
def test_the_expanded_config_is_the_text_on_record(name):
    module, argument = GOLDEN_TEXTS[name]
    text = as_text(importlib.import_module(f"configs.{module}").get_config(argument).to_dict())
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "if the change is meant: UPDATE_GOLDEN=1 pytest tests/test_configs.py"


def test_every_config_file_has_a_text_on_record_and_every_text_a_config():
    modules = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert modules == set(GOLDEN_ARGUMENTS)
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(GOLDEN_TEXTS)


@pytest.mark.parametrize("variant", DATA_VARIANTS + MODEL_VARIANTS)
def test_every_variant_builds(variant):
    assert build(vito.get_config(variant)).total_steps == 93835
    assert build(vito.get_config(f"demo,{variant}".strip(","))).total_steps == 300


@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_every_model_takes_an_abstract_step(variant):
    experiment = build(vito.get_config(f"demo,{variant}".strip(",")))
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    new_state, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new_state)


def test_the_papers_config_has_the_papers_sizes():
    experiment = build(vito.get_config())
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    assert experiment.total_steps == 93835
    assert experiment.batch_spec["views"].shape == (4096, 3, 224, 224, 3)
    assert count(state.params["encoder"]) == 25_557_032 - 2048 * 1000 - 1000  # torchvision's, without its classifier
    assert count(state.params["pool"]) == (1024 * 512 + 512 + 512 + 1) + (2048 * 512 + 512 + 512 + 1)
    assert count(state.params["projector"]) == 3072 * 4096 + 4096 + 2 * 4096 + 4096 * 256


@pytest.mark.slow
def test_the_papers_step_compiles_for_eight_devices():
    config = vito.get_config()
    experiment = build(config)
    mesh = sharding.make_mesh(jax.devices())
    replicated, over_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    step = jax.jit(
        experiment.train_step,
        donate_argnums=0,
        in_shardings=(replicated, over_batch),
        out_shardings=(replicated, replicated),
    )
    compiled = step.lower(state, experiment.batch_spec).compile()
    per_device = compiled.memory_analysis().argument_size_in_bytes
    images, parameters = 4096 // 8 * 3 * 224 * 224 * 3, 4 * count((state.params, state.target, state.opt_state))
    assert images + parameters <= per_device < 1.01 * (images + parameters)  # state whole, batch split in eight


def test_unknown_variants_and_values_suggest_the_nearest():
    with pytest.raises(ValueError, match="unknown variant 'dmeo'; did you mean 'demo'"):
        vito.get_config("dmeo")
    with pytest.raises(ValueError, match="unknown value of variant pooling 'atention'; did you mean 'attention'"):
        vito.get_config("pooling=atention")
    found = common.parse_argument("a=2,y", one_of=("x", "y"), a=("1", "2"), b=("no", "yes"))
    assert found == {"a": "2", "b": None, "variant": "y"}


NO_YES = ("no", "yes")
# Config file -> its words: a name and the values it may have, or a word that stands alone.
WORDS = {
    "vito": dict(
        demo=NO_YES,
        own=NO_YES,
        moclr=NO_YES,
        images=NO_YES,
        scales=("2", "1"),
        pooling=("attention", "average"),
        sampler=("marginal", "fixed_delay", "uniform_chunks"),
        crop=("0.4", "0.08"),
        clip=("2.56", "1.28", "3.2"),
        views=("3", "2"),
    ),
    "vdim": dict(
        data=("ucf101", "kinetics600"),
        layers=("568", "68", "8"),
        color=("jitter", "lab"),
        rotate=NO_YES,
        offset=("0", "32"),
        difference=NO_YES,
        down=("2", "1", "3"),
        own=NO_YES,
        demo=NO_YES,
    ),
    "moco_v3": dict(demo=NO_YES, video=NO_YES),
    "vivi": dict.fromkeys(vivi.MODELS) | dict(co=("10", "100", "no"), big=NO_YES, aa=NO_YES, own=NO_YES, demo=NO_YES),
    "action": dict.fromkeys(action.VARIANTS),
    "detection": dict.fromkeys(detection.VARIANTS) | dict(demo=NO_YES),
    "segmentation": dict.fromkeys(segmentation.VARIANTS) | dict(demo=("yes",)),
    "vtab": dict(demo=NO_YES),
}


@functools.cache
def expanded(module: str, words: frozenset[tuple[str, str | None]]) -> str | None:
    """The config of some words without what only its name says; None if they are refused, in one line."""
    argument = ",".join(name if value is None else f"{name}={value}" for name, value in sorted(words))
    try:
        config = importlib.import_module(f"configs.{module}").get_config(argument).to_dict()
    except ValueError as error:
        assert "\n" not in str(error)
        return None
    if module not in ("segmentation", "action"):  # whose name is that of the data set
        config.pop("name", None)
    return as_text(config)


def test_every_config_file_has_its_words_here():
    assert set(WORDS) == set(GOLDEN_ARGUMENTS)


@pytest.mark.parametrize("module", WORDS)
def test_each_word_of_every_pair_is_obeyed_or_refused(module):
    """Another value of either word would give another config: none is overruled by the other, nor by itself."""
    words = [(name, value) for name, values in WORDS[module].items() for value in values or (None,)]
    pairs = [pair for pair in itertools.combinations(words, 2) if pair[0][0] != pair[1][0]]
    pairs = [frozenset(pair) for pair in pairs] + [frozenset([word]) for word in words]
    accepted = [pair for pair in pairs if expanded(module, pair) is not None]
    assert accepted
    for pair in accepted:
        for name, value in pair:
            kind = [word for word in words if (word[0] == name if value else word[1] is None)]
            for other in set(kind) - {(name, value)}:
                assert expanded(module, pair - {(name, value)} | {other}) != expanded(module, pair), (pair, other)


@pytest.mark.parametrize(
    "module, argument, message",
    [
        ("vito", "moclr,crop=0.4", "crop=0.4 has no effect beside moclr"),
        ("vito", "images,crop=0.4", "crop=0.4 has no effect beside images"),
        ("vito", "moclr,scales=2", "scales=2 has no effect beside moclr"),
        ("vito", "pooling=attention,moclr", "pooling=attention has no effect beside moclr"),
        ("vito", "images,sampler=marginal", "sampler=marginal has no effect beside images"),
        ("vito", "demo,images,clip=1.28", "clip=1.28 has no effect beside demo,images"),
        ("moco_v3", "demo,video", "video=yes has no effect beside demo"),
        ("vdim", "demo,data=kinetics600", "data=kinetics600 has no effect beside demo"),
        ("vito", "crop=0.4,crop=0.08", "crop is given twice"),
        ("vivi", "ex4,ex4", "ex4 is given twice"),
        ("detection", "coco,lvis", "coco and lvis exclude each other"),
        ("detection", "demo", "give one variant of coco, lvis, retinanet, not 'demo'"),
        ("action", "ucf101_vdim,demo", "ucf101_vdim and demo exclude each other"),
    ],
)
def test_words_without_effect_are_refused_by_name(module, argument, message):
    with pytest.raises(ValueError, match=message) as error:
        importlib.import_module(f"configs.{module}").get_config(argument)
    assert "\n" not in str(error.value)


def test_a_name_alone_means_yes_and_beats_what_another_word_would_set():
    assert vdim.get_config("data=kinetics600,difference").data.difference
    assert not vdim.get_config("data=kinetics600").data.difference
    assert vito.get_config("demo").data.views == 2 and vito.get_config("demo,views=3").data.views == 3


@pytest.mark.parametrize(
    "section, key", [("encoder", "dept"), ("method", "temprature"), ("optimizer", "momentun"), ("schedule", "epoch")]
)
def test_a_key_no_function_takes_is_an_error_with_its_section(section, key):
    config = vito.get_config("demo")
    config[section][key] = 1
    with pytest.raises(ConfigError, match=f"config.{section}: .*{key}"):
        build(config)


def test_impossible_values_are_refused():
    for section, key, value, message in [
        ("encoder", "depth", 51, "depth=51"),
        ("method", "pooling", "max", "pooling"),
        ("schedule", "epochs", 0.0, "less than one batch"),
        ("optimizer", "name", "lasr", "did you mean 'lars'"),
        ("encoder", "name", "resnext", "did you mean 'resnet'"),
    ]:
        config = vito.get_config("demo")
        config[section][key] = value
        with pytest.raises(ConfigError, match=message):
            experiment = build(config)
            jax.eval_shape(
                lambda experiment=experiment: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0)
            )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/vito.py:demo", "--config.data.path=/nonexistent/store"], "/nonexistent/store"),
        *[
            pytest.param(flags, message, marks=pytest.mark.slow)
            for flags, message in (  # each is a process of its own
                (["--config=configs/vito.py:demo", "--config.data.image_sise=32"], "image_size"),
                (["--config=configs/vito.py:dem"], "did you mean 'demo'"),
                (["--config=configs/vito.py:demo", "--config.batch_size=many"], "batch_size"),
                (["--config=configs/vitto.py"], "vitto.py"),
                ([], "--config is missing"),
                (["--config=configs/vito.py:demo", "--config.optimizer.momentum=0.9"], "momentum"),
            )
        ],
    ],
)
def test_the_command_line_answers_mistakes_with_one_line(tmp_path, flags, message):
    assert_one_line_error(run_module("vivi_jax.main", f"--workdir={tmp_path / 'run'}", *flags), message)
    assert not (tmp_path / "run").exists()
