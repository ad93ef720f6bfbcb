"""From config.data to batches: every variant of every config is read whole, and a key that nobody reads is an error."""

import math
import os
import shutil
import unicodedata

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import vdim, vito, vivi
from helpers.commands import assert_one_line_error, run_module
from helpers.frame_stores import jpeg, write_store
from helpers.runs import small_vito
from input_pipeline.store import META
from input_pipeline.streams import sources
from input_pipeline.streams.order import Order
from vivi_jax.build import build
from vivi_jax.errors import ConfigError, DataError

# One variant of each source, and for "shots" of each kind of unlabelled data, with and without labelled images.
VARIANTS = {
    "video": (vito, "demo"),
    "video, one frame": (vito, "moclr,demo"),
    "images": (vito, "moclr,images,demo"),
    "windows": (vdim, "rotate,demo"),
    "shots": (vivi, "ex2,demo"),
    "shots, one frame": (vivi, "rot-f,demo"),
    "shots and labels": (vivi, "ex2,co=10,demo"),
    "images as shots": (vivi, "ex-images,demo"),
    "images as shots and labels": (vivi, "rot-images,co=100,demo"),
    "labels": (vivi, "sup,co=100,demo"),
}
CLASSES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """A store of eight videos of two shots, and a folder of ten classes of labelled images."""
    root = tmp_path_factory.mktemp("data")
    videos = [dict(frames=80, fps=10, height=24, width=32, shot_starts=[0, 40])] * 8
    write_store(
        root / "store", videos, [jpeg(np.full((24, 32, 3), 3 * k, np.uint8)) for _ in videos for k in range(80)]
    )
    for k in range(CLASSES):
        (root / "images" / f"class{k}").mkdir(parents=True)
        for i in range(4):
            (root / "images" / f"class{k}" / f"{i}.jpg").write_bytes(jpeg(np.full((24, 32, 3), 20 * k, np.uint8)))
    return {"store": str(root / "store"), "images": str(root / "images")}


def config_of(variant: str, data: dict[str, str]) -> ConfigDict:
    module, argument = VARIANTS[variant]
    config = module.get_config(argument)
    config.batch_size, config.data.image_size = 4, 16
    if "images" in (config.data.source, config.data.get("unlabelled")):
        config.data.path = data["images"]
    elif config.data.get("unlabelled") != "none":
        config.data.path = data["store"]
    if config.data.get("labelled_batch_size"):
        config.data.update(dict(labelled_batch_size=6, labelled_path=data["images"], labelled_fraction=1.0))
    return config


