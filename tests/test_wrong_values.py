"""Every value of every config is checked: a wrong one gets one line that names it; none a traceback, none is accepted.

Each key of each config is given wrong values by its type (another type, negative, 0, NaN, infinity, beyond its range,
an unknown name) and a misspelt name. A value passes where a run would begin: the config is built, its data are opened,
and the step is traced where nothing has refused it so far. LEGAL names the values among them that mean something.
"""

import math
import re

import jax
import ml_collections
import numpy as np
import pytest

from configs import action, detection, moco_v3, segmentation, vdim, vito, vivi, vtab
from evaluation import encoders, transfer
from evaluation.protocols import sweep
from evaluation.protocols.action import evaluate as action_evaluate
from evaluation.protocols.detection import evaluate as detection_evaluate
from evaluation.protocols.segmentation import evaluate as segmentation_evaluate
from evaluation.protocols.vtab.sweep import KEYS as VTAB_KEYS
from helpers.frame_stores import jpeg, write_store
from vivi_jax import main
from vivi_jax.buckets.runs import RunFolder
from vivi_jax.build import build
from vivi_jax.config import check, fits
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.train_step import create

PRETRAINING = {
    "vito:demo": lambda: vito.get_config("demo"),
    "vito:demo,encoder=swin_t": lambda: vito.get_config("demo,encoder=swin_t"),
    "vito:demo,images": lambda: vito.get_config("demo,images"),
    "vivi:ex4,co=100,demo": lambda: vivi.get_config("ex4,co=100,demo"),
    "vivi:rot-f,demo": lambda: vivi.get_config("rot-f,demo"),
    "vdim:demo": lambda: vdim.get_config("demo"),
    "moco_v3:demo": lambda: moco_v3.get_config("demo"),
}
PROTOCOLS = {
    "segmentation:voc,demo": lambda: segmentation.get_config("voc,demo"),
    "detection:coco,demo": lambda: detection.get_config("coco,demo"),
    "detection:retinanet,demo": lambda: detection.get_config("retinanet,demo"),
    "action:demo": lambda: action.get_config("demo"),
    "action:ucf101_vito": lambda: action.get_config("ucf101_vito"),
    "vtab:demo": lambda: vtab.get_config("demo"),
}
INFINITE = (math.nan, math.inf, -math.inf)
WRONG = {
    bool: (None, "maybe", 3, math.nan),
    int: ("text", None, True, 2.5, -1, 0, *INFINITE),
    float: ("text", None, True, -1.0, 0.0, 1.5, *INFINITE),
    str: (None, 5, "no such name"),
    tuple: ("text", None, 5, (), ("text", None), (-1, 2), (0, 0), INFINITE),
    type(None): ("text", True, -1, 0, *INFINITE),
}
# "CONFIG KEY" as regular expressions, their values among the above that are no mistakes, and why.
LEGAL = [
    (r".* (name|run\.compilation_cache|run\.wandb)", ("no such name",), "any text, or a folder that is made"),
    (r".* data\.(train|test)_(annotations|images)", ("no such name",), "files of --data, which are looked for later"),
    (r".* (seed|pictures)", (0,), "the first, or none"),
    (r".* run\.(eval_every|watchdog_seconds|profile)", (0, 0.0), "never"),
    (r".* data\.(delay_seconds|min_shot_seconds)", (0.0,), "no time between, or all shots"),
    (r".*(action|vdim).* (data\.offset|method\.hidden)", (0,), "no offset, or a linear classifier"),
    (r".* optimizer\.frozen_epochs", (0.0, 1.5), "none, or some"),
    (r".*(_seconds|fps|frame_rate)", (1.5,), "a time or rate"),
    (r"action.* (data\.fps|method\.phi_dim)", (None,), "every frame; no phi"),
    (r".*(lr|temperature|width|cells_per_side|huber|norm_eps|clip_score|triplet_margin|power)", (1.5,), "no share"),
    (r".*(weight_decay|lambda_video|gamma|box_weight|score_penalty)", (0.0, 1.5), "a weight; 0: without"),
    (r".* sweep\.weight_decay", ((0, 0),), "no decay"),
    (r".*(b1|b2|momentum|norm_decay|stochastic_depth|base|dropout|alpha)", (0.0,), "without an average, or noise"),
    (r".*(flip_prob|grey_prob|min_score|max_overlap|max_missing|negative|positive)", (0.0,), "never, or none"),
    (r".*(triplet_margin|power)", (0.0,), "none"),
    (r".* encoder\.last_scale", (-1.0, 1.5), "any scale is a start"),
    (r".*(boundaries|decay_at)", ((),), "a constant rate"),
    (r".*warmup_(steps|epochs)", (0, 0.0, 1.5), "no warm-up, or a short one"),
    (r".*(segmentation|action).* schedule\.epochs", (1.5,), "a short run"),
]


