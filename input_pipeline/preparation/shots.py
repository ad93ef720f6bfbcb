"""Shot boundaries from colour histograms.

VIVI (section 4) finds shots by "a simple strategy based on color histograms", after Mas & Fernandez (TRECVID 2003), and
gives neither bins nor thresholds. Inferred: 4x4x4 bins (the two most significant bits of R, G and B) and
d_t = half the L1 distance of the histograms of frames t-1 and t, in [0, 1]. A cut at t: frame t begins a shot.

Only hard cuts are looked for; inside a dissolve or a fade no frame stands out, and it stays part of a shot.
"""

import cv2
import numpy as np

MIN_SHOT_FRAMES = 8  # not in the papers
LOW_RATE_FPS = 5.0  # below, neighbouring frames differ too much for any rule that looks at their surroundings


def histogram(frame_HxWx3: np.ndarray) -> np.ndarray:
    """float32[64] colour histogram of a uint8 frame, sum 1. Every other row and column are enough."""
    counts = cv2.calcHist([frame_HxWx3[::2, ::2]], [0, 1, 2], None, [4, 4, 4], [0, 256] * 3).ravel()
    return counts / counts.sum()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Half the L1 distance of two histograms: 0 = same colours, 1 = no colour in common."""
    return 0.5 * float(np.abs(a - b).sum())


def threshold_rule(d_T: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
    """Score >= 1 where d_t exceeds a threshold: the rule for frames sampled at about 1 Hz, as VIVI's."""
    return d_T / threshold


def derivative_rule(d_T: np.ndarray, *, threshold: float = 0.25) -> np.ndarray:
    """Score >= 1 where d_t rises by more than a threshold over d_{t-1}: Mas & Fernandez; the value is not theirs.

    Motion that begins at once, or a fast fade, raises d_t as a cut does.
    """
    return np.diff(d_T, prepend=0.0) / threshold


def peak_rule(d_T: np.ndarray, *, ratio: float = 2.5, floor: float = 0.06, window: int = MIN_SHOT_FRAMES) -> np.ndarray:
    """Score >= 1 where d_t is an isolated peak: `ratio` times all others within `window` frames, and above `floor`.

    The derivative rule made two-sided: a cut changes the colours once, while motion, fades and flashes change them
    over several frames. The floor is for still scenes, where the noise of the encoder makes tiny isolated peaks.
    """
    padded = np.pad(d_T, window)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1).copy()
    around[:, window] = 0.0
    return d_T / np.maximum(ratio * around.max(axis=1), floor)


RULES = {"threshold": threshold_rule, "derivative": derivative_rule, "peak": peak_rule}


def find_shots(d_T: np.ndarray, fps: float, *, rule: str = "auto", min_frames: int = MIN_SHOT_FRAMES) -> np.ndarray:
    """First frame of every shot.

    Args:
      d_T: float[T] distance of each frame to the one before it; d_T[0] is ignored.
      fps: frames per second.
      rule: a name in RULES, or "auto": "peak", and "threshold" below LOW_RATE_FPS.
      min_frames: shortest shot; of two cuts that are closer the clearer one stays. A shorter video is one shot.

    Returns:
      int32[S] ascending; the first is 0.
    """
    if rule == "auto":
        rule = "peak" if fps >= LOW_RATE_FPS else "threshold"
    d_T = np.array(d_T, np.float64)
    d_T[:1] = 0.0
    score_T = RULES[rule](d_T)
    limits = [0, len(d_T)]  # shots may not be shorter than min_frames at the ends either
    for t in np.argsort(-score_T, kind="stable"):
        if score_T[t] < 1:
            break
        if min(abs(t - limit) for limit in limits) >= min_frames:
            limits.append(int(t))
    return np.array(sorted(set(limits) - {len(d_T)} | {0}), np.int32)