def open_stream(config: ConfigDict) -> sources.Batches:
    return sources.open_stream(
        config.data, Order(config.seed, config.batch_size), num_classes=config.method.get("num_classes")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_what_the_method_expects(data, variant):
    config = config_of(variant, data)
    expected = {name: (spec.shape, spec.dtype) for name, spec in build(config).batch_spec.items()}
    batch = next(open_stream(config)(3))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected


def refused(config: ConfigDict, *words: str) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        open_stream(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_key_that_the_source_does_not_read_is_refused(data, variant):
    """Of each source in turn: a misspelt key, and every key that only other sources have."""
    keys = {key: value for other in VARIANTS for key, value in config_of(other, data).data.items()}
    own = config_of(variant, data).data.keys()
    for key, value in (
        {"image_sise": 16, "labelled_fractoin": 1.0} | {key: keys[key] for key in keys.keys() - own}
    ).items():
        config = config_of(variant, data)
        config.data[key] = value
        refused(config, "config.data", key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nonsense_value_of_any_key_is_refused(data, variant):
    """So that every key is read, and looked at: negative numbers, and words that mean nothing."""
    for key, value in config_of(variant, data).data.items():
        if isinstance(value, bool) or key.endswith("path"):
            continue
        config = config_of(variant, data)
        config.data[key] = "nonsense" if isinstance(value, str) else type(value)(-5)
        refused(config, key.removeprefix("labelled_"))  # "labelled_fraction" is the "fraction" of the labelled images
    config = config_of(variant, data)
    config.data.sampler = "nonsense"
    refused(config, "sampler", "config.data" if "sampler" not in config_of(variant, data).data else "nonsense")


def test_a_flag_of_a_key_that_the_variant_has_not_is_one_line_with_its_whole_name():
    run = run_module("vivi_jax.main", "--config=configs/vito.py:images,demo", "--config.data.sampler=nonsense")
    assert_one_line_error(run, "the config has no key config.data.sampler")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_path_that_is_not_given_is_asked_for_by_its_flag(data, variant):
    """As every config has it before anybody gives one."""
    module, argument = VARIANTS[variant]
    given = module.get_config(argument).data
    for key in ("path", "labelled_path"):
        if key in given and not (key == "path" and given.get("unlabelled") == "none"):
            config = config_of(variant, data)
            config.data[key] = given[key]
            refused(
                config, f"config.data.{key} is empty: give --config.data.{key}=", "python -m input_pipeline.prepare"
            )


def test_the_command_without_data_says_in_one_line_what_it_needs():
    run = run_module("vivi_jax.main", "--config=configs/vito.py:demo")
    assert_one_line_error(
        run, "config.data.path is empty: give --config.data.path=STORE, a folder made from videos with"
    )


def test_infinite_times_are_refused(data):
    for key in ("clip_seconds", "delay_seconds"):
        for value in (math.inf, math.nan):
            config = config_of("video", data)
            config.data[key] = value
            refused(config, key)


def test_what_hosts_must_share_is_the_data_by_name(tmp_path):
    """Litter, Unicode forms and names that no encoding fits make no difference; another file does."""
    for form, host in (("NFC", "one"), ("NFD", "two")):
        for name in ("été/é.jpg", "b.jpg"):
            path = tmp_path / host / unicodedata.normalize(form, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        os.mkdir(os.fsencode(tmp_path / host) + b"/caf\xe9")
        with open(os.fsencode(tmp_path / host) + b"/caf\xe9/\xff.jpg", "wb"):
            pass
    (tmp_path / "one" / "._b.jpg").touch()
    one, two = ([*sources.identities({"path": str(tmp_path / host)}).values()] for host in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "c.jpg").touch()
    assert one != [*sources.identities({"path": str(tmp_path / "two")}).values()]


def store_of(directory, grey: int):
    videos = [dict(frames=80, fps=25, height=48, width=64)] * 8
    return write_store(directory, videos, [jpeg(np.full((48, 64, 3), grey, np.uint8))] * 640)


def test_a_run_goes_on_with_the_data_it_was_begun_with(tmp_path):
    """A store of other frames at the same path is noticed, though names and sizes of all its files are the same."""
    names = {}
    for name, grey in (("one", 50), ("same", 50), ("two", 51)):
        store = store_of(tmp_path / name, grey)
        names[name] = {path.name: path.stat().st_size for path in (tmp_path / name).iterdir() if path.name != META}
    assert names["one"] == names["two"]
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.jpg").touch()
    data = {"path": str(tmp_path / "STORE"), "labelled_path": str(tmp_path / "images")}
    for name, fits in (("one", True), ("same", True), ("two", False), ("one", True)):
        shutil.copytree(tmp_path / name, tmp_path / "STORE")
        if fits:
            sources.claim(tmp_path / "run", sources.identities(data))
        else:
            with pytest.raises(DataError, match=r"config.data.path=.*STORE holds other data than .*run was begun with"):
                sources.claim(tmp_path / "run", sources.identities(data))
        shutil.rmtree(tmp_path / "STORE")
    shutil.copytree(tmp_path / "one", tmp_path / "STORE")
    (tmp_path / "STORE/contact_sheet.png").touch()  # no part of what is trained on
    sources.claim(tmp_path / "run", sources.identities(data))
    (tmp_path / "images/a/2.jpg").touch()
    with pytest.raises(DataError, match="config.data.labelled_path=.*images holds other data"):
        sources.claim(tmp_path / "run", sources.identities(data))
    moved = {"path": str(tmp_path / "two")}  # as --may_change=data.path lets it
    for found in (sources.identities(moved), sources.identities({"path": str(tmp_path / "images")})):
        sources.claim(tmp_path / "run", found, write=False)
    sources.claim(tmp_path / "run", sources.identities(moved))
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(DataError, match="config.data.path=.*two holds other data"):
        sources.claim(tmp_path / "run", sources.identities(moved))
    (tmp_path / "run/data.json").write_text("{")
    with pytest.raises(DataError, match="data.json is damaged .* remove it"):
        sources.claim(tmp_path / "run", sources.identities(data))
    assert len(store) == 8


@pytest.mark.slow
def test_a_start_with_another_store_under_the_same_path_is_one_line(tmp_path):
    flags = [*small_vito(tmp_path / "STORE", tmp_path / "run"), "--config.schedule.epochs=4.0"]
    store_of(tmp_path / "STORE", 50)
    assert run_module("vivi_jax.main", *flags).returncode == 0
    shutil.rmtree(tmp_path / "STORE")
    store_of(tmp_path / "STORE", 51)
    assert_one_line_error(run_module("vivi_jax.main", *flags), "STORE holds other data than")


def test_streams_are_zipped_and_must_end_at_once():
    batches = sources.zip_streams([iter([{"shots": 1}, {"shots": 2}]), iter([{"image": 3, "label": 4}] * 2)])
    assert list(batches) == [{"shots": 1, "image": 3, "label": 4}, {"shots": 2, "image": 3, "label": 4}]
    with pytest.raises(DataError, match="has ended before the other"):
        list(sources.zip_streams([iter([{"shots": 1}]), iter([{"image": 3}] * 2)]))


def test_labelled_images_of_another_number_of_classes_are_refused(data):
    config = config_of("labels", data)
    config.method.num_classes = CLASSES + 2
    refused(config, f"has {CLASSES} classes and not {CLASSES + 2}: set --config.method.num_classes={CLASSES}")
    config.data.labelled_path = ""
    refused(config, "labelled_path is empty")
