"""Writes the measured figures into README.md and docs/*.md.

    python -m benchmarks.tables            # rewrite the files
    python -m benchmarks.tables --check    # exit 1 if a file would change

Between <!-- table:NAME --> and <!-- /table:NAME --> stands what TABLES[NAME] makes of docs/results; the markers may
stand within a line, for a single figure.
"""

import argparse
import collections
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable

from benchmarks.faults.__main__ import ROWS
from benchmarks.results import ROOT

_MARKED = re.compile(r"(<!-- table:(\S+) -->)(.*?)(<!-- /table:\2 -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- /?table:(\S+) -->")


class TableError(ValueError):
    """A marker without a table or a table without its measurement; the message is one line that says what to do."""


def input_table(result: dict) -> str:
    """benchmarks/input.py: rates per core and peak memory."""
    rows = [
        (row["what"], f"{row['views_per_core_second']:.0f}", f"{row['peak_memory_mb']:.0f} MB")
        for row in result["values"]["rows"]
    ]
    return _table(("", "views per second and core", "peak memory"), rows) + "\n\n" + _source(result)


def step_table(result: dict) -> str:
    """benchmarks/step.py: seconds and memory of a step, ours beside PyTorch's."""
    values = result["values"]
    rows = [
        (
            name,
            f"{values[f'{key}_step_seconds']:.2f}",
            f"{values[f'{key}_first_step_seconds']:.0f}",
            f"{values[f'{key}_peak_memory_mb']:.0f} MB",
        )
        for name, key in (("vivi_jax", "jax"), ("PyTorch, channels_last", "torch"))
        if f"{key}_step_seconds" in values
    ]
    head = ("", f"seconds per step of {values['batch']} clips", "seconds to the first step", "peak memory")
    text = f"Importing the core takes {values['core_import_seconds']:.1f} s"
    if "rate_ratio_jax_over_torch" in values:
        text += f"; our rate is {values['rate_ratio_jax_over_torch']:.2f} of PyTorch's (median over rounds)"
    return _table(head, rows) + f"\n\n{text}. " + _source(result)


def learning_table(result: dict) -> str:
    """benchmarks/learning.py: accuracy before and after, median and range over seeds."""

    def share(row: dict) -> str:
        return f"{row['median']:.1%} ({row['min']:.1%} to {row['max']:.1%})"

    names = {"knn_top1": "k-NN", "linear_top1": "linear probe"}
    found = {(row["method"], row["measure"], row["when"]): row for row in result["values"]["rows"]}
    rows = []
    for (method, measure, when), untrained in found.items():
        if when == "untrained":
            trained = found[method, measure, "trained"]
            rows.append((method, trained["step"], names[measure], share(untrained), share(trained)))
    return _table(("method", "steps", "top-1 of", "untrained", "trained"), rows) + (
        f"\n\nMedian (range) over seeds {', '.join(map(str, result['seeds']))}. " + _source(result)
    )


def transfer_table(result: dict) -> str:
    """benchmarks/transfer.py: accuracy per data set, encoder and measure, median and range over seeds."""
    found = {
        (row["dataset"], row["encoder"], row["measure"]): f"{row['median']:.1%} ({row['min']:.1%} to {row['max']:.1%})"
        for row in result["values"]["rows"]
    }
    measures = {"knn_top1": "k-NN", "linear_top1": "linear probe", "finetune_top1": "fine-tuning"}
    rows = [
        (dataset, encoder, *(found[dataset, encoder, measure] for measure in measures))
        for dataset, encoder, measure in found
        if measure == "knn_top1"
    ]
    sizes = "; ".join(
        f"{name}: {s['classes']} classes, {s['train']} training and {s['test']} test images"
        for name, s in result["values"]["sizes"].items()
    )
    return _table(("data", "encoder", *measures.values()), rows) + (
        f"\n\nTop-1, median (range) over seeds {', '.join(map(str, result['seeds']))}. {sizes}. " + _source(result)
    )


