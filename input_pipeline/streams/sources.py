"""The sources of training data by name: from config.data to batches, from any step on."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from input_pipeline import folders, images
from input_pipeline.store import META, FrameStore, parse_meta, read_meta, remote_meta
from input_pipeline.streams import shots, views, windows
from input_pipeline.streams.decode import Batches
from input_pipeline.streams.order import Order
from vivi_jax import files
from vivi_jax.buckets.client import ADDRESSES, Folder
from vivi_jax.config import Count, Share, Whole, call_with_config, check
from vivi_jax.errors import ConfigError, DataError, lookup

_training_images = functools.partial(images.load_labelled, split="train")
# Name -> what opens config.data.path, and the stream whose keyword arguments are the other keys of config.data.
SOURCES = {
    "video": (FrameStore, views.clip_views),
    "images": (_training_images, views.image_views),
    "windows": (FrameStore, windows.clip_pairs),
}
# What belongs into an empty path.
_STORE = "STORE, a folder made from videos with: python -m input_pipeline.prepare --videos=VIDEOS --out=STORE"
_IMAGES = (
    "IMAGES, a folder with a folder of images per class, the name of a TFDS data set, or a store made from labelled "
    "videos with: python -m input_pipeline.prepare --videos=VIDEOS --labels=folder --out=STORE"
)
UNLABELLED = {"videos": (FrameStore, shots.shot_frames), "images": (_training_images, shots.image_frames)}


def check_keys(data: Mapping[str, Any]) -> None:
    """Checks the keys and values of config.data without opening what it names; open_stream says the rest.

    Raises:
      ConfigError: a key that the source does not read, or a value that cannot be.
    """
    check("data", {"source": str}, {"source": data["source"]})
    options = {key: value for key, value in data.items() if key not in ("source", "path")}
    check("data", {"path": str}, {key: data[key] for key in ("path",) if key in data})
    stream = lookup("config.data.source", data["source"], SOURCES | {"shots": (None, _shots)})[1]
    if stream is _shots:
        check("data", _shots, options)
        labelled = {key: options.pop(key) for key in list(options) if key.startswith("labelled_")}
        shared = {key: options[key] for key in ("image_size", "min_crop_area") if key in options}
        if labelled.pop("labelled_batch_size", 0):
            check("data", _labelled, labelled | shared)
        unlabelled = options.pop("unlabelled")
        stream = lookup("config.data.unlabelled", unlabelled, UNLABELLED | {"none": (None, None)})[1]
    if stream:
        check("data", stream, options)


def open_stream(data: Mapping[str, Any], order: Order, *, num_classes: int | None = None) -> Batches:
    """Opens what config.data names.

    Args:
      data: config.data. "source" is a name of SOURCES, or "shots": unlabelled shots, labelled images or both (VIVI).
      order: of the examples.
      num_classes: those the method tells apart; labelled images must have as many.

    Raises:
      ConfigError: a key that the source does not read, or a value that cannot work.
      DataError: data that cannot be used.
    """
    options = {key: value for key, value in data.items() if key != "source"}
    if data["source"] == "shots":
        return call_with_config("data", _shots, order, num_classes, **options)
    return _opened(lookup("config.data.source", data["source"], SOURCES | {"shots": _shots}), order, options)


def _opened(source: tuple[Callable, Callable], order: Order, options: dict[str, Any]) -> Batches:
    load, stream = source
    if not options["path"]:
        what = _STORE if load is FrameStore else _IMAGES
        raise ConfigError(f"config.data.path is empty: give --config.data.path={what}")
    _refuse_others("path", options["path"])
    keys = {key: value for key, value in options.items() if key != "path"}
    return call_with_config("data", stream, load(options["path"]), order, **keys)


def _refuse_others(key: str, path: str) -> None:
    """Refuses paths with a scheme that nothing here reads, for a store in a bucket is read."""
    if not str(path).startswith(ADDRESSES):
        files.refuse_remote(f"--config.data.{key}", path)


def _shots(
    order: Order,
    num_classes: int | None,
    *,
    unlabelled: str,
    labelled_batch_size: Whole,
    image_size: Count,
    min_crop_area: Share,
    **options,
) -> Batches:
    crop = dict(image_size=image_size, min_crop_area=min_crop_area)
    labelled = {key: options.pop(key) for key in list(options) if key.startswith("labelled_")}
    streams = []
    if unlabelled != "none":
        source = lookup("config.data.unlabelled", unlabelled, UNLABELLED | {"none": None})
        streams.append(_opened(source, order, options | crop))
    elif unread := sorted(options.keys() - {"path"}):
        raise ConfigError(f"config.data.{unread[0]} is not read where config.data.unlabelled is 'none'")
    if labelled_batch_size:
        order = dataclasses.replace(order, batch_size=labelled_batch_size)
        streams.append(call_with_config("data", _labelled, order, num_classes, **labelled, **crop))
    elif labelled:
        raise ConfigError(f"config.data.{min(labelled)} is not read where config.data.labelled_batch_size is 0")
    return dataclasses.replace(streams[0], make=lambda *place: zip_streams([stream(*place) for stream in streams]))


def _labelled(
    order: Order,
    num_classes: int | None,
    *,
    labelled_path: str,
    labelled_fraction: Share,
    image_size: Count,
    min_crop_area: Share,
) -> Batches:
    if not labelled_path:
        raise ConfigError(f"config.data.labelled_path is empty: give --config.data.labelled_path={_IMAGES}")
    _refuse_others("labelled_path", labelled_path)
    labelled = _training_images(labelled_path)
    if len(labelled.class_names) != num_classes:
        raise ConfigError(
            f"{labelled.source} has {len(labelled.class_names)} classes and not {num_classes}: set "
            f"--config.method.num_classes={len(labelled.class_names)}"
        )
    return views.labelled_images(
        labelled, order, fraction=labelled_fraction, image_size=image_size, min_crop_area=min_crop_area
    )


def zip_streams(streams: list[Iterator[dict]]) -> Iterator[dict]:
    """Batches with the arrays of all streams."""
    for batches in itertools.zip_longest(*streams):
        if None in batches:
            raise DataError(
                "one stream of the training data has ended before the other; none of them may end before the run does"
            )
        yield {name: array for batch in batches for name, array in batch.items()}


def identities(data: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all hosts, and at all starts of a run: {key and path of config.data: digest}.

    The digest (SHA-256, its beginning) is of the names of all files under the path, and of a store of its description
    alone, which has the hashes of its files. Opens no data.
    """
    paths = {key: str(data[key]) for key in ("path", "labelled_path") if data.get(key)}
    return {f"config.data.{key}={path}": _identity(path) for key, path in paths.items()}


