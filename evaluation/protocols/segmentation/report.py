"""What segmentation leaves behind: the mean over repeats, a table, and predictions drawn over their images."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evaluation.protocols.segmentation.data import IGNORE

OPACITY = 0.6  # of the classes over the image


def over_repeats(repeats: list[dict], class_names: tuple[str, ...]) -> dict:
    """{"miou", "miou_std": over the repeats, "pixel_accuracy", "iou": {class: mean or None}}."""
    miou = [repeat["miou"] for repeat in repeats]
    iou = {}
    for c, name in enumerate(class_names):
        values = [repeat["iou"][c] for repeat in repeats if repeat["iou"][c] is not None]
        iou[name] = float(np.mean(values)) if values else None
    return {
        "miou": float(np.mean(miou)),
        "miou_std": float(np.std(miou)),
        "pixel_accuracy": float(np.mean([repeat["pixel_accuracy"] for repeat in repeats])),
        "iou": iou,
    }


def markdown(result: dict) -> str:
    rows = [
        f"| {i} | {100 * r['miou']:.1f} | {100 * r['pixel_accuracy']:.1f} | {r['steps']} |"
        for i, r in enumerate(result["repeats"])
    ]
    classes = [
        f"| {name} | {'-' if value is None else f'{100 * value:.1f}'} |" for name, value in result["iou"].items()
    ]
    return "\n".join(
        [
            f"# Semantic segmentation: {result['config']}",
            "",
            f"Encoder: {result['checkpoint']}. Data: {result['data']}, {result['train_images']} images for training, "
            f"{result['val_images']} for the score.",
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


def palette() -> np.ndarray:
    """uint8[256, 3]: PASCAL VOC's colours, which DAVIS uses too; the bits of a number dealt out to red, green, blue."""
    numbers = np.arange(256)
    bits = (numbers[:, None] >> np.arange(8)) & 1  # [256, 8], lowest first
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):  # bit 0 is red's highest, 1 green's, 2 blue's, 3 red's second highest, ...
        colours[:, bit % 3] |= (bits[:, bit] << (7 - bit // 3)).astype(np.uint8)
    return colours


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
    handles = [Patch(color=palette()[c] / 255, label=class_names[c]) for c in shown if c < len(class_names)]
    figure.legend(handles=handles[:24], loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, format="png")
