"""Shot boundaries: closed forms for the histogram and the rules, and the cuts of real videos."""

import json

import numpy as np
import pytest

from helpers.video_files import scenes, write_video
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
    assert d == pytest.approx(0.25)  # 5 rows of 20


def starts(d, fps=25.0, **options):
    return shots.find_shots(np.array(d, float), fps, **options).tolist()


def test_distances_are_those_of_one_picture_to_the_next():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (0, 63, 64, 255)]
    distances = shots.Distances()
    for picture in pictures:
        distances.add(picture)
    np.testing.assert_allclose(distances.so_far(), [0, 0, 1, 1])


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


@pytest.mark.parametrize("fps, window", [(60, 19), (25, 8), (12.5, 4), (10, 3), (5, 3)])
def test_the_peak_rule_looks_a_third_of_a_second_around(fps, window):
    near, far = {f"t{20 + window}": 0.4}, {f"t{21 + window}": 0.4}
    assert starts(quiet(60, t20=0.4, **near), fps) == [0]
    assert starts(quiet(60, t20=0.4, **far), fps) == [0, 20, 21 + window]


def test_quick_cuts_are_found_and_a_flash_is_none():
    cuts = [20, 22, 25, 30]
    assert starts(quiet(60, **{f"t{t}": 0.9 for t in cuts})) == [0, *cuts]
    assert starts(quiet(60, **{f"t{t}": 0.49 for t in cuts})) == [0]  # too small a change for so many
    assert starts(quiet(60, t20=0.9, t21=0.9)) == [0]  # there and back


def test_all_shots_are_kept_however_short():
    assert starts(quiet(30, t8=0.24)) == starts(quiet(30, t22=0.24)) == [0]  # too near an end for so small a change
    assert starts(quiet(30, t9=0.24)) == [0, 9] and starts(quiet(30, t21=0.24)) == [0, 21]
    assert starts(quiet(30, t1=0.5)) == [0, 1] and starts(quiet(30, t29=0.5)) == [0, 29]
    assert starts(quiet(40, t20=0.6, t21=0.9), rule="threshold") == [0, 20, 21]
    assert starts([0.0]) == [0] and starts([0.0] * 5) == [0]


def test_shots_on_a_grid_begin_at_the_first_frame_behind_their_cut():
    shown = np.array([0, 0, 10, 20, 30])  # five frames of pictures 0 to 39
    for cuts, expected in [
        ([], [0]),
        ([1], [0, 2]),
        ([10], [0, 2]),
        ([11, 12, 20], [0, 3]),  # two shots between two frames have none
        ([21, 31], [0, 4]),
        ([31, 39], [0]),  # behind the last frame
    ]:
        assert shots.on_grid(np.array([0, *cuts]), shown).tolist() == expected, cuts


@pytest.mark.parametrize("native, fps", [(10, 1), (25, 1), (30, 2), (12, 5), (24, 25), (4, 1), (1, 1)])
def test_no_shot_of_a_rendered_video_holds_a_cut_at_any_rate(tmp_path, native, fps):
    """Shots of 0.2 to 4 s; at 1 Hz, most are shorter than eight frames, and some have none."""
    rng = np.random.default_rng(native)
    lengths = np.maximum(np.rint(rng.lognormal(np.log(1.5), 0.8, 24).clip(0.2, 4) * native), 1).astype(int)
    row = video.decode_file(
        str(write_video(tmp_path / "v.mp4", scenes(lengths), fps=native)),
        str(tmp_path / "frames"),
        fps=fps,
        short_side=48,
        jpeg_quality=95,
        shot_rule="auto",
    )
    # Frame k shows the picture of k / rate seconds: the scene it is of follows from the lengths alone.
    times = np.arange(row["frames"]) / row["fps"]
    scene = np.searchsorted(np.cumsum(lengths), np.floor(times * native + 1e-6), side="right")
    assert row["shot_starts"] == [0, *(np.flatnonzero(np.diff(scene)) + 1).tolist()]
    assert fps > 1 or np.median(np.diff(row["shot_starts"])) < 4


def test_rule_for_sparse_frames():
    d = quiet(40, t10=0.6, t20=0.49, t30=0.51)
    assert starts(d, rule="threshold") == [0, 10, 30]
    assert starts(d, fps=1.0) == [0, 10, 20, 30]  # the peak at 20 too
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
        )
        found = row["shot_starts"][1:]
        # The list counts pictures of the file. Files with cuts have at most 25 per second: there, pictures are frames.
        true = truth[name]["cuts"]
        assert not true or row["fps"] < 25.5
        if not true:
            assert found == [], name
        matched += sum(any(abs(cut - other) <= 2 for other in found) for cut in true)
        found_cuts, true_cuts = found_cuts + len(found), true_cuts + len(true)
    assert matched == found_cuts == true_cuts == num_cuts  # F1 is 1