def _identity(path: str) -> str:
    if path.startswith(ADDRESSES):
        bucket = Folder(path)
        names, read = [name for name in bucket.names() if all(map(folders.is_data, name.split("/")))], bucket.read
    elif not os.path.isdir(path):
        return "not a folder"  # the name of a TFDS data set
    else:
        names, read = folders.walk(path), lambda name: pathlib.Path(path, name).read_bytes()
    names = sorted(names, key=folders.same_form)
    stores = {os.path.dirname(name) for name in names if os.path.basename(name) == META}
    digest = hashlib.sha256()
    for name in names:
        if os.path.basename(name) == META:
            digest.update(os.fsencode(folders.same_form(name)) + b"\0")
            digest.update(read(name))
        elif os.path.dirname(name) not in stores:
            digest.update(os.fsencode(folders.same_form(name)) + b"\0")
    return digest.hexdigest()[:12]


def claim(workdir: str | os.PathLike[str], found: Mapping[str, str], *, write: bool = True) -> None:
    """Keeps what `identities` found in WORKDIR/data.json; refuses a run that was begun with other data.

    A path that the run had no data under before, as when a config was changed, is for the config's own check.

    Args:
      write: False: checks only.

    Raises:
      DataError: there are other data under the same path now, or data.json is damaged.
    """
    path = pathlib.Path(workdir, "data.json")
    if not path.exists():  # of a new run, or one of a version that did not keep it
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, dict(found))
        return
    try:
        begun = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove it, and the next start takes the data as they are"
        ) from None
    for key, identity in found.items():
        if begun.get(key, identity) != identity:
            if grown := _grown(key.partition("=")[2], begun[key]):
                raise DataError(
                    f"{key} has grown since {workdir} was begun, from {grown[0]:,} files to {grown[1]:,}: use another "
                    f"--workdir; or remove {path}, and the run goes on with all of them"
                )
            raise DataError(
                f"{key} holds other data than {workdir} was begun with ({begun[key]} then, {identity} now): put the "
                "former back, or use another --workdir"
            )
    if write and not found.keys() <= begun.keys():
        files.write_json(path, begun | dict(found))


def _grown(path: str, begun: str) -> tuple[int, int] | None:
    """Inputs of a store when a run was begun with it, and now; None unless it has grown out of that store."""
    if path.startswith(ADDRESSES):
        meta = parse_meta(remote_meta(Folder(path)), path)
    elif os.path.isfile(os.path.join(path, META)):
        meta = read_meta(pathlib.Path(path))
    else:
        return None
    for former in meta.get("grown", []):
        if former["identity"].startswith(begun):
            return former["inputs"], meta["inputs"]
    return None
