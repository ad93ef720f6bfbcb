"""Plans the papers' configs for the hardware people have: docs/results/plan.json, and docs/plan.md from it.

    python -m benchmarks.plan               # the rows that are missing, most important first; may be killed at any time
    python -m benchmarks.plan --first=3     # at most so many
    python -m benchmarks.plan --table       # docs/plan.md alone

Every row is `python -m vivi_jax.plan` in a process of its own, minutes of compiling each; a row that is in plan.json is
not computed again (delete it there to do so).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import results

COMMAND = "python -m benchmarks.plan"
VITO, EX4, BIG, VDIM = (
    "configs/vito.py",
    "configs/vivi.py:ex4",
    "configs/vivi.py:ex4,big",
    "configs/vdim.py:data=kinetics600",
)
# VIVI's statistics and triplets are per core of 128 (configs/vivi.py); on another number of devices, per device.
CO, AA = "configs/vivi.py:ex4,co=100", "configs/vivi.py:ex4,co=100,big,aa"


def per_core(batch: int, devices: int) -> list[str]:
    """VITO's 32 clips a core on any number of cores: weak scaling."""
    return [f"--config.batch_size={batch * devices}"]


def rows() -> list[tuple[str, str, list[str]]]:
    """(config, topology, further flags), most important first."""
    v3 = {"2x2": 8, "4x4": 32, "4x8": 64, "8x8": 128, "8x16": 256, "16x16": 512, "16x32": 1024, "32x32": 2048}
    chosen = [
        (VITO, "v3:8x8", []),
        (EX4, "v3:8x8", []),
        (VITO, "v3:2x2", per_core(32, 8)),
        (VITO, "v3:32x32", per_core(32, 2048)),
        (VITO, "v3:32x32", [*per_core(32, 2048), f"--config.encoder.bn_groups={2048 // 128}"]),
        (BIG, "v3:8x8", ["--config.encoder.remat=True"]),
        (CO, "v3:8x8", []),
        (AA, "v3:8x8", ["--config.encoder.remat=True"]),
        (VITO, "v5e:16x16", []),
        (VITO, "v4:4x4x4", []),
        (VITO, "v6e:8x8", []),
    ]
    chosen += [
        (VITO, f"v3:{shape}", per_core(32, devices))
        for shape, devices in v3.items()
        if shape not in ("2x2", "8x8", "32x32")
    ]
    # VDIM's batch of 240 on 16 devices; elsewhere 15 clips a device.
    chosen += [(VDIM, "v3:2x2", per_core(15, 8)), (VDIM, "v5e:4x4", []), (VDIM, "v3:8x8", per_core(15, 128))]
    chosen += [
        (VITO, "gpu:h100x8", []),
        (VITO, "gpu:h100x8", ["--config.micro_batches=4"]),
        (EX4, "v5e:8x16", []),
        (EX4, "v6e:8x16", []),
        (EX4, "v4:4x4x8", []),
    ]
    return chosen


def key(config: str, topology: str, options: list[str]) -> str:
    return " ".join([f"--config={config}", f"--topology={topology}", *options])


def compute(config: str, topology: str, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "plan.json")
        command = [sys.executable, "-m", "vivi_jax.plan", *key(config, topology, options).split(" "), f"--json={path}"]
        ended = subprocess.run(command, cwd=results.ROOT, check=False)
        if not path.exists():
            raise SystemExit(f"error: {' '.join(command)} ended with status {ended.returncode} and without a plan")
        return json.loads(path.read_text()) | {"commit": results.commit()}


