"""What a curation kept, of which class, and why it dropped the rest: JSON values, Markdown and a picture."""

import collections
import io
import math

import numpy as np
from matplotlib.figure import Figure

INK, MUTED, FOUND, KEPT = "#1b1f24", "#68707a", "#cfd6de", "#2f6f9f"
# VITO 3.3: 1000 classes x 5,000 clips retrieved; "1,180,042 videos in total".
PAPER = {"lines": 5_000_000, "kept": 1_180_042, "source": "VITO, section 3.3"}
_SHOWN = 40  # classes with a name under their bar


def summarise(decisions: list[dict], class_names: list[str]) -> dict:
    """Counts over all decisions; every line is in exactly one of "kept" and "reasons".

    "balance" is over the kept videos per class: "effective_classes" = exp(entropy), the number of equally frequent
    classes that would be as diverse.
    """
    again = [row["reason"].startswith("again:") for row in decisions]
    found = collections.Counter(
        name for row, counted in zip(decisions, again, strict=True) if not counted for name in row["candidates"]
    )
    kept = collections.Counter(row["class"] for row in decisions if row["status"] == "kept")
    reasons = collections.Counter(row["reason"].split(":")[0] for row in decisions if row["status"] == "dropped")
    counts = np.array([kept[name] for name in class_names])
    share = counts[counts > 0] / max(counts.sum(), 1)
    balance = {
        "classes": len(class_names),
        "without_a_video": int((counts == 0).sum()),
        "least": int(counts.min()),
        "median": float(np.median(counts)),
        "most": int(counts.max()),
        "effective_classes": round(math.exp(-float((share * np.log(share)).sum())), 3) if len(share) else 0,
    }
    return {
        "lines": len(decisions),
        "kept": int(counts.sum()),
        "kept_share": round(int(counts.sum()) / len(decisions), 6),
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "paper": PAPER,
        "kept_seconds": round(sum(row["seconds"] for row in decisions if row["status"] == "kept"), 3),
        "balance": balance,
        "per_class": [{"class": name, "candidates": found[name], "kept": kept[name]} for name in class_names],
    }


def markdown(report: dict, meaning: dict[str, str]) -> str:
    """The report as text; `meaning` explains each word of report["reasons"]."""
    balance, paper = report["balance"], report["paper"]
    lines = [
        "# Curated videos",
        "",
        f"{report['kept']:,} of {report['lines']:,} lines of the manifest were kept ({report['kept_share']:.1%}), "
        f"{report['kept_seconds'] / 3600:,.1f} hours. The paper kept {paper['kept']:,} of {paper['lines']:,} "
        f"({paper['kept'] / paper['lines']:.1%}; {paper['source']}).",
        "",
        "| dropped | lines | because |",
        "| --- | --- | --- |",
        *(f"| {reason} | {count:,} | {meaning[reason]} |" for reason, count in report["reasons"].items()),
        "",
        f"Of {balance['classes']:,} classes {balance['without_a_video']:,} have no video; a class has "
        f"{balance['least']:,} to {balance['most']:,}, median {balance['median']:,.0f}. The classes are as diverse as "
        f"{balance['effective_classes']:,.1f} equally frequent ones.",
        "",
        "![kept videos per class](report.png)",
        "",
        "| class | title names it | kept |",
        "| --- | --- | --- |",
        *(f"| {row['class']} | {row['candidates']:,} | {row['kept']:,} |" for row in report["per_class"]),
        "",
    ]
    return "\n".join(lines)


def picture(report: dict) -> bytes:
    """PNG: videos per class, those kept in front of those whose title names it; and the reasons."""
    rows = sorted(report["per_class"], key=lambda row: (-row["kept"], -row["candidates"], row["class"]))
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    classes, reasons = figure.subplots(1, 2, width_ratios=(2.2, 1))
    x = np.arange(len(rows))
    classes.bar(x, [row["candidates"] for row in rows], 0.82, color=FOUND, label="title names the class")
    classes.bar(x, [row["kept"] for row in rows], 0.82, color=KEPT, label="kept")
    if len(rows) <= _SHOWN:
        classes.set_xticks(
            x,
            [row["class"] for row in rows],
            rotation=40 if len(rows) > 6 else 0,
            ha="right" if len(rows) > 6 else "center",
        )
    else:
        classes.set_xlabel("class, most frequent first", color=MUTED)
    classes.set_title(f"{report['kept']:,} of {report['lines']:,} kept", loc="left", color=INK)
    classes.set_ylabel("videos", color=MUTED)
    classes.legend(frameon=False, labelcolor=MUTED)
    names = list(report["reasons"])[::-1]
    bars = reasons.barh(names, [report["reasons"][name] for name in names], 0.6, color="#d9822b")
    reasons.bar_label(bars, fmt="{:,.0f}", padding=3, color=MUTED)
    reasons.set_title("dropped, and why", loc="left", color=INK)
    reasons.margins(x=0.15)
    for axes in (classes, reasons):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
        (axes.yaxis if axes is classes else axes.xaxis).get_major_locator().set_params(integer=True)
    png = io.BytesIO()
    figure.savefig(png, metadata={"Software": None})
    return png.getvalue()
