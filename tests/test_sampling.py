"""Sampling: known distributions, and every draw a function of (seed, i) alone."""

import itertools

import numpy as np
import pytest

from input_pipeline.streams import sampling

CLIP = 64  # 2.56 s at 25 frames per second


def draw(sampler: str, num_views: int, delay: int = 0, num_frames: int = CLIP, count: int = 4000) -> np.ndarray:
    function = sampling.SAMPLERS[sampler]
    offsets = np.stack([function(sampling.example_rng(0, i), num_frames, num_views, delay) for i in range(count)])
    assert offsets.dtype == np.int64 and offsets.min() >= 0 and offsets.max() < num_frames
    return offsets


def test_marginal_has_the_papers_median_time_difference_and_its_mode_at_zero():
    exact = np.array([abs(a - b) for a, b in itertools.product(range(CLIP), repeat=2)])
    assert np.median(exact) == 19  # 0.76 s at 25 fps, the figure of VITO section 4.2
    offsets = draw("marginal", 3, count=8000)
    difference = np.abs(offsets[:, 0] - offsets[:, 1])
    assert abs(np.median(difference) - 19) <= 1
    # Unordered |dt| = d has probability 2 (64 - d) / 64^2 for d > 0; signed differences peak at 0.
    expected = np.bincount(exact, minlength=CLIP) / CLIP**2
    np.testing.assert_allclose(np.bincount(difference, minlength=CLIP) / len(difference), expected, atol=0.01)
    signed = np.bincount(offsets[:, 0] - offsets[:, 1] + CLIP, minlength=2 * CLIP)
    assert abs(int(signed.argmax()) - CLIP) <= 6  # triangle with its tip at 0
    assert np.bincount(offsets.ravel(), minlength=CLIP).min() > 0.8 * offsets.size / CLIP


@pytest.mark.parametrize("num_views,num_frames", [(2, 64), (3, 64), (3, 5), (4, 4)])
def test_uniform_chunks_are_disjoint_and_cover_the_clip(num_views, num_frames):
    offsets = draw("uniform_chunks", num_views, num_frames=num_frames)
    assert (np.diff(offsets, axis=1) > 0).all()
    seen = [set(offsets[:, view].tolist()) for view in range(num_views)]
    assert sum(map(len, seen)) == num_frames and set.union(*seen) == set(range(num_frames))


def test_fixed_delay_is_exact_and_reaches_both_ends():
    offsets = draw("fixed_delay", 3, delay=20)
    assert (np.diff(offsets, axis=1) == 20).all()
    assert offsets.min() == 0 and offsets.max() == CLIP - 1


def test_single_repeats_one_frame_of_all_frames():
    offsets = draw("single", 3)
    assert (offsets == offsets[:, :1]).all() and len(np.unique(offsets)) == CLIP


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_frames_needed_is_just_enough(sampler):
    needed = sampling.frames_needed(sampler, 3, 10)
    assert needed == {"marginal": 1, "single": 1, "uniform_chunks": 3, "fixed_delay": 21}[sampler]
    draw(sampler, 3, delay=10, num_frames=needed, count=50)
    if needed > 1:
        with pytest.raises(ValueError):
            draw(sampler, 3, delay=10, num_frames=needed - 1, count=50)


def test_crops_have_the_stated_area_and_aspect():
    height, width = 1000, 1000
    rngs = (sampling.example_rng(0, i) for i in range(8000))
    crops = np.array([sampling.random_resized_crop(rng, height, width, 0.08) for rng in rngs])
    y, x, h, w = crops.T
    assert (crops >= 0).all() and (y + h <= height).all() and (x + w <= width).all()
    area, log_aspect = h * w / (height * width), np.log(w / h)
    assert 0.079 < area.min() < 0.09 and area.max() > 0.95
    assert np.abs(log_aspect).max() < np.log(4 / 3) + 0.01
    inside = area < 0.7  # below 3/4 no side is clamped: both laws are exact here
    np.testing.assert_allclose(
        np.quantile(area[inside], [0.25, 0.5, 0.75]), 0.08 + 0.62 * np.array([0.25, 0.5, 0.75]), atol=0.02
    )
    np.testing.assert_allclose(
        np.quantile(log_aspect[inside], [0.25, 0.75]), np.log(4 / 3) * np.array([-0.5, 0.5]), atol=0.02
    )
    # The position is uniform over all that fit: mean relative offset one half.
    for offset, side, full in ((y, h, height), (x, w, width)):
        np.testing.assert_allclose(np.mean(offset[inside] / (full - side[inside])), 0.5, atol=0.02)


