"""Detection scores as Markdown, and test images with their boxes."""

import pathlib
import urllib.parse

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.protocols.detection.data import DetectionSet, Id, read_image

_SHOWN_SCORE = 0.3  # detections below it are not drawn


def spread(repeats: dict[str, dict]) -> dict[str, float | None]:
    """The standard deviation of AP over the repeats (n - 1; None of one)."""
    aps = [scores["AP"] for scores in repeats.values()]
    return {"AP_std": float(np.std(aps, ddof=1)) if len(aps) > 1 else None}


def markdown(result: dict) -> str:
    """A row per repeat and their mean, in per cent; "-" where the set has nothing of the kind."""
    names = [name for name in result if name.startswith(("AP", "AR")) and name != "AP_std"]

    def line(label: str, scores: dict) -> str:
        shown = ["-" if scores[name] < 0 else f"{100 * scores[name]:.1f}" for name in names]
        return f"| {label} | {' | '.join(shown)} |"

    first = next(iter(result["repeats"].values()))
    std = (
        "" if result["AP_std"] is None else f" AP's standard deviation over the repeats: {100 * result['AP_std']:.2f}."
    )
    return "\n".join(
        [
            f"# Detection: {result['config']}",
            "",
            f"Encoder: {result['checkpoint']}. Data: {result['data']}: trained on {first['train_images']} images, "
            f"scored on {first['test_images']}. Boxes, metric {first['metric']}, in per cent.{std}",
            "",
            f"| repeat | {' | '.join(names)} |",
            "| --- " * (1 + len(names)) + "|",
            *(line(name, scores) for name, scores in result["repeats"].items()),
            line("mean", result),
            "",
        ]
    )


def pictures(dataset: DetectionSet, truth: dict, rows: list[dict], folder: pathlib.Path, count: int) -> None:
    """Writes the first `count` images to folder/IMAGE_ID.png: labelled boxes left, detected ones right.

    In the name, what is no letter, number or one of "_.-~" stands as in addresses, "/" as "%2F".
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    for i in range(min(count, len(dataset))):
        image_id = dataset.image_ids[i]
        labelled = [row for row in truth["annotations"] if row["image_id"] == image_id]
        detected = [row for row in rows if row["image_id"] == image_id and row["score"] >= _SHOWN_SCORE]
        name = f"{urllib.parse.quote(str(image_id), safe='')}.png"
        picture(read_image(dataset, i), labelled, detected, names).savefig(folder / name, dpi=100)


def picture(image: np.ndarray, labelled: list[dict], detected: list[dict], names: dict[Id, str]) -> Figure:
    colours = {i: f"C{k % 10}" for k, i in enumerate(names)}
    height, width = image.shape[:2]
    figure = Figure(figsize=(10, 5.0 * height / width + 0.4), layout="constrained")
    for axes, title, rows in zip(
        figure.subplots(1, 2),
        (f"labelled: {len(labelled)}", f"detected: {len(detected)}"),
        (labelled, detected),
        strict=True,
    ):
        axes.imshow(image)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
        for row in sorted(rows, key=lambda row: row.get("score", 1.0)):
            x, y, w, h = row["bbox"]
            colour = colours[row["category_id"]]
            axes.add_patch(
                Rectangle((x, y), w, h, fill=False, lw=1.5, ec=colour, ls="--" if row.get("iscrowd") else "-")
            )
            score = f" {row['score']:.2f}" if "score" in row else ""
            axes.text(
                x,
                y,
                names[row["category_id"]] + score,
                fontsize=6,
                color="white",
                va="bottom",
                bbox=dict(fc=colour, ec="none", pad=0.8),
                clip_on=True,
            )
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
    return figure
