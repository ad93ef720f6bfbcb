"""One training of a setting from one seed, and the small file that keeps its result."""

import json
import pathlib
import shutil
import time

from benchmarks import results
from benchmarks.small_paper import data
from benchmarks.small_paper.measures import measure
from benchmarks.small_paper.settings import SETTINGS, config_of, identity, sets_of
from vivi_jax import files, main
from vivi_jax.errors import NotFinite

KEPT = results.RESULTS / "small_paper"


def result_path(setting: str, size: str, seed: int, kept: pathlib.Path) -> pathlib.Path:
    return kept / size / f"{setting}-{seed}.json"


def read(setting: str, size: str, seed: int, kept: pathlib.Path) -> dict | None:
    """The result, if there is one of the setting as it is now."""
    try:
        result = json.loads(result_path(setting, size, seed, kept).read_text())
    except FileNotFoundError:
        return None
    return result if result["identity"] == identity(setting, size) else None


def train(setting: str, size: str, seed: int, *, out: pathlib.Path, kept: pathlib.Path) -> dict:
    """Trains and measures; goes on where a killed call was. Writes and returns the result.

    {"setting", "seed", "size", "identity", "commit", "seconds" and "processor_seconds": of
    this call, "metrics": None if it "diverged": why}
    """
    config, videos = config_of(setting, size), SETTINGS[setting].videos
    config.seed = seed
    stores = {name: str(data.store(out, size, name, seed)) for name in sets_of(setting)}
    start, cpu_start = time.monotonic(), time.process_time()  # after rendering, as all settings share the videos
    if config.data.get("unlabelled") != "none":
        config.data.path = f"{stores[videos]}/train"
    if "labelled_path" in config.data:
        config.data.labelled_path = stores["scenes"]
    if "scenes" in stores:
        config.evaluation.dataset = stores["scenes"]
    run = out / "runs" / f"{setting}-{seed}-{identity(setting, size)}"
    metrics, diverged = None, ""
    try:
        main.run(config, str(run))
        metrics = measure(setting, size, seed, out, run)
    except NotFinite as error:
        diverged = str(error)
    result = {
        "setting": setting,
        "seed": seed,
        "size": size,
        "identity": identity(setting, size),
        "commit": results.commit(),
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(time.process_time() - cpu_start, 1),
        "metrics": metrics,
        "diverged": diverged,
    }
    path = result_path(setting, size, seed, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result)
    if metrics is not None:
        shutil.rmtree(run)  # 160 of them would fill a disk
    return result