def test_crops_of_a_wide_image_are_clamped_not_redrawn():
    crops = np.array([sampling.random_resized_crop(sampling.example_rng(0, i), 100, 1000, 0.4) for i in range(500)])
    assert (crops[:, 2] == 100).all()  # even the smallest area asks for more than the height
    assert (crops[:, 3] <= 366).all()  # sqrt(1e5 * 4 / 3) at most
    assert (
        np.array([sampling.random_resized_crop(sampling.example_rng(0, i), 1, 1, 0.08) for i in range(50)]).tolist()
        == [[0, 0, 1, 1]] * 50
    )


def plan(seed: int, i: int) -> list:
    result = sampling.plan_views(
        sampling.example_rng(seed, i),
        num_frames=200,
        clip_frames=64,
        height=256,
        width=455,
        views=3,
        sampler="marginal",
        delay=0,
        min_crop_area=0.4,
    )
    return [array.tolist() for array in result]


def test_a_plan_is_a_function_of_seed_and_example():
    plans = [plan(7, i) for i in range(200)]
    assert [plan(7, i) for i in reversed(range(200))] == plans[::-1]  # whatever was drawn before
    assert len({str(p) for p in plans}) == 200
    assert plan(8, 0) != plans[0]


def test_a_plan_stays_inside_a_clip_whose_start_is_uniform():
    frames = np.array([plan(0, i)[0] for i in range(4000)])
    assert np.ptp(frames, axis=1).max() < 64
    assert frames.min() < 3 and frames.max() > 196
    flips = np.array([plan(0, i)[2] for i in range(2000)])
    np.testing.assert_allclose(flips.mean(axis=0), 0.5, atol=0.05)
    assert len({tuple(row) for row in flips.tolist()}) == 8  # drawn for each view


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = {(seed, epoch): sampling.epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders.values()}) == 9
    sampling.epoch_order.cache_clear()
    assert np.array_equal(sampling.epoch_order(1, 2, 1000), orders[1, 2])
    firsts = [sampling.epoch_order(0, epoch, 10)[0] for epoch in range(2000)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=10) / 2000, 0.1, atol=0.03)


def batches_of(n: int, batch_size: int, first_epoch: int, epochs: int) -> np.ndarray:
    """All whole batches of some epochs: int64[steps, batch_size]."""
    orders = [sampling.epoch_order(5, first_epoch + e, n, batch_size) for e in range(epochs)]
    assert all(np.array_equal(np.sort(order), np.arange(n)) for order in orders)
    flat = np.concatenate(orders)[-first_epoch * n % batch_size :]
    return flat[: len(flat) // batch_size * batch_size].reshape(-1, batch_size)


def test_no_batch_repeats_a_video_whatever_its_size():
    """All sizes up to 16, each until epochs and batches begin together again, and some of real size, far out."""
    cases = [(n, batch_size, 0, 2 * batch_size + 1) for n in range(1, 17) for batch_size in range(1, n + 1)]
    cases += [(5000, 4096, 10**9, 8), (100, 64, 10**15, 40), (9537, 240, 7, 5), (4097, 4096, 2000, 4)]
    for case in cases:
        batches = np.sort(batches_of(*case), axis=1)
        assert (np.diff(batches, axis=1) > 0).all(), case


def test_orders_stay_shuffled_though_no_batch_repeats_a_video():
    """Of 7 videos in batches of 5, each stands at every place of an epoch as often as at any other."""
    orders = np.array([sampling.epoch_order(0, epoch, 7, 5) for epoch in range(7000)])
    counts = np.array([np.bincount(orders[:, place], minlength=7) for place in range(7)])
    np.testing.assert_allclose(counts / 7000, 1 / 7, atol=0.02)
    pairs = {tuple(np.sort(order[:2]).tolist()) for order in orders[1::5]}
    assert len(pairs) == 21  # all that can begin an epoch together do
    assert [sampling.pick(0, i, 7, 5) for i in range(14, 28)] == orders[2:4].ravel().tolist()


def test_the_generators_of_epoch_k_and_example_k_share_nothing():
    epoch = sampling._generator(sampling._EPOCH, 0, 5).integers(2**63, size=1000)
    example = sampling.example_rng(0, 5).integers(2**63, size=1000)
    assert not set(epoch.tolist()) & set(example.tolist())
