"""Shot boundaries: closed forms for the histogram and the rules, and the cuts of real videos."""

import json

import numpy as np
import pytest

from input_pipeline.preparation import shots, video


def test_histogram_by_hand():
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:4] = [255, 64, 0]  # bins 3, 1, 0
    h = shots.histogram(frame)
    assert h.shape == (64,) and h.sum() == pytest.approx(1)
    assert h[3 * 16 + 1 * 4 + 0] == pytest.approx(0.5) and h[0] == pytest.approx(0.5)


@pytest.mark.parametrize("low, high, expected", [(0, 63, 0), (63, 64, 1), (127, 128, 1), (64, 127, 0), (191, 192, 1)])
def test_bins_are_the_two_leading_bits(low, high, expected):
    a, b = (shots.histogram(np.full((4, 4, 3), value, np.uint8)) for value in (low, high))
    assert shots.distance(a, b) == pytest.approx(expected)


def test_distance_is_the_share_of_pixels_that_changed():
    a = np.zeros((20, 20, 3), np.uint8)
    b = a.copy()
    b[:5] = 255
    d = shots.distance(shots.histogram(a), shots.histogram(b))
    assert d == pytest.approx(0.3)  # of every other row 3 in 10


def starts(d, fps=25.0, **options):
    return shots.find_shots(np.array(d, float), fps, **options).tolist()


def quiet(length, **peaks):
    d = np.full(length, 0.01)
    for name, value in peaks.items():
        d[int(name[1:])] = value
    return d


def test_peak_rule():
    assert starts(quiet(60, t20=0.3, t40=0.3)) == [0, 20, 40]
    assert starts(quiet(60, t20=0.059)) == [0]  # below the floor
    assert starts(quiet(60, t20=0.4, t22=0.3)) == [0]  # flash: there and back
    assert starts(quiet(60, t20=0.4, t27=0.15)) == [0, 20]  # 2.5 times its surroundings
    assert starts(quiet(60, t20=0.4, t28=0.17)) == [0]
    assert starts(quiet(60, t20=0.4, t29=0.4)) == [0, 20, 29]  # beyond the window
    assert starts(np.linspace(0, 0.9, 60)) == [0]  # motion sets in
    assert starts(quiet(60, t0=0.9, t8=0.3)) == [0, 8]  # the first frame has no frame before it


def test_minimum_length():
    assert starts(quiet(30, t7=0.5)) == [0] and starts(quiet(30, t8=0.5)) == [0, 8]
    assert starts(quiet(30, t23=0.5)) == [0] and starts(quiet(30, t22=0.5)) == [0, 22]
    clearer = quiet(40, t20=0.6, t24=0.9)
    assert starts(clearer, rule="threshold") == [0, 24]
    assert starts(clearer, rule="threshold", min_frames=4) == [0, 20, 24]
    assert starts([0.0]) == [0] and starts([0.0] * 5) == [0]


def test_rule_for_sparse_frames():
    d = quiet(40, t10=0.6, t20=0.49, t30=0.51)
    assert starts(d, fps=1.0) == [0, 10, 30] == starts(d, rule="threshold")
    assert starts(d + 0.4, fps=4.9) == [0, 10, 20, 30]  # plain threshold, whatever is around
    assert starts(d + 0.4, fps=5.0) == [0]  # the peak rule from here on


def test_derivative_rule():
    d = quiet(40, t10=0.3, t20=0.2)
    d[30:] = 0.4  # motion that sets in at once is a cut to this rule
    assert starts(d, rule="derivative") == [0, 10, 30]
    assert starts(d) == [0, 10, 20]


CLIPS = ["bikes.mp4", "nasa_13013.mp4", "flipping_a_pancake.mkv", "carphone_qcif.mp4", "realshort.mp4"]
MORE_CLIPS = [
    "bbb_480p_30s.mp4",
    "cockatoo.mp4",
    "sam2_dog.mp4",
    "sam2_blocks.mp4",
    "sam2_juggle.mp4",
    "intel_car_detection.mp4",
    "intel_bottle_detection.mp4",
    "maxtext_dinosaur.mp4",
]


@pytest.mark.parametrize("clips, num_cuts", [(CLIPS, 6), pytest.param(CLIPS + MORE_CLIPS, 9, marks=pytest.mark.slow)])
def test_cuts_of_real_videos(sample_data, tmp_path, clips, num_cuts):
    truth = json.loads((sample_data / "videos/shots.json").read_text())
    matched, found_cuts, true_cuts = 0, 0, 0
    for name in clips:
        row = video.decode_file(
            str(sample_data / "videos" / name),
            str(tmp_path / "frames"),
            fps=25,
            short_side=256,
            jpeg_quality=95,
            shot_rule="auto",
            min_shot_frames=8,
        )
        found = row["shot_starts"][1:]
        # The list counts pictures of the file. Files with cuts have at most 25 per second: there, pictures are frames.
        true = truth[name]["cuts"]
        assert not true or row["fps"] < 25.5
        if not true:
            assert found == [], name
        matched += sum(any(abs(cut - other) <= 2 for other in found) for cut in true)
        found_cuts, true_cuts = found_cuts + len(found), true_cuts + len(true)
    assert true_cuts == num_cuts
    assert 2 * matched / (found_cuts + true_cuts) >= 0.9  # F1
