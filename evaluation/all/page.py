"""One page of all evaluations of a checkpoint: OUT/all.json and all.md, the papers' figures beside each score."""

import pathlib

from evaluation.all.published import PUBLISHED
from vivi_jax import files


def write(out: pathlib.Path, about: dict, rows: list[dict]) -> str:
    """Writes the page, and returns it as Markdown.

    Args:
      about: {"checkpoint", "data", "demo"}.
      rows: of each evaluation {"name", "state": "done", "failed", "to do" or "left out"}, and with "done" {"data",
        "scores": name -> share, "note", "seconds"}, with the others "why", with "failed" also "log".
    """
    report = about | {"evaluations": [row | {"published": published(row["name"])} for row in rows]}
    files.write_json(out / "all.json", report)
    text = markdown(report)
    files.write_text(out / "all.md", text)
    return text


def published(name: str) -> list[dict]:
    """The papers' rows of an evaluation."""
    return [row._asdict() for row in PUBLISHED.get(name, ())]


def markdown(report: dict) -> str:
    """A table for each score, with the papers' rows; then what failed, what is to do, and what was left out and why."""
    rows = report["evaluations"]
    done = [row for row in rows if row["state"] == "done"]
    sources = list(dict.fromkeys(model["source"] for row in done for model in row["published"]))
    lines = [
        f"# All evaluations of {report['checkpoint']}",
        "",
        f"Data: {report['data']}. {len(done)} of {sum(row['state'] != 'left out' for row in rows)} evaluations are "
        "done; all figures in per cent.",
    ]
    if report["demo"]:
        lines += ["", "**Small forms (--demo): these are no scores of the benchmarks.**"]
    for row in done:
        lines += ["", f"## {row['name']}", "", *table(row, sources)]
        lines += ["", f"{row['note']}{row['data']}, {row['seconds'] / 60:.1f} minutes."]
    if sources:
        lines += ["", "## Sources", "", *(f"{n}. {source}" for n, source in enumerate(sources, 1))]
    for state, title in (("failed", "Failed"), ("to do", "Still to do"), ("left out", "Left out")):
        if chosen := [row for row in rows if row["state"] == state]:
            lines += ["", f"## {title}", ""]
            lines += [f"- {row['name']}: {row['why']}" + (f" ({row['log']})" if "log" in row else "") for row in chosen]
    return "\n".join(lines) + "\n"


def table(row: dict, sources: list[str]) -> list[str]:
    """Lines of a table: the score here, then the papers'; a number in brackets is the place of its source."""
    here = {name: 100 * share for name, share in row["scores"].items()}
    models = {f"{m['model']} [{sources.index(m['source']) + 1}]": m["scores"] for m in row["published"]}
    columns = list(dict.fromkeys(name for scores in (here, *models.values()) for name in scores))

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def figures(scores: dict[str, float]) -> list[str]:
        return [f"{scores[name]:.1f}" if name in scores else "" for name in columns]

    return [
        line(["", *columns]),
        line(["---"] * (1 + len(columns))),
        line(["**here**", *figures(here)]),
        *(line([model, *figures(scores)]) for model, scores in models.items()),
    ]


def in_a_line(row: dict) -> str:
    """For the log."""
    if row["state"] == "done":
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in row["scores"].items())
    return f"{row['state']}: {row['why']}"
