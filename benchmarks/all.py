"""Measures everything again, and says of each target whether it is met: `python -m benchmarks.all`.

    python -m benchmarks.all [--only=step,vdim] [--data=DIR]    # hours on two cores; may be killed and started again
    python -m benchmarks.all --gather                           # docs/results/performance.json alone, of what is there

Every measurement is a command of its own (MEASURED), one at a time; one whose figures are of this commit already is
left out, one that fails is named and the others go on. With --data, a folder of class folders and of DAVIS
(benchmarks.vtab, transfer and davis say which), their figures too. Then docs/results/performance.json: the targets
(TARGETS), with the figure that was last measured, its commit and its processor; and the pages, by benchmarks.tables.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import results

# file in docs/results -> its command; {data}: --data
MEASURED = {
    "step": "benchmarks.step --row=vito --batch=8 --size=112 --rounds=5",
    "step_vivi": "benchmarks.step --row=vivi --batch=1 --size=112 --rounds=5",
    "step_supervised": "benchmarks.step --row=supervised --batch=32 --size=112 --rounds=5",
    "step_vtab": "benchmarks.step --row=vtab --batch=32 --size=112 --rounds=5",
    "vdim": "benchmarks.vdim --table=paper --batch=2 --rounds=3",
    "vivi": "benchmarks.vivi --videos=2 --size=32 --rounds=5 --devices=1,8",
    "input": "benchmarks.input",
    "bucket": "benchmarks.bucket",
    "prepare": "benchmarks.prepare",
    "plan": "benchmarks.plan",
    "protocols": "benchmarks.protocols",
    "vtab": "benchmarks.vtab --data={data} --tasks=cifar100,svhn",
    "learning": "benchmarks.learning",
    "vivi_learning": "benchmarks.vivi_learning",
    "vdim_learning": "benchmarks.vdim_learning",
    "davis": "benchmarks.davis --data={data} --short_side=96",
    "transfer": "benchmarks.transfer --data={data} --datasets=cifar10_mini,dtd_mini --steps=100",
    "gpu": "benchmarks.gpu",
    "reliability": "benchmarks.faults --full",
    "guards": "benchmarks.guards",
}


TPU = "--config=configs/vito.py --topology=v3:2x2 --config.batch_size=256"


class Target(NamedTuple):
    """A figure to reach, and where it is found; None where no command measures it."""

    what: str
    bound: float
    at_most: bool
    unit: str
    file: str
    value: Callable[[dict], float] | None


def gpu_ratio(row: str) -> Callable[[dict], float]:
    return lambda values: next(r for r in values["rows"] if r["row"] == row)["rate_ratio"]


def step_ratio(of: str) -> Callable[[dict], float]:
    return lambda values: values[f"{of}_ratio_jax_over_torch"]


def over_peer(name: str) -> Callable[[dict], float]:
    return lambda values: next(
        row["rate_of_prepare_over_it"] for row in values["beside_peers"]["rows"] if row["what"] == name
    )


TARGETS = (
    Target(
        "VITO step, ResNet-50, CPU: rate over PyTorch's",
        1.25,
        False,
        "x",
        "step",
        step_ratio("rate"),
    ),
    Target(
        "VITO step: peak memory over PyTorch's",
        1.0,
        True,
        "x",
        "step",
        lambda v: v["jax_peak_memory_mb"] / v["torch_peak_memory_mb"],
    ),
    Target("seconds to VITO's first step", 25, True, " s", "step", lambda v: v["jax_first_step_seconds"]),
    Target(
        "the same at the second start", 6, True, " s", "step", lambda v: v["jax_first_step_of_second_start_seconds"]
    ),
    Target(
        "VDIM step, CPU: rate over PyTorch's (Intel; AMD: 2)", 1.1, False, "x", "vdim", lambda v: v["step"]["ratio"]
    ),
    Target(
        "VDIM host input: pairs of views per core over a PyAV reader's",
        2.5,
        False,
        "x",
        "vdim",
        lambda v: v["clips"]["ratio"],
    ),
    Target(
        "VITO host input: views per core over bare decode",
        0.88,
        False,
        "x",
        "input",
        lambda v: v["ratio_to_bare_decode"],
    ),
    Target(
        "the same over a torch DataLoader of the same JPEGs",
        1.5,
        False,
        "x",
        "input",
        lambda v: v["ratio_to_torch_dataloader"],
    ),
    Target("the same over torchcodec, from video files", 8, False, "x", "input", lambda v: v["ratio_to_torchcodec"]),
    Target(
        "a store in a bucket, first pass: frames a second over the best client's ranges",
        0.8,
        False,
        "x",
        "bucket",
        lambda v: v["cold_ratio_to_best_ranges"],
    ),
    Target(
        "the same, later passes, at 500 frames a second and 50 ms a request: time waiting",
        5,
        True,
        " %",
        "bucket",
        lambda v: 100 * v["warm_share_waited_at_the_pace"],
    ),
    Target("prepare: seconds of video per core second over ffmpeg's", 0.8, False, "x", "prepare", over_peer("ffmpeg")),
    Target("prepare, with its shots, over PySceneDetect's cuts", 5, False, "x", "prepare", over_peer("PySceneDetect")),
    *(
        target
        for row, name in (("vivi", "VIVI-Ex(4)"), ("supervised", "supervised"), ("vtab", "VTAB fine-tuning"))
        for target in (
            Target(f"{name} step, CPU: rate over PyTorch's", 1.0, False, "x", f"step_{row}", step_ratio("rate")),
            Target(f"{name} step: peak memory over PyTorch's", 1.0, True, "x", f"step_{row}", step_ratio("memory")),
        )
    ),
    Target(
        "VITO step on TPU v3:2x2, 32 clips a core: the compiler's estimate (140 M cycles)",
        149,
        True,
        " ms",
        "plan",
        lambda v: 1000 * v["rows"][TPU]["estimate"]["compute_seconds"],
    ),
    Target("the same: bytes accessed", 36, True, " GB", "plan", lambda v: v["rows"][TPU]["bytes_accessed"] / 1e9),
    Target("VITO step on one GPU: rate over PyTorch's best", 1.1, False, "x", "gpu_vito", gpu_ratio("vito")),
    Target("VIVI step on one GPU: rate over PyTorch's best", 1.1, False, "x", "gpu", gpu_ratio("vivi")),
    Target("VDIM step on one GPU: rate over PyTorch's best", 1.1, False, "x", "gpu", gpu_ratio("vdim")),
    Target("a store of 1.2 million videos: views per core over one of 8 shards", 0.95, False, "x", "input", None),
    Target("features for k-NN: images a second over torch's", 1.2, False, "x", "input", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASURED), help="names of MEASURED")
    parser.add_argument("--data", default="", help="folder of data sets, for the rows that need one")
    parser.add_argument("--gather", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in MEASURED]:
        sys.exit(f"error: no measurement {unknown[0]!r}; there are {', '.join(MEASURED)}")
    failed = [] if arguments.gather else [name for name in names if not measure(name, arguments.data)]
    path = results.record(
        "performance", {"rows": gather(results.RESULTS)}, command="python -m benchmarks.all", seeds=[]
    )
    print(f"wrote {path}")
    if subprocess.run([sys.executable, "-m", "benchmarks.tables"], cwd=results.ROOT).returncode:
        sys.exit(1)
    if failed:
        sys.exit(f"error: not measured, as their commands say above: {', '.join(failed)}")


def measure(name: str, data: str) -> bool:
    """Runs one command unless its figures are of this commit; False if it failed."""
    if "{data}" in MEASURED[name] and not data:
        print(f"{name}: left out, it needs --data")
        return True
    if (of := found(results.RESULTS, name)) and of["commit"] == results.commit():
        print(f"{name}: measured at this commit already")
        return True
    print(f"{name}: python -m {MEASURED[name]}", flush=True)
    command = [sys.executable, "-m", *MEASURED[name].format(data=data).split()]
    return subprocess.run(command, cwd=results.ROOT).returncode == 0


def found(folder: pathlib.Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def gather(folder: pathlib.Path) -> list[dict]:
    """A row per target: "what", "bound", "at_most", "unit"; of a measured one "figure", "met", "of" (its source)."""
    rows = []
    for target in TARGETS:
        row: dict = {"what": target.what, "bound": target.bound, "at_most": target.at_most, "unit": target.unit}
        result = found(folder, target.file)
        try:
            figure = target.value(result["values"]) if target.value and result else None
        except (KeyError, StopIteration):  # measured before that figure was
            figure = None
        if figure is not None and result:
            row |= {
                "figure": round(figure, 3),
                "met": figure <= target.bound if target.at_most else figure >= target.bound,
                "of": {name: result[name] for name in ("command", "date", "commit")}
                | {"on": result["values"].get("gpu", {}).get("name") or result["machine"]["cpu"]},
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