def davis_table(result: dict) -> str:
    """benchmarks/davis.py: J and F of each encoder, median and range over seeds."""
    values = result["values"]
    found = {
        (row["encoder"], row["measure"]): f"{100 * row['median']:.1f}"
        + (f" ({100 * row['min']:.1f} to {100 * row['max']:.1f})" if row["min"] < row["max"] else "")
        for row in values["rows"]
    }
    measures = {"J&F": "J&F", "J_mean": "J", "F_mean": "F"}
    rows = [
        (encoder, *(found[encoder, measure] for measure in measures)) for encoder, measure in found if measure == "J&F"
    ]
    frames = ", ".join(f"{name} ({count} frames)" for name, count in values["frames"].items())
    return _table(("encoder", *measures.values()), rows) + (
        f"\n\nMedian (range) over seeds {', '.join(map(str, result['seeds']))}. {frames}; short side "
        f"{values['short_side']} px, {values['seconds_per_frame']:.2f} s per frame. " + _source(result)
    )


def vtab_table(result: dict) -> str:
    """benchmarks/vtab.py: what the sweep costs."""
    v = result["values"]
    rows = [
        ("training runs", v["runs"]),
        ("images per second in training", f"{v['images_per_second']:.1f}"),
        ("share of time not in training steps", f"{v['share_not_in_steps']:.0%}"),
        ("of it compiling", f"{v['compile_seconds']:.0f} s"),
        ("compilations", f"{v['compilations']} for {v['tasks']} tasks"),
    ]
    return _table(("ResNet-50, random weights", f"{v['image_size']} px, batches of {v['batch_size']}"), rows) + (
        "\n\n" + _source(result)
    )


def vivi_learning_table(result: dict) -> str:
    """benchmarks/vivi_learning.py: accuracy before and after, median and range over seeds; then the pretext tasks."""

    def share(measured: dict) -> str:
        values, median = measured["values"], f"{measured['median']:.1%}"
        return f"{median} ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else median

    values = result["values"]
    accuracy = [
        (
            row["row"],
            *(
                share(row[measure][when])
                for measure in ("knn_top1", "linear_top1")
                for when in ("untrained", "trained")
            ),
            row["seeds"],
        )
        for row in values["rows"]
    ]
    names = {
        "rotation_accuracy": "rotation (chance 25%)",
        "order_accuracy": "order of shots (chance 50%)",
        "nce_accuracy": "shot among all others (chance 3%)",
        "class_accuracy": "class of labelled images",
    }
    pretext = [
        (row["row"], name, f"{row[metric]['first']:.1%}", f"{row[metric]['last']:.1%}")
        for row in values["rows"]
        for metric, name in names.items()
        if metric in row
    ]
    steps = values["averaged_steps"]
    compared = [row for row in values["rows"] if row["seeds"] > 1]  # in the paper's order, from the worst to the best
    order = []
    for measure, name in (("knn_top1", "k-NN"), ("linear_top1", "linear probe")):
        falls = [
            f"{worse['row']} and {better['row']}"
            for worse, better in itertools.pairwise(compared)
            if worse[measure]["trained"]["median"] > better[measure]["trained"]["median"]
        ]
        order.append(f"{name}: " + (f"not for {', '.join(falls)}" if falls else "for all"))
    return "\n\n".join(
        [
            _table(
                ("row of the paper", "k-NN, untrained", "trained", "linear, untrained", "trained", "seeds"), accuracy
            ),
            _table(("row of the paper", "accuracy on", f"first {steps} steps", f"last {steps}"), pretext),
            "Whether medians rise in the paper's order, from "
            + " to ".join(row["row"] for row in compared)
            + f": {'; '.join(order)}.",
            f"Median (range) over seeds {', '.join(map(str, result['seeds']))}, {values['steps']} steps. "
            + _source(result),
        ]
    )


def vivi_table(result: dict) -> str:
    """benchmarks/vivi.py: time against supervised training, memory by number of devices, frame rate."""
    values = result["values"]
    step = values["step"]
    rows = [
        (row["devices"], row["micro_batches"], f"{row['argument_mb']} MB", f"{row['temporary_mb']} MB")
        for row in values["memory"]
    ]
    head = ("devices", "micro-batches", "state and batch, per device", "temporary")
    return (
        f"A step on {step['frames']} frames takes {step['vivi_step_seconds']:.3g} s, supervised training "
        f"{step['supervised_step_seconds']:.3g} s: {step['ratio']:.2f} times as long (median over rounds, "
        f"{step['device']}). The sampler gives {values['sampler']['frames_per_core_second']:.0f} frames per second "
        f"and core.\n\n{_table(head, rows)}\n\n{_source(result)}"
    )


