"""The trainings' files, gathered into docs/results/small_paper.json, and a picture of the differences."""

import math
import os
import pathlib
import statistics

from benchmarks import results
from benchmarks.small_paper import trainings
from benchmarks.small_paper.directions import DIRECTIONS
from benchmarks.small_paper.paired import compare
from benchmarks.small_paper.settings import SETTINGS

FULL_SEEDS = (0, 1, 2, 3, 4)


def gather(size: str, seeds: list[int], kept: pathlib.Path) -> pathlib.Path:
    """Writes small_paper.json and .svg; returns the path of the former.

    Results of the repository are gathered into docs/, those of another folder beside it.
    """
    seeds = sorted({*seeds, *FULL_SEEDS})
    found = {
        setting: {seed: result for seed in seeds if (result := trainings.read(setting, size, seed, kept)) is not None}
        for setting in SETTINGS
    }
    rows = directions(found, seeds)
    values = {
        "size": size,
        "rows": rows,
        "settings": [summary(setting, of_seed) for setting, of_seed in found.items()],
        "trainings": sum(map(len, found.values())),
        "wanted": len(SETTINGS) * len(seeds),
        "processor_hours": sum(r["processor_seconds"] for of_seed in found.values() for r in of_seed.values()) / 3600,
        "commits": sorted({r["commit"] for of_seed in found.values() for r in of_seed.values()}),
    }
    command = f"python -m benchmarks.small_paper --size={size} --seeds={','.join(map(str, seeds))}"
    in_repository = kept.resolve() == trainings.KEPT
    directory = results.RESULTS if in_repository else kept
    name = "small_paper" if size == "small" else f"small_paper_{size}"
    path = results.record(name, values, command=command, seeds=seeds, directory=directory)
    draw(rows, (results.ROOT / "docs" if in_repository else kept) / f"{name}.svg")
    return path


def directions(found: dict[str, dict[int, dict]], seeds: list[int]) -> list[dict]:
    """A row of each direction, with what paired.compare says; nan becomes None."""
    rows = []
    for name, direction in DIRECTIONS.items():
        values = {
            setting: {
                seed: None if result["metrics"] is None else result["metrics"][direction.measure]
                for seed, result in found[setting].items()
            }
            for setting in direction.contrast
        }
        compared = compare(direction, values, seeds)._asdict()
        finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in compared.items()}
        rows.append({"row": name, **direction._asdict(), **finite})
    return rows


def summary(setting: str, of_seed: dict[int, dict]) -> dict:
    """Mean and standard deviation over the seeds of every measure; how many trained and diverged."""
    measured = [result["metrics"] for result in of_seed.values() if result["metrics"] is not None]
    return {
        "setting": setting,
        "config": SETTINGS[setting].config,
        "trained": len(measured),
        "diverged": len(of_seed) - len(measured),
        "processor_seconds": statistics.median(result["processor_seconds"] for result in of_seed.values())
        if of_seed
        else None,
        "measures": {
            name: {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
            for name in (measured[0] if measured else {})
            for values in [[metrics[name] for metrics in measured]]
        },
    }


COLOURS = {"agrees": "#1b7837", "disagrees": "#b2182b", "undecided": "#777777", "not finished": "#cccccc"}


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Mean differences in points with 95 % intervals, in the papers' direction to the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "small_paper"  # equal rows give equal bytes
    figure, axes = pyplot.subplots(figsize=(8, 0.24 * len(rows) + 1))
    for y, row in enumerate(rows):
        if row["mean"] is None:
            continue
        reach = 0 if row["high"] is None else 100 * (row["high"] - row["mean"])
        axes.errorbar(100 * row["mean"], y, xerr=reach, fmt="o", color=COLOURS[row["verdict"]], markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference in points, the paper's direction to the right; 95 % interval over seeds")
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=c, label=v) for v, c in COLOURS.items()]
    axes.legend(handles=handles, fontsize=7, loc="lower right")
    figure.tight_layout()
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    os.replace(unfinished, path)
