"""Shot boundaries from colour histograms.

VIVI (section 4) finds shots by "a simple strategy based on color histograms", after Mas & Fernandez (TRECVID 2003), and
gives neither bins nor thresholds. Inferred: 4x4x4 bins (the two most significant bits of R, G and B) and
d_t = half the L1 distance of the histograms of frames t-1 and t, in [0, 1]. A cut at t: frame t begins a shot.

Cuts are looked for among all pictures of a video, at its own rate, however few of them are kept: at 1 Hz, VIVI's rate,
neighbouring frames of one shot may differ as much as those of two. All shots are kept, however short; what is too short
to be used is for the sampler to say (streams/shots.py).

Only hard cuts are looked for; inside a dissolve or a fade no frame stands out, and it stays part of a shot.
"""

import cv2
import numpy as np

LOW_RATE_FPS = 5.0  # below, neighbouring pictures differ so much that cuts need not stand out
PEAK_WINDOW_SECONDS, LEAST_PEAK_WINDOW = 0.32, 3  # what the peak rule looks at on either side; the latter in frames
QUICK_FLOOR = 0.5  # least distance at a cut that need stand out of the pictures beside it only
END_FLOOR = 0.25  # least distance at a cut so near an end that it has surroundings on one side only


def histogram(frame_HxWx3: np.ndarray) -> np.ndarray:
    """float32[64] colour histogram of a uint8 frame, sum 1."""
    counts = cv2.calcHist([frame_HxWx3], [0, 1, 2], None, [4, 4, 4], [0, 256] * 3).ravel()
    return counts / counts.sum()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Half the L1 distance of two histograms: 0 = same colours, 1 = no colour in common."""
    return 0.5 * float(np.abs(a - b).sum())


class Distances:
    """How much each picture of a video differs from the one before it; they are shown one by one."""

    def __init__(self):
        self._histogram: np.ndarray | None = None
        self._distances: list[float] = []

    def add(self, picture_HxWx3: np.ndarray) -> None:
        """The next picture, uint8; a thumbnail will do, of a size that is always the same."""
        before, self._histogram = self._histogram, histogram(picture_HxWx3)
        self._distances.append(0.0 if before is None else distance(before, self._histogram))

    def so_far(self) -> np.ndarray:
        """float64[T], T pictures; that of the first is 0."""
        return np.array(self._distances)


def threshold_rule(d_T: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
    """Score >= 1 where d_t exceeds a threshold: the rule for frames sampled at about 1 Hz, as VIVI's."""
    return d_T / threshold


def derivative_rule(d_T: np.ndarray, *, threshold: float = 0.25) -> np.ndarray:
    """Score >= 1 where d_t rises by more than a threshold over d_{t-1}: Mas & Fernandez; the value is not theirs.

    Motion that begins at once, or a fast fade, raises d_t as a cut does.
    """
    return np.diff(d_T, prepend=0.0) / threshold


def peak_rule(d_T: np.ndarray, *, ratio: float = 2.5, floor: float = 0.06, window: int = 8) -> np.ndarray:
    """Score >= 1 where d_t is an isolated peak: `ratio` times all others within `window` frames, and above `floor`.

    The derivative rule made two-sided: a cut changes the colours once, while motion, fades and flashes change them
    over several frames. The floor is for still scenes, where the noise of the encoder makes tiny isolated peaks.
    """
    padded = np.pad(d_T, window)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1).copy()
    around[:, window] = 0.0
    return d_T / np.maximum(ratio * around.max(axis=1), floor)


RULES = {"threshold": threshold_rule, "derivative": derivative_rule, "peak": peak_rule}


def find_shots(d_T: np.ndarray, fps: float, *, rule: str = "auto") -> np.ndarray:
    """First picture of every shot.

    Args:
      d_T: float[T] distance of each picture to the one before it; d_T[0] is ignored.
      fps: pictures per second.
      rule: a name in RULES, or "auto": "peak", and below LOW_RATE_FPS also what "threshold" finds. With "peak" a change
        of half of the pixels is a cut too, however soon others follow.

    Returns:
      int64[S] ascending; the first is 0.
    """
    d_T = np.array(d_T, np.float64)
    d_T[:1] = 0.0
    scores = [RULES[rule](d_T)] if rule not in ("auto", "peak") else [_peaks(d_T, fps)]
    if rule == "auto" and fps < LOW_RATE_FPS:
        scores.append(threshold_rule(d_T))
    score_T = np.max(scores, axis=0)
    return np.concatenate([[0], np.flatnonzero(score_T >= 1)])


def _peaks(d_T: np.ndarray, fps: float) -> np.ndarray:
    """Score of the peak rule over a window in seconds, stricter at the ends of the video, and with quick cuts."""
    window = max(round(PEAK_WINDOW_SECONDS * fps), LEAST_PEAK_WINDOW)
    score_T, t = peak_rule(d_T, window=window), np.arange(len(d_T))
    at_an_end = (t <= window) | (t >= len(d_T) - window)
    score_T = np.where(at_an_end, np.minimum(score_T, d_T / END_FLOOR), score_T)
    # Of quick cuts none stands out of its surroundings. Of a flash of one picture neither change does here.
    return np.maximum(score_T, np.minimum(d_T / QUICK_FLOOR, peak_rule(d_T, window=1)))


def on_grid(starts_S: np.ndarray, shown_K: np.ndarray) -> np.ndarray:
    """First frame of every shot, of the frames that are kept.

    Args:
      starts_S: int[S] first picture of every shot, see find_shots.
      shown_K: int[K] ascending, which picture each frame shows.

    Returns:
      int64[s], s <= S, ascending; the first is 0. A shot without a frame is none.

    >>> on_grid(np.array([0, 5, 6, 35]), np.array([0, 10, 20, 30])).tolist()
    [0, 1]
    """
    return np.unique(np.searchsorted(shown_K, starts_S)[np.asarray(starts_S) <= shown_K[-1]])