def vdim_learning_table(result: dict) -> str:
    """benchmarks/vdim_learning.py: top-1 after fine-tuning on few labels, pretrained and from scratch."""
    values = result["values"]
    rows = [
        (row["start"], f"{row['median']:.1%}", ", ".join(f"{top1:.1%}" for top1 in row["top1"]))
        for row in values["rows"]
    ]
    return _table(("fine-tuned", "top-1, median", "by seed"), rows) + (
        f"\n\n{values['videos_per_class']} labelled clips of each of {values['classes']} classes; seeds "
        f"{', '.join(map(str, result['seeds']))}. Gain: median {100 * values['gain_median']:.1f} points, least "
        f"{100 * values['gain_min']:.1f} (target {100 * values['target_gain']:.0f}). " + _source(result)
    )


def vdim_table(result: dict) -> str:
    """benchmarks/vdim.py: clips against a PyAV reader, the step against PyTorch."""
    values = result["values"]
    clips = [
        (row["what"], f"{row['clips_per_core_second']:.2f}", f"{row['peak_memory_mb']:.0f} MB")
        for row in values["clips"]["rows"]
    ]
    names = {"jax": "vivi_jax", "torch": "PyTorch"}
    steps = [
        (
            names[row["what"]],
            f"{row['step_seconds']:.2f}",
            f"{row['first_step_seconds']:.0f}",
            f"{row['peak_memory_mb']:.0f} MB",
        )
        for row in values["step"]["rows"]
    ]
    text = f"The pipeline is {values['clips']['ratio']:.1f} times as fast as the reader"
    if "ratio" in values["step"]:
        text += f"; our rate of steps is {values['step']['ratio']:.2f} of PyTorch's"
    return "\n\n".join(
        [
            _table(("", "pairs of views per second and core", "peak memory"), clips),
            _table(
                (
                    "",
                    f"seconds per step of {values['batch']} clips, table {values['table']!r}",
                    "seconds to the first step",
                    "peak memory",
                ),
                steps,
            ),
            f"{text} (medians over {values['rounds']} rounds). " + _source(result),
        ]
    )


def prepare_table(result: dict) -> str:
    """benchmarks/prepare.py: the measured rates, and what they make of a million videos."""
    values = result["values"]
    rates = [
        (
            row["what"],
            f"{row['processor_seconds_per_video']:.3f}",
            f"{row['processor_seconds_per_second_of_video']:.3f}",
        )
        for row in values["rows"]
    ]
    per_million = []
    for seconds in (10, 60, 240):
        core_hours = [
            1e6 / 3600 * (row["processor_seconds_per_video"] + seconds * row["processor_seconds_per_second_of_video"])
            for row in values["rows"]
        ]
        amounts = (values[f"bytes_{verb}_per_second_of_video"] * seconds / 1e6 for verb in ("read", "written"))
        per_million.append(
            (
                f"{seconds} s",
                *(f"{hours:,.0f}" for hours in core_hours),
                f"{core_hours[-1] / 800:,.1f} h",
                *(f"{terabytes:,.1f} TB" for terabytes in amounts),
            )
        )
    head = (
        "a million videos of",
        *(f"core-hours, {row['what']}" for row in values["rows"]),
        "on 100 workers of 8 cores",
        "read",
        "written",
    )
    return "\n\n".join(
        [
            _table(("", "processor seconds per video", "and per second of video"), rates),
            _table(head, per_million),
            f"The lower table follows from the upper one. The command that starts it all needs "
            f"{values['memory_bytes_per_input'] / 1e3:.1f} GB of memory per million inputs. Measured on "
            f"{values['videos']} "
            f"{values['material']}, {values['seconds']:.0f} s in all, median of {values['rounds']} rounds. "
            + _source(result),
        ]
    )


def shots_table(result: dict) -> str:
    """benchmarks/shots.py: what is found of each kind of boundary."""
    if not result:
        return "Not measured yet."

    def part(row: dict, kind: str) -> str:
        return "{} of {}".format(*row["found"][kind]) if kind in row["found"] else ""

    kinds = ("cut", "fade", "dissolve")
    rows = [
        (row["material"], row["what"], *(part(row, kind) for kind in kinds), row["false"], row["f1"] or "")
        for row in result["values"]["rows"]
    ]
    head = ("videos", "detector", "hard cuts", "fades", "dissolves", "false", "F1")
    return _table(head, rows) + "\n\n" + _source(result)


