"""VTAB scores as JSON, CSV, Markdown and a picture, beside the published ones."""

import csv
import io
import pathlib
import statistics
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from evaluation.protocols.vtab.published import BY_TASK, LEADERBOARD, MEANS
from evaluation.protocols.vtab.tasks import GROUPS, OWN, TASKS, Task
from vivi_jax import files

COLUMNS: tuple[str, ...] = ("task", "group", "accuracy", "repeats", "lr", "steps", "trained_on", "measured_on")


def write(
    workdir: pathlib.Path,
    finals: dict[str, list[dict]],
    *,
    trials: list[dict],
    absent: dict[str, str],
    protocol: str,
    encoder: str,
    official: bool,
) -> dict:
    """Writes WORKDIR/vtab.{json,csv,md,png} and returns what the JSON file holds.

    Args:
      finals: task name -> the results of its final runs, a file of vtab.py each; tasks with missing runs are left out.
      trials: the results of all trial runs, for the cost.
      absent: task name -> the step that brings its data.
      official: False where split sizes were not checked; the tables then say so.
    """
    rows = [row(TASKS[name], finals[name]) for name in TASKS if name in finals]
    report = {
        "encoder": encoder,
        "protocol": protocol,
        "official_sizes": official,
        "tasks": rows,
        "means": means(rows),
        "absent": absent,
        "cost": cost(trials + [result for results in finals.values() for result in results]),
    }
    report["summary"] = summary(report)
    files.write_json(workdir / "vtab.json", report)
    files.write_text(workdir / "vtab.csv", as_csv(rows))
    files.write_text(workdir / "vtab.md", markdown(report))
    if rows:
        with files.atomic(workdir / "vtab.png") as path:
            picture(report).savefig(path, format="png", dpi=150)
    return report


def write_own(
    workdir: pathlib.Path,
    finals: list[dict],
    *,
    trials: list[dict],
    protocol: str,
    encoder: str,
    data: str,
    class_count: int,
) -> dict:
    """Writes WORKDIR/own.{json,md} of own class folders and returns what the JSON file holds.

    Args:
      finals, trials: results of the runs, as of `write`; no finals while they are not all done.
      class_count: of the data.
    """
    report = {"encoder": encoder, "data": data, "protocol": protocol, "classes": class_count}
    if finals:
        report |= {key: value for key, value in row(OWN, finals).items() if key not in ("task", "group")}
    report["trials"] = [{key: trial[key] for key in ("lr", "steps", "accuracy")} for trial in trials]
    report["cost"] = cost(trials + finals)
    report["summary"] = (
        f"fine-tuned on {data}: accuracy {100 * report['accuracy']:.1f} %, the median of {len(finals)} runs"
        if finals
        else f"fine-tuned on {data}: not finished"
    )
    files.write_json(workdir / "own.json", report)
    files.write_text(workdir / "own.md", markdown_own(report))
    return report


def markdown_own(report: dict) -> str:
    """What was trained and measured on what, the final runs, and the trials that chose their setting."""
    lines = [f"{report['summary']}.", "", f"Encoder: {report['encoder']}. {report['classes']} classes."]
    if "accuracy" in report:
        (trained, images), (measured, tests) = report["trained_on"], report["measured_on"]
        lines[2] += f" {images} images to train ({trained}), {tests} for the score ({measured})."
        lines += ["", "| final run | accuracy, % |", "| --- | --- |"]
        lines += [f"| {n} | {100 * accuracy:.1f} |" for n, accuracy in enumerate(report["repeats"])]
    chosen = (report.get("lr"), report.get("steps"))
    lines += ["", "| learning rate | steps | accuracy on validation images, % | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {t['lr']:g} | {t['steps']} | {100 * t['accuracy']:.1f} | "
        f"{'chosen' if (t['lr'], t['steps']) == chosen else ''} |"
        for t in report["trials"]
    ]
    return "\n".join(lines) + "\n"


def row(task: Task, results: list[dict]) -> dict:
    """One task's line: the median of the repeats (VIVI §4), in [0, 1]."""
    repeats = [result["accuracy"] for result in results]
    first = results[0]
    return {
        "task": task.name,
        "group": task.group,
        "accuracy": statistics.median(repeats),
        "repeats": repeats,
        "lr": first["lr"],
        "steps": first["steps"],
        "trained_on": first["trained_on"],
        "measured_on": first["measured_on"],
    }


