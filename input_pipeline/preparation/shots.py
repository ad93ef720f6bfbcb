"""Shot boundaries from colour histograms.

VIVI (section 4) finds shots by "a simple strategy based on color histograms", after Mas & Fernandez (TRECVID 2003), and
gives neither bins nor thresholds. Inferred: 4x4x4 bins (the two most significant bits of R, G and B) and
d_t = half the L1 distance of the histograms of frames t-1 and t, in [0, 1]. A cut at t: frame t begins a shot.

Cuts are looked for among all pictures of a video, at its own rate, however few of them are kept: at 1 Hz, VIVI's rate,
neighbouring frames of one shot may differ as much as those of two. All shots are kept, however short; what is too short
to be used is for the sampler to say (streams/shots.py).

In a fade or a dissolve no picture stands out: Transitions finds them by what they do to the contrast. A transition is
one boundary, at its middle. So every frame is of a shot, as the store has it, which knows where shots start only, and
the samplers need not know of transitions: a frame within one shows most of the shot that it counts as.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

LOW_RATE_FPS = 5.0  # below, neighbouring pictures differ so much that cuts need not stand out
PEAK_WINDOW_SECONDS, LEAST_PEAK_WINDOW = 0.32, 3  # what the peak rule looks at on either side; the latter in frames
QUICK_FLOOR = 0.5  # least distance at a cut that need stand out of the pictures beside it only
END_FLOOR = 0.25  # least distance at a cut so near an end that it has surroundings on one side only

# Of fades and dissolves. Chosen on rendered shots of other seeds than the tests', and on the real samples spliced.
TRANSITION_FPS = 25.0  # of pictures at least twice as fast as that, every second, third, ... is looked at
HALF_LENGTHS = (0.2, 0.3, 0.45, 0.7, 1.0)  # s, tried as half of a dissolve
FADE_SECONDS = 1.2  # the longest way from full contrast to none
LEAST_CONTRAST = 10.0  # standard deviation of a picture with contents, grey levels
LEAST_SCORE = 0.22  # of a dissolve
LEAST_LOSS = 0.1  # of edges, at its middle; 0.25 where those of the two scenes lie apart
LIKE = 0.8  # correlation of two pictures of one scene
_NO_SCORE = math.log(1e-4)
_SMALL_SIDE = 16  # pixels: so few that slow motion within a shot hardly matters
_BLOCK = 64  # pictures that are scored together


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

    def add(self, picture_HxWx3: np.ndarray) -> np.ndarray:
        """The next picture, uint8; a thumbnail will do, of a size that is always the same. Returns its histogram."""
        before, self._histogram = self._histogram, histogram(picture_HxWx3)
        self._distances.append(0.0 if before is None else distance(before, self._histogram))
        return self._histogram

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
        of half of the pixels is a cut too, however soon others follow. Transitions are looked for with "auto" only.

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


class _Small(NamedTuple):
    """What dissolves are looked for in, of consecutive pictures."""

    pixels_TxD: np.ndarray  # float32 grey levels
    detail_TxD: np.ndarray  # the same less the mean colour of the picture
    variance_T: np.ndarray
    edges_T: np.ndarray  # see edge_energy; of pictures in full
    histogram_Tx64: np.ndarray

    def part(self, start: int, stop: int) -> "_Small":
        return _Small(*(values[start:stop] for values in self))


def _small(pixels_TxPx3: np.ndarray, edges_T: np.ndarray, histogram_Tx64: np.ndarray) -> _Small:
    pixels_TxPx3 = pixels_TxPx3.astype(np.float32)
    detail_TxD = (pixels_TxPx3 - pixels_TxPx3.mean(axis=1, keepdims=True)).reshape(len(pixels_TxPx3), -1)
    variance_T = _mean_product(detail_TxD, detail_TxD)
    return _Small(pixels_TxPx3.reshape(detail_TxD.shape), detail_TxD, variance_T, edges_T, histogram_Tx64)


def edge_energy(picture_HxWx3: np.ndarray) -> float:
    """Mean square of the differences of neighbouring pixels, uint8, to the right and below; colours are summed.

    >>> edge_energy(np.array([[[0, 0, 0], [3, 0, 4]]], np.uint8))
    12.5
    """
    pairs = (picture_HxWx3[1:], picture_HxWx3[:-1]), (picture_HxWx3[:, 1:], picture_HxWx3[:, :-1])
    squares = sum(cv2.norm(one, other, cv2.NORM_L2SQR) for one, other in pairs if one.size)
    return squares / (picture_HxWx3.shape[0] * picture_HxWx3.shape[1])


def _mean_product(x_TxD: np.ndarray, y_TxD: np.ndarray) -> np.ndarray:
    return np.einsum("td,td->t", x_TxD, y_TxD) / x_TxD.shape[1]


def dissolve_score(a: _Small, m: _Small, b: _Small) -> np.ndarray:
    """float[T] log of how much pictures m look like the middle of a dissolve from a to b; see Transitions."""

    def differ(one: _Small, other: _Small) -> np.ndarray:
        return 0.5 * np.abs(one.histogram_Tx64 - other.histogram_Tx64).sum(axis=1)

    lost = 0.5 - m.edges_T / (a.edges_T + b.edges_T + 1)
    new = np.minimum(differ(a, m), differ(m, b))
    change_TxD = b.pixels_TxD - a.pixels_TxD
    rest_TxD = m.pixels_TxD - (a.pixels_TxD + b.pixels_TxD) / 2
    unexplained = _mean_product(rest_TxD, rest_TxD) / (_mean_product(change_TxD, change_TxD) + 5)
    score = np.log(np.maximum(lost, 0.01)) + np.log(new + 0.02) - np.log(unexplained + 0.02)
    # Of one scene, brightness apart, or of the same colours? Without contents?
    size = np.sqrt(a.variance_T * b.variance_T)
    other_scene = (_mean_product(a.detail_TxD, b.detail_TxD) < LIKE * size) & (differ(a, b) > 0.2)
    contents = np.minimum(a.variance_T, b.variance_T) > LEAST_CONTRAST**2
    return np.where(other_scene & contents & (lost > LEAST_LOSS), score, _NO_SCORE)


class Transitions:
    """The fades and dissolves of a video; its pictures are shown one by one.

    Dissolve: halfway between pictures a and b, w before and behind it, picture m is their mean. So m has the edges of
    both, each of half the height, colours that neither of them has, and little that their mean leaves unexplained.
    Motion and changing light do not do all three. The score is

        (1/2 - e(m) / (e(a) + e(b))) * min(d(a, m), d(m, b)) * |b - a|^2 / |m - (a + b) / 2|^2

    with e the energy of the edges and d the distance of the histograms, as geometric mean over neighbouring m. All
    HALF_LENGTHS w are tried; a peak is a dissolve unless a hard cut lies between a and b. Published detectors take the
    variance for e, whose parabola is the same (Alattar 1993; Truong, Dorai & Venkatesh 2000). But the variance of a
    scene changes as things move, and of two scenes with something bright in the middle it is not lost: of 210 dissolves
    between the rendered shots on which the values were chosen, edges found 190, with 6 false, the variance 159, with 8.

    Fade: pictures without contrast, of whatever colour, between gradual changes of the contrast (Lienhart 1999; Truong
    et al.). Where one of the two is a hard cut, that is the boundary. A fade at an end of the video is none.

    Neither is looked for where HALF_LENGTHS are less than two pictures.
    """

    def __init__(self, fps: float):
        """fps: pictures per second."""
        self._every = max(int(fps // TRANSITION_FPS), 1)
        self._fps = fps / self._every
        half_lengths = {round(seconds * self._fps) for seconds in HALF_LENGTHS}
        self._half_lengths = sorted(w for w in half_lengths if w >= 2)  # in pictures
        self._reach = max(self._half_lengths, default=0)
        self._shown = 0
        self._window: list[tuple[np.ndarray, float, np.ndarray]] = []
        self._done = 0  # pictures at the beginning of the window that have their scores
        self._scores_TxW: list[np.ndarray] = []
        self._contrast_T: list[np.ndarray] = []

    def add(self, picture_HxWx3: np.ndarray, histogram_64: np.ndarray) -> None:
        """The next picture, uint8, and its histogram."""
        if self._half_lengths and self._shown % self._every == 0:
            small = cv2.resize(picture_HxWx3, (_SMALL_SIDE, _SMALL_SIDE), interpolation=cv2.INTER_AREA)
            self._window.append((small.reshape(-1, 3), edge_energy(picture_HxWx3), histogram_64))
            if len(self._window) == self._done + _BLOCK + self._reach:
                self._score(len(self._window) - self._reach)
        self._shown += 1

    def boundaries(self, cuts_C: np.ndarray) -> np.ndarray:
        """int64[B] ascending, the hard cuts and the middles of fades and dissolves; after the last picture, once.

        Args:
          cuts_C: int[C] first pictures behind hard cuts. Those found within a fade, where brightness moves many pixels
            to other bins at once, are none.
        """
        cuts_C = np.asarray(cuts_C, np.int64)
        if not self._window:
            return cuts_C
        self._score(len(self._window))
        fades = find_fades(np.concatenate(self._contrast_T), self._fps)
        for first, _, last in fades:
            cuts_C = cuts_C[(cuts_C <= first * self._every) | (cuts_C > last * self._every)]
        scores_TxW = np.concatenate(self._scores_TxW)
        dissolves = find_dissolves(scores_TxW, self._half_lengths, cuts_C // self._every, fades)
        middles = np.array([middle for _, middle, _ in fades] + dissolves, np.int64) * self._every
        return np.union1d(cuts_C, middles)

    def _score(self, end: int) -> None:
        """Scores the pictures of the window up to `end`, and forgets those that are not needed any more."""
        start = self._done
        window = _small(*map(np.array, zip(*self._window, strict=True)))
        scores_TxW = np.full((end - start, len(self._half_lengths)), _NO_SCORE, np.float32)
        for k, w in enumerate(self._half_lengths):
            first, last = max(start, w), min(end, len(self._window) - w)
            if first < last:
                ends = (window.part(first + shift, last + shift) for shift in (-w, 0, w))
                scores_TxW[first - start : last - start, k] = dissolve_score(*ends)
        self._scores_TxW.append(scores_TxW)
        self._contrast_T.append(np.sqrt(window.variance_T[start:end]))
        self._window = self._window[max(end - self._reach, 0) :]
        self._done = min(end, self._reach)


def find_dissolves(
    scores_TxW: np.ndarray, half_lengths: list[int], cuts_C: np.ndarray, fades: list[tuple[int, int, int]]
) -> list[int]:
    """Middles of dissolves.

    Args:
      scores_TxW: of dissolve_score, for each half length.
      half_lengths: in pictures.
      cuts_C: first pictures behind hard cuts.
      fades: see find_fades.
    """
    smooth_TxW = np.empty_like(scores_TxW)
    for k, w in enumerate(half_lengths):
        around = max(round(0.45 * w), 1)
        padded = np.pad(scores_TxW[:, k], around, mode="edge")
        smooth_TxW[:, k] = np.convolve(padded, np.full(2 * around + 1, 1 / (2 * around + 1)), mode="valid")
        for start, stop in [(cut, cut) for cut in cuts_C] + [(start, stop) for start, _, stop in fades]:
            smooth_TxW[max(start - w, 0) : stop + w, k] = _NO_SCORE
    best_T, scale_T = smooth_TxW.max(axis=1), smooth_TxW.argmax(axis=1)
    free_T, found = best_T >= math.log(LEAST_SCORE), []
    apart = half_lengths[len(half_lengths) // 2]
    for t in sorted(np.flatnonzero(free_T), key=lambda t: -best_T[t]):
        if free_T[t]:
            found.append(int(t))
            w = max(half_lengths[scale_T[t]], apart)
            free_T[max(t - w, 0) : t + w + 1] = False
    return found


def find_fades(contrast_T: np.ndarray, fps: float) -> list[tuple[int, int, int]]:
    """(last picture of full contrast, middle of those without, first of full contrast) of each fade.

    Args:
      contrast_T: standard deviation of each picture, grey levels.
      fps: pictures per second.
    """
    empty_T = np.concatenate([[False], contrast_T < LEAST_CONTRAST / 2, [False]])
    runs = np.flatnonzero(np.diff(empty_T.astype(int))).reshape(-1, 2)  # (first without contrast, first with it again)
    reach, found = max(round(FADE_SECONDS * fps), 2), []
    for first, stop in runs.tolist():
        before, behind = contrast_T[max(first - reach, 0) : first], contrast_T[stop : stop + reach]
        if min(before.max(initial=0), behind.max(initial=0)) < 1.5 * LEAST_CONTRAST:
            continue
        out = int(np.argmax(before[::-1] > 0.8 * before.max()))  # pictures on the way, at either side
        back = int(np.argmax(behind > 0.8 * behind.max()))
        if min(out, back) >= 2:
            found.append((first - out - out // 4 - 2, (first + stop) // 2, stop + back + back // 4 + 1))
    return found


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