def table(done: dict) -> str:
    """docs/plan.md."""
    lines = [
        "# Plans for hardware that was not at hand",
        "",
        "Made by `python -m vivi_jax.plan --all` from docs/results/plan.json; do not edit. Every row compiles the "
        "whole step of a config for all devices of a topology, with the TPU compiler (GPU rows: simulated CPU "
        "devices and a roofline; that compiler sums the gradients of several views apart, so that more is sent "
        "than a GPU would). **All times are estimates**, from the compiler's cycles and the model of "
        "collectives in `vivi_jax/plan.py`; no step of them has been run on such hardware. Memory is per device; "
        '"sent" is what collectives bring to each device, beside the analytic least; "commit" is the code '
        "compiled.",
        "",
        "| config | topology | devices | batch | memory, GB | fits | TFLOP | sent, MB (least) | step, ms | of it "
        "transfers and latencies | utilisation | examples/s | days | commit |",
        "|" + " --- |" * 14,
    ]
    for name, row in done.items():
        words = dict(word.lstrip("-").split("=", 1) for word in name.split(" "))
        label = " ".join(
            [
                words.pop("config").removeprefix("configs/"),
                *(
                    f"{option.removeprefix('config.')}={value}"
                    for option, value in words.items()
                    if option != "topology"
                ),
            ]
        )
        head = f"| {label} | {row['topology']} | {row['devices']} | {row['batch']} "
        if "memory" not in row:
            lines.append(head + "| | no |" + " |" * 7 + f" {row['commit'][:7]} |")
            continue
        e, least = row["estimate"], sum(row["collective_bytes_minimum"].values())
        lines.append(
            head + f"| {row['memory_total'] / 1e9:.1f} of {row['memory_of_device'] / 1e9:.1f} | "
            f"{'yes' if row['fits'] else 'no'} | {row['flops'] / 1e12:.2f} | "
            f"{row['collective_bytes'] / 1e6:.1f} ({least / 1e6:.1f}) | {1e3 * e['step_seconds']:.0f} | "
            f"{1e3 * (e['transfer_seconds'] + e['latency_seconds']):.1f} | {e['utilisation']:.0%} | "
            f"{e['examples_per_second']:.0f} | {e['days']:.2f} | {row['commit'][:7]} |"
        )
    return "\n".join([*lines, "", weak_scaling(done), ""])


def weak_scaling(done: dict) -> str:
    """Two sentences: how VITO's step grows with the number of v3 cores, 32 clips on each."""
    rows_of = {}
    for name, row in done.items():
        if name.startswith(f"--config={VITO} --topology=v3:") and row["batch"] == 32 * row["devices"]:
            rows_of.setdefault("bn_groups" in name, {})[row["devices"]] = row["estimate"]
    cores = sorted(rows_of.get(False, {}))
    if len(cores) < 2:
        return ""
    first = rows_of[False][cores[0]]["step_seconds"]

    def growth(estimate: dict) -> str:
        return f"{estimate['step_seconds'] / first - 1:.1%} (of it {estimate['latency_seconds'] / first:.1%} latencies)"

    grouped = [
        f" With BatchNorm over 4096 images each, as in the paper, instead of the whole batch: on {devices} "
        f"{growth(estimate)}."
        for devices, estimate in rows_of.get(True, {}).items()
    ]
    return (
        f"VITO with 32 clips a core: its step is longer than on {cores[0]} cores of v3 by, on "
        + ", on ".join(f"{devices} {growth(rows_of[False][devices])}" for devices in cores[1:])
        + "."
        + "".join(grouped)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=10**6, help="compute at most so many rows")
    parser.add_argument("--table", action="store_true", help="compute nothing, write docs/plan.md")
    args = parser.parse_args(argv)
    path = results.RESULTS / "plan.json"
    done = json.loads(path.read_text())["values"]["rows"] if path.exists() else {}
    missing = [row for row in rows() if key(*row) not in done]
    for row in [] if args.table else missing[: args.first]:
        print(f"{key(*row)}: {len(done)} of {len(rows())} rows are there", flush=True)
        done[key(*row)] = compute(*row)
        order = {key(*known): i for i, known in enumerate(rows())}
        done = dict(sorted(done.items(), key=lambda item: order.get(item[0], len(order))))
        results.record("plan", {"rows": done}, command=COMMAND, seeds=[])
    (results.ROOT / "docs" / "plan.md").write_text(table(done))


if __name__ == "__main__":
    main()
