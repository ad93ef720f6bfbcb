"""Whether small trainings go in the directions that the papers report: VITO, VIVI and VDIM on rendered videos.

    python -m benchmarks.small_paper [--only=ROW,ROW] [--seeds=0,1,2,3,4] [--size=small] [--out=runs/small_paper]
    python -m benchmarks.small_paper --gather      # docs/results/small_paper.json and the picture, of what is there

A row is a direction (directions.py); what it compares are settings (settings.py), each trained from every seed. Seed by
seed: all settings from the first, then from the next. Each training's result is a file of its own,
docs/results/small_paper/SIZE/SETTING-SEED.json, and is not made again; the command may be killed and started again, and
its pieces may be shared among several sittings by --only and --seeds. A setting that was changed is trained again.
Seeds from 100 on see other videos: settings are chosen on them, and they are not gathered.

--list says what is there, what is missing, and how long it will take by what the others took.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Iterator

from benchmarks.small_paper import gather, trainings
from benchmarks.small_paper.directions import DIRECTIONS
from benchmarks.small_paper.settings import CHOSEN_SEEDS, SETTINGS, SIZES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(DIRECTIONS), help="directions, or settings, comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--out", default="runs/small_paper", help="folder for videos and runs")
    parser.add_argument("--results", default=str(trainings.KEPT), help="folder of the trainings' results")
    parser.add_argument("--gather", action="store_true", help="train nothing")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and do nothing")
    options = parser.parse_args(argv)
    kept, seeds = pathlib.Path(options.results), [int(seed) for seed in options.seeds.split(",")]
    wanted = [(setting, seed) for seed in seeds for setting in settings_of(options.only)]
    missing = [pair for pair in wanted if trainings.read(*_placed(pair, options.size), kept) is None]
    print(projection(wanted, missing, options.size, kept), flush=True)
    if options.list:
        return
    for setting, seed in [] if options.gather else missing:
        out = pathlib.Path(options.out, options.size)
        result = trainings.train(setting, options.size, seed, out=out, kept=kept)
        print(f"{setting}, seed {seed}: {result['metrics'] or result['diverged']}, {result['seconds']} s", flush=True)
    if any(seed < CHOSEN_SEEDS for seed in seeds):
        path = gather.gather(options.size, [seed for seed in seeds if seed < CHOSEN_SEEDS], kept)
        print(f"wrote {path}")


def _placed(pair: tuple[str, int], size: str) -> tuple[str, str, int]:
    setting, seed = pair
    return setting, size, seed


def settings_of(only: str) -> list[str]:
    """The settings of comma-separated directions and settings, each once."""
    found: dict[str, None] = {}
    for name in only.split(","):
        if name in DIRECTIONS:
            found |= dict.fromkeys(DIRECTIONS[name].contrast)
        elif name in SETTINGS:
            found[name] = None
        else:
            sys.exit(f"error: no direction or setting {name!r}; directions: {', '.join(DIRECTIONS)}")
    return list(found)


def projection(wanted: list[tuple[str, int]], missing: list[tuple[str, int]], size: str, kept: pathlib.Path) -> str:
    """What is missing, and the processor time it will take: other work on the machine is in the time by the clock.

    A setting takes the median of its trainings, of any seed; without one, that of its method's; without, of all.
    """
    took = [(name, result["processor_seconds"]) for name in SETTINGS for result in every_seed(name, size, kept)]
    text = f"{len(wanted) - len(missing)} of {len(wanted)} trainings are there"
    if not missing or not took:
        return text

    def usual(setting: str) -> float:
        method = SETTINGS[setting].config.partition(":")[0]
        of_method = [seconds for name, seconds in took if SETTINGS[name].config.partition(":")[0] == method]
        return statistics.median([s for name, s in took if name == setting] or of_method or [s for _, s in took])

    hours = sum(usual(setting) for setting, _ in missing) / 3600
    return f"{text}; the others will take about {hours:.2f} processor-hours, by {len(took)} that were timed"


def every_seed(setting: str, size: str, kept: pathlib.Path) -> Iterator[dict]:
    """Results of all seeds that are there, those for choosing too."""
    for path in sorted((kept / size).glob(f"{setting}-*.json")):
        name, _, seed = path.stem.rpartition("-")
        result = trainings.read(setting, size, int(seed), kept) if name == setting else None
        if result is not None:
            yield result


if __name__ == "__main__":
    main()