def protocols_table(result: dict, protocol: str) -> str:
    """benchmarks/protocols.py: memory and estimated time of a protocol's full-size steps."""
    rows = []
    for row in result["values"]["rows"].values():
        if not row["config"].startswith(protocol):
            continue
        estimate = row.get("estimate", {})
        rows.append(
            (
                row["config"].split(":")[1],
                row["topology"],
                row["batch"],
                f"{row['memory_total'] / 1e9:.1f} of {row['memory_of_device'] / 1e9:.1f}" if estimate else "",
                "yes" if row["fits"] else "no",
                *((f"{1e3 * estimate['step_seconds']:.0f}", f"{24 * estimate['days']:.1f}") if estimate else ("", "")),
            )
        )
    head = ("config", "topology", "batch", "memory, GB a device", "fits", "step, ms", "hours of one run")
    return _table(head, rows) + (
        "\n\nEstimates, nothing of this size has been run: `gpu:h100x8` is the step compiled for eight simulated CPU "
        "devices, with a roofline, so no step is faster and most are slower; v5e the TPU compiler's own cycles (see "
        "[plan.md](plan.md)). Reading the data and testing are not in it. " + _source(result)
    )


def gpu_table(result: dict) -> str:
    """benchmarks/gpu.py: images per second of a step, ours beside the better PyTorch; a dash: not measured."""

    def rate(part: dict) -> str:
        return f"{part['images_per_second']:.0f}" if "images_per_second" in part else "-"

    def peak(part: dict) -> str:
        return f"{part['peak_memory_mb'] / 1e3:.1f} GB" if "peak_memory_mb" in part else "-"

    rows = []
    for row in result["values"]["rows"]:
        ours, peer = row["ours"], row["peer"].get("modes", {}).get(row.get("best_peer"), {})
        utilisation = f"{ours['utilisation']:.0%}" if "utilisation" in ours else "-"
        ratio = f"{row['rate_ratio']:.2f}" if "rate_ratio" in row else "-"
        what = row["what"] + (" (ended with an error: see below)" if "error" in ours else "")
        rows.append((what, rate(ours), rate(peer), ratio, utilisation, peak(ours), peak(peer)))
    head = ("step", "images/s", "PyTorch's best", "ratio", "utilisation", "peak memory", "PyTorch's")
    values, versions = result["values"], result["versions"]
    cosines = [
        f"{row['parity']['gradient_cosine']:.2f} ({row['row']})"
        for row in values["rows"]
        if "gradient_cosine" in row.get("parity", {})
    ]
    parity = f"The bfloat16 gradient's cosine with float32's, at random weights: {', '.join(cosines)}. "
    source = (
        f"On one {values['gpu']['name']}, whose own matrix product reaches {values['matrix_peak_tflops']:.0f} TFLOP/s; "
        f"jax {versions['jax']}, torch {versions['torch']}. "
    )
    return f"{_table(head, rows)}\n\n{parity if cosines else ''}{source}{_source(result)}"


# Config that benchmarks/plan.py has planned -> the row of its paper.
PLANNED = {
    "vito": "VITO, 300 epochs",
    "vivi-ex4": "VIVI-Ex(4)",
    "vivi-ex4-big": "VIVI-Ex(4)-Big",
    "vivi-ex4-co100": "VIVI-Ex(4)-Co(100%)",
    "vivi-ex4-co100-big-aa": "VIVI-Ex(4)-Co(100%)-Big",
    "vdim-datakinetics600": "VDIM on Kinetics-600",
}


def pretraining_table(result: dict) -> str:
    """benchmarks/plan.py: what the papers' runs would cost where they fit, at the papers' batch."""
    planned = result["values"]["rows"].items()
    rows = [
        (
            PLANNED[row["config"]],
            f"`{command.split()[0]}`" + "".join(f" `{flag}`" for flag in command.split()[2:]),
            row["topology"],
            row["devices"],
            f"{row['estimate']['steps']:,}",
            f"{24 * row['estimate']['days']:.1f}",
            f"{24 * row['estimate']['days'] * row['devices']:,.0f}",
        )
        for name in PLANNED
        for command, row in planned
        if row["config"] == name and row["fits"] and "batch_size" not in command
    ]
    head = ("row", "config and flags", "hardware", "devices", "steps", "hours", "device-hours")
    return _table(head, rows) + "\n\n" + _source(result)


