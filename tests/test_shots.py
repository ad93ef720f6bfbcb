"""Shot boundaries: closed forms for the histogram and the rules, and the cuts of real videos."""

import json

import cv2
import numpy as np
import pytest

from benchmarks.shots import hits, joined
from helpers.video_files import scenes, write_video
from input_pipeline.preparation import shots, video
from input_pipeline.rendered import shapes


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


# --- fades and dissolves ----------------------------------------------------------------------------------------------


def boundaries(pictures, fps=25.0):
    distances, transitions = shots.Distances(), shots.Transitions(fps)
    for picture in pictures:
        transitions.add(picture, distances.add(picture))
    return transitions.boundaries(shots.find_shots(distances.so_far(), fps)[1:]).tolist()


def counted(found, spans):
    """(spans with a boundary, boundaries that are no span's first)."""
    right = hits(found, spans)
    return sum(hit is not None for hit in right), len(set(found) - set(right))


def test_transitions_between_rendered_shots():
    """Of shots of 3 to 5 s that turn, drift and change colours, joined by transitions of 0.3 to 2 s."""
    right = wrong = true = 0
    for seed in range(7000, 7012):
        rng = np.random.default_rng(seed)
        rendered = [
            shapes.render_shot(
                rng,
                shapes.unit_shape(rng.choice(list(shapes.SHAPES))),
                size=64,
                frames=int(rng.integers(75, 125)),
                colour_pace=shapes.COLOUR_PACE,
                zoom=rng.uniform(0.7, 1.1),
            )
            for _ in range(4)
        ]
        kinds = rng.choice(["dissolve", "black", "white", "cut"], 3, p=[0.5, 0.2, 0.2, 0.1])
        pictures, spans = joined(rendered, kinds, rng.integers(8, 51, 3))
        hits, false = counted(boundaries(pictures), spans)
        right, wrong, true = right + hits, wrong + false, true + len(spans)
    print(f"{right} of {true} found, {wrong} false")
    assert 2 * right / (right + wrong + true) >= 0.9


def still(seed, count, side=64):
    """A picture of coloured clouds, `count` times."""
    rng = np.random.default_rng(seed)
    clouds = cv2.resize(rng.uniform(20, 235, (6, 6, 3)).astype(np.float32), (side, side))
    return np.repeat(np.rint(clouds).astype(np.uint8)[None], count, axis=0)


@pytest.mark.parametrize("fps", [12.5, 25.0, 30.0, 60.0, 120.0])
@pytest.mark.parametrize("kind", ["dissolve", "black", "white"])
def test_a_transition_between_still_pictures_is_one_boundary_in_its_middle(kind, fps):
    for seconds in (0.5, 1.0, 1.9):
        length, shot = round(seconds * fps), round(2.5 * fps)
        pictures, [(start, end)] = joined([still(1, shot), still(2, shot)], [kind], [length])
        [found] = boundaries(pictures, fps)
        assert abs(found - (start + end) / 2) <= max(0.1 * fps, 1), (seconds, start, end, found)


def test_a_fade_is_one_boundary_where_it_moves_half_of_the_pixels_to_other_bins_at_once():
    board = np.where(np.indices((64, 64)).sum(axis=0) // 16 % 2, 200, 96).astype(np.uint8)
    parts = np.repeat(np.repeat(board[None, ..., None], 3, axis=3), 60, axis=0), still(2, 60)
    for kind, length in (("black", 12), ("white", 30)):
        pictures, [(start, end)] = joined(parts, [kind], [length])
        distances = shots.Distances()
        for picture in pictures:
            distances.add(picture)
        assert len(starts(distances.so_far())) > 2  # by the distances there are cuts in it
        [found] = boundaries(pictures)
        assert abs(found - (start + end) / 2) <= 1


def test_what_is_no_transition():
    clouds, others = still(1, 75), still(2, 75)
    dark, black = (clouds * 0.3).astype(np.uint8), np.zeros_like(clouds)
    gain = np.linspace(1, 0.2, 75)[:, None, None, None]
    fade_out = np.rint(clouds * np.linspace(1, 0, 75)[:, None, None, None]).astype(np.uint8)
    pan = np.stack([np.roll(still(3, 1)[0], 2 * t, axis=1) for t in range(150)])
    rise = np.linspace(0, 150, 75)[:, None, None, None]
    haze = np.uint8(others * 0.3 + rise)
    flash = np.concatenate([clouds, np.full_like(clouds[:1], 255), clouds])
    for name, pictures, expected in [
        ("a light that goes down", np.concatenate([clouds, np.uint8(clouds * gain), dark]), []),
        ("a pan", pan, []),
        ("a flash", flash, []),
        ("from black, at the start", np.concatenate([black, fade_out[::-1], clouds]), []),
        ("to black, at the end", np.concatenate([clouds, fade_out, black]), []),
        ("to black, then a cut", np.concatenate([clouds, fade_out[::3], black[:10], others]), [75 + 25 + 10]),
        ("a cut", np.concatenate([clouds, others]), [75]),
        ("a cut to a haze that brightens", np.concatenate([clouds, haze]), [75]),
    ]:
        assert boundaries(pictures) == expected, name


def test_transitions_are_the_same_however_many_pictures_are_scored_together(monkeypatch):
    pictures, _ = joined(
        [still(seed, 90) for seed in range(5)], ["dissolve", "black", "dissolve", "white"], [20, 30, 45, 12]
    )
    found = boundaries(pictures)
    assert len(found) == 4
    for block in (1, 7, 1000):
        monkeypatch.setattr(shots, "_BLOCK", block)
        assert boundaries(pictures) == found


def test_a_prepared_video_has_a_shot_on_either_side_of_a_dissolve(tmp_path):
    """At the rate of the file, and at VIVI's, at which a whole dissolve lies between two frames."""
    pictures, [(start, end)] = joined([still(1, 75), still(2, 75)], ["dissolve"], [25])
    path = write_video(tmp_path / "v.mp4", pictures)

    def shot_starts(fps, rule):
        row = video.decode_file(str(path), str(tmp_path / "f"), fps=fps, short_side=64, jpeg_quality=95, shot_rule=rule)
        return row["shot_starts"]

    zero, first = shot_starts(25, "auto")
    assert zero == 0 and abs(first - (start + end) / 2) <= 2
    assert shot_starts(1, "auto") == [0, 3] and shot_starts(25, "peak") == [0]


# --- real videos ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("clips, num_cuts", [(CLIPS, 7), pytest.param(CLIPS + MORE_CLIPS, 10, marks=pytest.mark.slow)])
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
        # The list counts frames at up to 25 a second. A fade or dissolve is found anywhere within it; at the start of
        # the video, it is no boundary.
        spans = [(cut - 2, cut + 2) for cut in truth[name]["cuts"]]
        spans += [(start, end) for start, end in truth[name].get("gradual", []) if start > 0]
        if not spans:
            assert found == [], name
        matched += sum(any(start <= t <= end for t in found) for start, end in spans)
        found_cuts, true_cuts = found_cuts + len(found), true_cuts + len(spans)
    assert matched == found_cuts == true_cuts == num_cuts  # F1 is 1