def flat(section, prefix: str = "") -> dict:
    """{dotted key: value} of a config."""
    found = {}
    for key in section:
        value = section[key]
        if isinstance(value, ml_collections.ConfigDict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def changed(config: ml_collections.ConfigDict, key: str, value) -> ml_collections.ConfigDict:
    """The config with one value, of whatever type, in its place."""
    contents = config.copy_and_resolve_references().to_dict()
    section = contents
    *path, last = key.split(".")
    for name in path:
        section = section[name]
    section[last] = value
    return ml_collections.ConfigDict(contents)


def same(a, b) -> bool:
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def wrong_values(config: ml_collections.ConfigDict) -> list[tuple[str, object]]:
    """(key, wrong value) of each key; a misspelt key has the value that the right one has."""
    cases = []
    for key, value in flat(config).items():
        cases += [(key, wrong) for wrong in WRONG[type(value)] if not same(wrong, value)]
        cases.append((f"{key}x", value))
    return cases


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Ninety-six labelled videos of ten classes, each of four shots of three seconds: enough for every demo."""
    directory = tmp_path_factory.mktemp("wrong") / "store"
    picture = jpeg(np.zeros((16, 16, 3), np.uint8))
    video = dict(frames=48, fps=4.0, height=16, width=16, shot_starts=[0, 12, 24, 36])
    videos = [video | dict(label=number % 10) for number in range(96)]
    write_store(directory, videos, [picture] * (48 * len(videos)), tuple("abcdefghij"))
    return str(directory)


def start(config, store: str, *, whole: bool = True) -> None:
    """What a run does before its first step, without compiling anything; not `whole`: before it opens its data."""
    for key in ("path", "labelled_path"):
        if config.data.get(key) == "":
            config.data[key] = store
    main.check_sections(config)
    experiment = build(config)
    mesh = sharding.make_mesh(jax.devices()[:1], config.run.fsdp)
    sharding.check_batch_sizes(experiment.batch_spec, config.micro_batches, mesh)
    if whole:
        main.open_data(config)
        main.online_evaluation(config, experiment.method)
        main.weights_to_start_from(config, experiment, RunFolder("no run yet"))
        state = jax.eval_shape(
            lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, config.seed)
        )
        jax.eval_shape(experiment.train_step, state, experiment.batch_spec)


def start_protocol(name: str, config, *, whole: bool = True) -> None:
    """What a fine-tuning from random weights does before it reads data; and, if `whole`, its step."""
    if name.startswith("vtab"):
        check("", VTAB_KEYS, config)
        encoders.load_encoder("none", random=config.encoder)
        return
    check("sweep", sweep.KEYS, config.sweep)
    del config["sweep"]  # as sweep.evaluate does
    of = {"segmentation": segmentation_evaluate, "detection": detection_evaluate, "action": action_evaluate}
    protocol = of[name.partition(":")[0]]
    protocol.check_config(config)
    if not whole:
        return
    load = transfer.load_pretrained if protocol is segmentation_evaluate else protocol.load_pretrained
    encoder, *phi_dim, _ = load("none", config)
    method = protocol.make_method(config, encoder, 5, *phi_dim)
    make = action_evaluate.make_experiment if protocol is action_evaluate else transfer.make_experiment
    experiment = make(config, method, 500, seed=config.seed)
    state = jax.eval_shape(lambda: create(method, experiment.optimizer, experiment.batch_spec, config.seed))
    jax.eval_shape(experiment.train_step, state, experiment.batch_spec)


def sampled(names, quick: str) -> list:
    """All names, the others than `quick` in the slow tests."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def verdict(name: str, key: str, value, begin) -> str | None:
    """What is wrong with how a case ends; None: it is legal, or refused in one line that names the key or the value.

    Args:
      begin: whole -> starts the run; a legal value is taken no further than to its data.
    """
    legal = any(
        re.fullmatch(pattern, f"{name} {key}") and any(same(good, value) for good in values)
        for pattern, values, _ in LEGAL
    )
    try:
        begin(whole=not legal)
    except (ConfigError, DataError) as error:
        text = str(error)
        fine = (key.rsplit(".", 1)[-1] in text or str(value) in text) and "\n" not in text
        return None if fine and not legal else f"{key}={value!r}, {'legal' if legal else 'wrong'}: {text}"
    except Exception as error:
        return f"{key}={value!r}: {type(error).__name__}: {str(error)[:200]}"
    return None if legal else f"{key}={value!r}: accepted"


@pytest.mark.parametrize("name", sampled(PRETRAINING, "vito:demo"))
def test_pretraining(name, store):
    config = PRETRAINING[name]()
    start(config.copy_and_resolve_references(), store)  # as it is, it begins
    cases = wrong_values(config)
    found = [
        verdict(name, key, value, lambda whole: start(changed(config, key, value), store, whole=whole))  # noqa: B023
        for key, value in cases
    ]
    assert len(cases) > 300 and not [line for line in found if line], "\n".join(filter(None, found))


@pytest.mark.parametrize("name", sampled(PROTOCOLS, "vtab:demo"))
def test_protocols(name):
    config = PROTOCOLS[name]()
    start_protocol(name, changed(config, "seed", 0))
    cases = wrong_values(config)
    found = [
        verdict(name, key, value, lambda whole: start_protocol(name, changed(config, key, value), whole=whole))  # noqa: B023
        for key, value in cases
    ]
    assert len(cases) > 100 and not [line for line in found if line], "\n".join(filter(None, found))


def test_a_number_too_large_for_a_float_is_refused_and_no_traceback():
    assert [fits(value, kind) for kind in (int, float) for value in (10**400, -(10**400), 10**300)] == [
        False,
        False,
        True,
    ] * 2