def knn_of_vito(result: dict, when: str) -> str:
    """benchmarks/learning.py: the median over seeds of VITO's k-NN accuracy."""
    (row,) = (
        row
        for row in result["values"]["rows"]
        if (row["method"], row["measure"], row["when"]) == ("VITO", "knn_top1", when)
    )
    return f"{row['median']:.1%}"


def reliability_table(result: dict) -> str:
    """benchmarks/faults: each row's cases and what went wrong; rows that are not there are "not measured"."""
    counted = ("faults", "damages", "files", "killed", "stopped", "cases", "changes", "steps", "checkpoints")
    head = ("", "fault", "how many", "what went wrong", "took", "measured")
    measured, lines, sums = result["values"]["rows"], [], dict.fromkeys(("faults", "damages", "files"), 0)
    for name, what in ROWS.items():
        if name not in measured:
            lines.append((name, what, "not measured", "", "", ""))
            continue
        row = measured[name]
        cases = row.get("not measured") or next((f"{row[key]:,} {key}" for key in counted if key in row), "")
        wrong = "; ".join(sorted(set(row["wrong"]))).replace("\n", " ").replace("|", "/")
        when = f"{row['date']}, {row['commit'][:7]}" + ("" if row["size"] == "--full" else f", {row['size']}")
        lines.append((name, what, cases, wrong or "nothing", f"{row['seconds']} s", when))
        for unit in sums:
            sums[unit] += row.get(unit, 0)
    if not measured:
        return _table(head, lines)
    text = (
        f"{sums['faults']:,} kills and signals, {sums['damages']:,} damages of files and {sums['files']:,} damaged "
        "videos in all."
    )
    if "children_peak_mb" in measured.get("R15", {}):
        hostile = measured["R15"]
        text += (
            f" A decoding child took at most {hostile['children_peak_mb']:.0f} MiB of memory; its address space is "
            f"limited to {hostile['limit_mb']}. Decoders that crashed, in their child: "
            f"{hostile['decoder crashes, contained']}."
        )
    if "times_as_long_as_the_usual_step" in measured.get("R5 reproducible", {}):
        times = measured["R5 reproducible"]["times_as_long_as_the_usual_step"]
        text += f" On one device the small step takes {times} times as long with `config.reproducible` as without."
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{_table(head, lines)}\n\n{text} {_source(result)} Versions: {versions}."


def bucket_kills_table(result: dict) -> str:
    """benchmarks/bucket_kills.py: each row's kills and stops, and what went wrong."""
    if not result:
        return "Not measured yet."
    lines = []
    for name, row in result["values"]["rows"].items():
        moments = ", ".join(f"{count} {moment}" for moment, count in sorted(row["moments"].items()))
        slowest = f"{max(row['seconds_to_end']):.1f} s" if "seconds_to_end" in row else ""
        wrong = "; ".join(sorted(set(row["wrong"]))).replace("|", "/") or "nothing"
        when = f"{row['date']}, {row['commit'][:7]}"
        lines.append((name, moments, row["amid_saves"], row["runs"], slowest, wrong, f"{row['seconds']} s", when))
    head = ("", "strikes", "left a half checkpoint", "runs", "slowest stop", "what went wrong", "took", "measured")
    return f"{_table(head, lines)}\n\n{_source(result)}"


def guards_table(result: dict) -> str:
    """benchmarks/guards.py: a step in the loop and a verified restore, against the bare ones."""
    if not result:
        return "Not measured yet."
    v = result["values"]
    rows = [
        (f"step of {v['batch']} clips at {v['image_size']} px, ResNet-50", "step", "1.01"),
        (f"restore of {v['checkpoint_mb']:.0f} MB", "restore", "1.1"),
    ]
    lines = [
        (what, f"{v[f'{key}_seconds']:.3g} s", f"{v[f'bare_{key}_seconds']:.3g} s", f"{v[f'{key}_ratio']:.3f}", bound)
        for what, key, bound in rows
    ]
    return (
        _table(("", "with guards", "bare", "ratio", "at most"), lines)
        + f"\n\nMedians over {v['rounds']} rounds. Before a save, all values are looked at: "
        + f"{v['finite_check_seconds']:.2g} s. {_source(result)}"
    )