def means(rows: list[dict]) -> dict[str, dict]:
    """{"all", and each group: {"mean": over its tasks, None without any; "tasks": how many; "of": how many there are}}.

    The mean over "all" weighs tasks equally, not groups.
    """
    result = {}
    for group in ("all", *GROUPS):
        scores = [r["accuracy"] for r in rows if group in ("all", r["group"])]
        total = sum(group in ("all", task.group) for task in TASKS.values())
        result[group] = {"mean": float(np.mean(scores)) if scores else None, "tasks": len(scores), "of": total}
    return result


def cost(results: list[dict]) -> dict:
    """What the runs took together; rates are over the training time."""
    costs = [result["cost"] for result in results]
    total: dict[str, float] = {key: sum(c[key] for c in costs) for key in costs[0]} if costs else {}
    if costs:
        total["images_per_second"] = total["train_images"] / total["train_seconds"]
        everything = total["train_seconds"] + total["measure_seconds"] + total["compile_seconds"]
        total["share_not_in_steps"] = 1 - (total["train_seconds"] - total["wait_seconds"]) / everything
    return {"runs": len(costs), **total}


def summary(report: dict) -> str:
    """One line: the mean and how many tasks it covers."""
    if not report["tasks"]:
        return f"VTAB {report['protocol']}: no task is finished"
    parts = [
        f"{'mean' if name == 'all' else name} {100 * m['mean']:.1f} ({m['tasks']} of {m['of']} tasks)"
        for name, m in report["means"].items()
        if m["tasks"]
    ]
    return f"VTAB {report['protocol']}: {', '.join(parts)}" + (
        "" if report["official_sizes"] else "; split sizes not checked: not VTAB's score"
    )


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for r in rows:
        writer.writerow(
            r
            | {
                "repeats": " ".join(map(repr, r["repeats"])),
                **{key: f"{r[key][0]}:{r[key][1]}" for key in ("trained_on", "measured_on")},
            }
        )
    return text.getvalue()


def markdown(report: dict) -> str:
    """The table, with published columns over the same tasks; VIVI's means; the tasks without data."""
    rows = report["tasks"]
    lines = [
        report["summary"] + ".",
        "",
        f"Encoder: {report['encoder']}. In per cent; published columns: V1, 1000 examples, "
        "task_adaptation's leaderboard; their means are over the tasks of this table.",
        "",
        f"| task | here | {' | '.join(LEADERBOARD)} |",
        "| --- " * (2 + len(LEADERBOARD)) + "|",
    ]
    lines += [table_line(r["task"], [100 * r["accuracy"], *BY_TASK[r["task"]]]) for r in rows]
    for group in ("all", *GROUPS):
        covered = [r for r in rows if group in ("all", r["group"])]
        if covered:
            columns = np.array([[100 * r["accuracy"], *BY_TASK[r["task"]]] for r in covered]).mean(axis=0)
            lines.append(table_line(f"**mean of {len(covered)} {'tasks' if group == 'all' else group}**", columns))
    lines += [
        "",
        "VIVI, table 1 (V1, all 19 tasks):",
        "",
        "| model | mean | natural | specialized | structured |",
        "| --- " * 5 + "|",
        *(table_line(name, values) for name, values in MEANS.items()),
    ]
    lines += ["", *(f"- left out: {step}" for step in report["absent"].values())]
    return "\n".join(lines).rstrip() + "\n"


def table_line(name: str, values: Iterable[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def picture(report: dict) -> Figure:
    """Accuracy per task as bars, the published range of the leaderboard as a line with its supervised entry marked."""
    rows = report["tasks"]
    figure = Figure(figsize=(3.5 + 0.45 * len(rows), 4.2), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(GROUPS, ("#2e8b57", "#0b6e99", "#d9822b"), strict=True))
    supervised = LEADERBOARD.index("Sup-100%")
    for x, r in enumerate(rows):
        published = BY_TASK[r["task"]]
        axes.bar(x, 100 * r["accuracy"], color=colours[r["group"]], width=0.7)
        axes.plot(
            [x, x], [min(published), max(published)], color="#1d2733", lw=1, label="" if x else "lowest to highest"
        )
        axes.plot(x, published[0], "o", ms=4, mfc="white", mec="#1d2733", label="" if x else LEADERBOARD[0])
        axes.plot(x, published[supervised], "o", ms=4, color="#1d2733", label="" if x else LEADERBOARD[supervised])
    axes.set_xticks(range(len(rows)), [r["task"] for r in rows], rotation=60, ha="right")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.margins(x=0.02)
    unchecked = "" if report["official_sizes"] else ", sizes unchecked"
    figure.suptitle(report["summary"].split(",")[0] + unchecked, fontsize=9)
    axes.legend(
        fontsize=8, title="published, V1", title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
