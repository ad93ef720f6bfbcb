"""DAVIS' measures of a mask against the truth: region similarity J and boundary accuracy F, and their statistics.

J and F: Perazzi et al. 2016, section 4; details as in the official davis2017-evaluation.
"""

from collections.abc import Callable

import cv2
import numpy as np

from evaluation.protocols.davis.data import Sequence

TOLERANCE = 0.008  # of the image's diagonal: how far apart boundaries may be and still match


def region_similarity(truth: np.ndarray, predicted: np.ndarray) -> float:
    """J: intersection over union of two bool[H, W]; 1 if both are empty."""
    union = (truth | predicted).sum()
    return float((truth & predicted).sum() / union) if union else 1.0


def boundary_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F: harmonic mean of the precision and recall of the boundary of one bool[H, W] against that of the other.

    A boundary pixel is right if the other boundary is within ceil(0.008 * diagonal) pixels. Without any boundary on
    both sides F is 1, on one side 0.
    """
    radius = np.ceil(TOLERANCE * np.linalg.norm(truth.shape))
    true_edge, found_edge = boundary(truth), boundary(predicted)
    if not (true_edge.any() and found_edge.any()):
        return float(true_edge.any() == found_edge.any())
    precision = (distance_to(true_edge)[found_edge] <= radius).mean()
    recall = (distance_to(found_edge)[true_edge] <= radius).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """bool[H, W]: pixels that differ from their right, lower or lower right neighbour; the image's edge is none."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def distance_to(pixels: np.ndarray) -> np.ndarray:
    """float32[H, W]: Euclidean distance to the nearest of these pixels, exact but for rounding (hence 1e-3 off it)."""
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) - 1e-3


def statistics(values: np.ndarray) -> dict[str, float]:
    """{"mean", "recall": share above 0.5, "decay": mean of the first quarter - mean of the last} over frames.

    Neighbouring quarters share the frame between them, as in the official code.
    """
    borders = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = (values[borders[q] : borders[q + 1] + 1] for q in (0, 3))
    return {
        "mean": float(values.mean()),
        "recall": float((values > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def score_sequence(sequence: Sequence, predicted: Callable[[int], np.ndarray]) -> list[dict]:
    """[{"J": statistics, "F": statistics} of object 1, 2, ...]; the first frame is given and the last left out.

    Args:
      predicted: frame number -> uint8[H, W] object numbers.
    """
    values = np.zeros((2, sequence.objects, len(sequence.frames) - 2))
    for i in range(1, len(sequence.frames) - 1):
        truth, found = sequence.mask(i), predicted(i)
        for k in range(sequence.objects):
            pair = truth == k + 1, found == k + 1
            values[:, k, i - 1] = region_similarity(*pair), boundary_accuracy(*pair)
    return [{"J": statistics(values[0, k]), "F": statistics(values[1, k])} for k in range(sequence.objects)]


def overall(objects: list[dict]) -> dict[str, float]:
    """{"J&F", "J_mean", "J_recall", "J_decay", "F_mean", ...}: means over all objects of all sequences."""
    means = {
        f"{measure}_{name}": float(np.mean([scores[measure][name] for scores in objects]))
        for measure in "JF"
        for name in ("mean", "recall", "decay")
    }
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2, **means}