def performance_table(result: dict) -> str:
    """benchmarks/all.py: each target, and whether the newest measurement meets it."""

    def line(row: dict) -> tuple:
        target = f"{'at most' if row['at_most'] else 'at least'} {row['bound']:g}{row['unit']}"
        if "figure" not in row:
            return row["what"], target, "not measured", "", ""
        of = row["of"]
        source = f"`{of['command']}`, {of['date']}, {of['on']}"
        return row["what"], target, f"{row['figure']:.3g}{row['unit']}", "met" if row["met"] else "not met", source

    return _table(("", "target", "measured", "", "by"), [line(row) for row in result["values"]["rows"]])


def tried_table(result: dict) -> str:
    """docs/results/tried.json, written by hand: changes that were tried for speed, and what came of them."""
    rows = [(row["what"], row["predicted"], row["seen"], row["how"]) for row in result["values"]["rows"]]
    return _table(("what", "predicted", "seen", "how"), rows) + "\n\n" + _source(result)


def small_paper_table(result: dict) -> str:
    """benchmarks/small_paper: each direction in the paper and here."""
    if not result:
        return "Not measured yet."
    values, lines = result["values"], []
    for row in values["rows"]:
        ours = error = ""
        if row["mean"] is not None:
            ours = f"{100 * row['mean']:+.1f}"
        if row["error"] is not None:
            error = f"{100 * row['error']:.1f}"
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        seeds = f"{row['seeds']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
        compared = (row["claim"], row["where"], row["figure"], MEASURE_NAMES[row["measure"]])
        lines.append((*compared, ours, error, p, seeds, row["verdict"]))
    verdicts = collections.Counter(row["verdict"] for row in values["rows"])
    head = (
        "the paper's claim",
        "where",
        "its figure",
        "measured here by",
        "points",
        "standard error",
        "p",
        "seeds",
        "",
    )
    return (
        f"{_table(head, lines)}\n\n"
        f"{'; '.join(f'{verdict}: {count}' for verdict, count in sorted(verdicts.items()))}. {values['trainings']} of "
        f"{values['wanted']} trainings, {values['processor_hours']:.1f} hours of a core. {_source(result)}"
    )


MEASURE_NAMES = {
    "knn_top1": "k-NN",
    "linear_top1": "linear probe",
    "few_labels_top1": "fine-tuning, few labels",
    "propagation": "label propagation, J",
    "robustness": "PM-10 minus PM-0",
    "action_top1": "fine-tuning on actions",
    "action_gain": "fine-tuning on actions, minus from scratch",
}


def small_paper_settings_table(result: dict) -> str:
    """benchmarks/small_paper: means of every setting."""
    if not result:
        return "Not measured yet."

    def share(measures: dict, name: str) -> str:
        if name not in measures:
            return ""
        deviation = measures[name]["deviation"]
        return f"{measures[name]['mean']:.1%}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")

    columns = ("knn_top1_untrained", "knn_top1", "linear_top1", "few_labels_top1", "propagation", "action_top1")
    lines = [
        (
            row["setting"],
            f"`{row['config']}`",
            *(share(row["measures"], name) for name in columns),
            f"{row['trained']}" + (f", {row['diverged']} diverged" if row["diverged"] else ""),
            "" if row["processor_seconds"] is None else f"{row['processor_seconds']:.0f}",
        )
        for row in result["values"]["settings"]
    ]
    head = (
        "setting",
        "config",
        "k-NN, untrained",
        *(MEASURE_NAMES[name] for name in columns[1:]),
        "seeds",
        "core-seconds",
    )
    return _table(head, lines) + "\n\nMean ± standard deviation over the seeds. " + _source(result)


