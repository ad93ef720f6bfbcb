"""What segmentation leaves behind: the mean over repeats, a table, and predictions drawn over their images."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evaluation.protocols.masks import palette
from evaluation.protocols.segmentation.data import IGNORE

OPACITY = 0.6  # of the classes over the image


def over_repeats(repeats: dict[str, dict], *, class_names: tuple[str, ...]) -> dict:
    """{"miou_std": of mIoU over the repeats, "iou": {class: mean, None where no repeat has a value}}."""
    iou = {}
    for c, name in enumerate(class_names):
        values = [repeat["iou"][c] for repeat in repeats.values() if repeat["iou"][c] is not None]
        iou[name] = float(np.mean(values)) if values else None
    return {"miou_std": float(np.std([repeat["miou"] for repeat in repeats.values()])), "iou": iou}


def markdown(result: dict) -> str:
    """Tables of the repeats with their mean, and of the classes, in per cent."""
    first = next(iter(result["repeats"].values()))
    rows = [
        f"| {name} | {100 * r['miou']:.1f} | {100 * r['pixel_accuracy']:.1f} | {r['steps']} |"
        for name, r in result["repeats"].items()
    ]
    classes = [
        f"| {name} | {'-' if value is None else f'{100 * value:.1f}'} |" for name, value in result["iou"].items()
    ]
    return "\n".join(
        [
            f"# Semantic segmentation: {result['config']}",
            "",
            f"Encoder: {result['checkpoint']}. Data: {result['data']}, {first['train_images']} images for training, "
            f"{first['val_images']} for the score.",
            "",
            "| repeat | mIoU, % | pixel accuracy, % | steps |",
            "|---|---|---|---|",
            *rows,
            f"| mean | {100 * result['miou']:.1f} (std {100 * result['miou_std']:.1f}) | "
            f"{100 * result['pixel_accuracy']:.1f} | |",
            "",
            "| class | IoU, % (-: neither there nor predicted) |",
            "|---|---|",
            *classes,
            "",
        ]
    )


def overlay(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] image under the colours of its classes uint8[H, W]; class 0 of VOC (black) darkens it."""
    colours = palette()[classes].astype(np.float32)
    return np.where((classes == IGNORE)[..., None], image, (1 - OPACITY) * image + OPACITY * colours).astype(np.uint8)


def draw(
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: tuple[str, ...], path: pathlib.Path
) -> None:
    """Writes a PNG: a row per (image, true classes, predicted classes); pixels that do not count are left clear."""
    figure = Figure(figsize=(9, 0.6 + 2.4 * len(examples)), dpi=100, layout="constrained")
    axes = figure.subplots(len(examples), 3, squeeze=False)
    for row, (image, truth, predicted) in zip(axes, examples, strict=True):
        row[0].imshow(image)
        row[1].imshow(overlay(image, truth))
        row[2].imshow(overlay(image, predicted))
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    shown = np.unique(np.concatenate([classes.ravel() for example in examples for classes in example[1:]]))
    colours = [f"#{colour.tobytes().hex()}" for colour in palette()]
    handles = [Patch(color=colours[c], label=class_names[c]) for c in shown if c < len(class_names)]
    figure.legend(handles=handles[:24], loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, format="png")