# marker -> (file in docs/results, its contents -> Markdown)
TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "input": ("input", input_table),
    "prepare": ("prepare", prepare_table),
    "shots": ("shots", shots_table),
    "step": ("step", step_table),
    "learning": ("learning", learning_table),
    "small_paper": ("small_paper", small_paper_table),
    "small_paper.settings": ("small_paper", small_paper_settings_table),
    "small_paper.rendering": (
        "small_paper_rendering",
        lambda result: "{ratio:.1f} times as long as ({scene_ms:.2f} and {shape_ms:.2f} ms)".format(**result["values"]),
    ),
    "transfer": ("transfer", transfer_table),
    "davis": ("davis", davis_table),
    "vtab": ("vtab", vtab_table),
    "vivi_learning": ("vivi_learning", vivi_learning_table),
    "vivi": ("vivi", vivi_table),
    "vdim_learning": ("vdim_learning", vdim_learning_table),
    "vdim": ("vdim", vdim_table),
    "segmentation": ("protocols", lambda result: protocols_table(result, "segmentation")),
    "detection": ("protocols", lambda result: protocols_table(result, "detection")),
    "action": ("protocols", lambda result: protocols_table(result, "action")),
    "tried": ("tried", tried_table),
    "performance": ("performance", performance_table),
    "reliability": ("reliability", reliability_table),
    "bucket_kills": ("bucket_kills", bucket_kills_table),
    "guards": ("guards", guards_table),
    "gpu": ("gpu", gpu_table),
    "gpu_vito": ("gpu_vito", gpu_table),
    "pretraining": ("plan", pretraining_table),
    "learning.untrained": ("learning", lambda result: knn_of_vito(result, "untrained")),
    "learning.trained": ("learning", lambda result: knn_of_vito(result, "trained")),
    "input.of_decode": ("input", lambda result: f"{result['values']['ratio_to_bare_decode']:.2f}"),
    "input.over_reader": ("input", lambda result: f"{result['values']['ratio_to_clip_reader']:.0f}x"),
}


# Tables that say of each row whether it is measured need not wait for the first: what they are made of until then.
NOTHING_MEASURED: dict[str, dict] = {
    "reliability": {"values": {"rows": {}}},
    "guards": {},
    "shots": {},
    "small_paper": {},
    "small_paper.settings": {},
    "bucket_kills": {},
}


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _source(result: dict) -> str:
    """Where the figures above come from."""
    machine = result["machine"]
    return f"`{result['command']}`, {result['date']}, {machine['cores']} cores of {machine['cpu']}."


def fill(text: str, results: pathlib.Path) -> str:
    """Replaces what stands between the markers of a Markdown text by what the folder of results says.

    Raises:
      TableError: an unknown name, an unmatched marker, or a missing or unreadable measurement.
    """

    def replacement(match: re.Match) -> str:
        start, name, old, end = match.groups()
        new = _contents(name, results)
        return f"{start}\n{new}\n{end}" if "\n" in old or "\n" in new else start + new + end

    unmatched = _OPENING.search(_MARKED.sub("", text))
    if unmatched:
        raise TableError(f"{unmatched[0]} has no partner: markers are <!-- table:NAME --> and <!-- /table:NAME -->")
    return _MARKED.sub(replacement, text)


def _contents(name: str, results: pathlib.Path) -> str:
    if name not in TABLES:
        raise TableError(f"no table {name!r}; benchmarks/tables.py has {', '.join(sorted(TABLES))}")
    file, format_result = TABLES[name]
    path = results / f"{file}.json"
    try:
        return format_result(json.loads(path.read_text()))
    except FileNotFoundError as e:
        if name in NOTHING_MEASURED:
            return format_result(NOTHING_MEASURED[name])
        raise TableError(f"table {name!r} needs {path}: measure it first") from e
    except (ValueError, KeyError) as e:
        raise TableError(f"table {name!r} cannot be made from {path} ({e!r}): measure it again") from e


def update(root: pathlib.Path, *, check: bool) -> list[str]:
    """Fills README.md and docs/*.md below root; with `check` writes nothing.

    Returns:
      Names of the files that were out of date.

    Raises:
      TableError: as fill does, with the file named.
    """
    stale = []
    for path in sorted([*root.glob("README.md"), *root.glob("docs/*.md")]):
        name, old = str(path.relative_to(root)), path.read_text()
        try:
            new = fill(old, root / "docs" / "results")
        except TableError as e:
            raise TableError(f"{name}: {e}") from e
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    return stale


def main(argv: list[str] | None = None, root: pathlib.Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args(argv).check
    try:
        stale = update(root, check=check)
    except TableError as e:
        sys.exit(f"error: {e}")
    if check and stale:
        sys.exit(f"error: out of date: {', '.join(stale)}; run python -m benchmarks.tables")
    print("\n".join(f"wrote {name}" for name in stale) or "nothing to change")


if __name__ == "__main__":
    main()
