"""The ResNets: counts and shapes of the papers, and each layer against NumPy in float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from helpers.networks import count, random_variables
from vivi_jax.errors import ConfigError
from vivi_jax.models import build_encoder
from vivi_jax.models.heads import MultiScalePool
from vivi_jax.models.resnet import KERNEL_INITS, BatchNorm, Block, Conv, ResNet, make_norm, max_pool, standardize_kernel

# Parameters with a classifier of 1000 classes; 18 to 152 as torchvision documents them.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def abstract(encoder: ResNet, size: int = 224, train: bool = False):
    """(variables, (pooled, intermediates)) as shapes and dtypes; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)
    return variables, jax.eval_shape(functools.partial(encoder.apply, train=train), variables, images)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_counts_are_the_published_ones(depth):
    variables, _ = abstract(ResNet(depth=depth, num_classes=1000))
    assert count(variables["params"]) == PARAMETERS[depth]


def test_v2_has_the_norm_parameters_its_block_order_implies():
    # v1 and v2 have the same convolutions. v1's norms follow them: stem, every convolution, every projection. v2's
    # come before: the inputs of each block, two inside, one at the end. Each norm has 2 parameters per channel.
    in_v1, in_v2, channels_in = 64, 2048, 64
    for blocks, mid in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        in_v1 += blocks * (mid + mid + 4 * mid) + 4 * mid
        in_v2 += channels_in + (blocks - 1) * 4 * mid + blocks * 2 * mid
        channels_in = 4 * mid
    variables, _ = abstract(ResNet(version=2, norm="group", weight_standardization=True, num_classes=1000))
    assert count(variables["params"]) == PARAMETERS[50] - 2 * in_v1 + 2 * in_v2 == 25_549_352
    assert set(variables) == {"params"}  # no batch statistics


@pytest.mark.parametrize("version", [1, 2])
def test_stages_are_56_28_14_7_at_224_pixels(version):
    _, (pooled, stages) = abstract(ResNet(version=version))
    assert pooled.shape == (2, 2048) and pooled.dtype == jnp.float32
    assert [stages[f"stage{s}"].shape for s in (1, 2, 3, 4)] == [
        (2, 56, 56, 256),
        (2, 28, 28, 512),
        (2, 14, 14, 1024),
        (2, 7, 7, 2048),
    ]


def test_width_stem_and_dtype_do_what_they_say():
    _, (pooled, stages) = abstract(ResNet(depth=18, width=3), size=97)
    assert pooled.shape == (2, 1536) and stages["stage1"].shape == (2, 25, 25, 192)  # 97 -> 49 -> 25
    _, (_, stages) = abstract(ResNet(depth=18, stem="small"), size=64)
    assert stages["stage1"].shape == (2, 64, 64, 64) and stages["stage4"].shape == (2, 8, 8, 512)
    variables, (pooled, stages) = abstract(ResNet(depth=18, dtype="bfloat16", num_classes=7))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert stages["stage3"].dtype == jnp.bfloat16 and pooled.dtype == stages["logits"].dtype == jnp.float32
    assert stages["logits"].shape == (2, 7)


@pytest.mark.parametrize(
    "options", [dict(depth=51), dict(version=3), dict(norm="layer"), dict(stem="tiny"), dict(width=0)]
)
def test_impossible_values_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        ResNet(**options)


def test_build_encoder_suggests_the_nearest_name_and_takes_lists():
    with pytest.raises(ConfigError, match="did you mean 'resnet'"):
        build_encoder("resnte")
    with pytest.raises(ConfigError, match="'dept' is unknown, did you mean 'depth'"):
        build_encoder("resnet", dept=50)
    assert hash(build_encoder("resnet", input_mean=[0.5, 0.5, 0.5]))


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 32, 32, 3), jnp.uint8), jnp.zeros((2, 3, 32, 32)), jnp.zeros((32, 32, 3))]
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match="images must be float"):
        ResNet(depth=18).init(jax.random.key(0), images, train=False)


def test_in_v2_every_stage_is_what_the_next_one_reads():
    """After norm + ReLU, all of them; pooled is the mean of the last. Against the blocks themselves."""
    encoder = ResNet(depth=18, width=0.125, version=2, norm="group", weight_standardization=True)
    variables = random_variables(encoder)
    images = np.float32(np.random.default_rng(1).uniform(size=(2, 40, 40, 3)))
    apply = functools.partial(encoder.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    (pooled, stages), captured = jax.jit(apply)(variables, images)
    np.testing.assert_allclose(pooled, np.asarray(stages["stage4"]).mean((1, 2)), atol=1e-5)
    for i, norm in enumerate(("stage2_block1", "stage3_block1", "stage4_block1"), 1):
        normed = captured["intermediates"][norm]["norm1"]["__call__"][0]
        np.testing.assert_allclose(stages[f"stage{i}"], np.maximum(normed, 0), atol=1e-6)
        assert (np.asarray(normed) < 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_attention_over_a_random_v2_network_starts_as_spread_out_as_over_v1(norm):
    """The largest place of a mask; over the residual stream itself one of 196 places took 0.93 with GroupNorm."""
    images = np.float32(np.random.default_rng(3).uniform(size=(2, 7, 7, 3))).repeat(32, 1).repeat(32, 2)

    def peak(**kind) -> np.ndarray:
        encoder, pool = ResNet(**kind), MultiScalePool()
        variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), images)
        _, stages = jax.jit(functools.partial(encoder.apply, train=True, mutable=["batch_stats"]))(variables, images)[0]
        (_, masks), _ = jax.jit(lambda key: pool.init_with_output(key, stages))(jax.random.key(1))
        return np.array([masks[name].max() for name in ("stage3", "stage4")])

    v2 = peak(version=2, norm=norm, weight_standardization=norm == "group")
    assert (v2 < 2 * peak(version=1)).all(), v2


@pytest.mark.parametrize(
    "size, stride, side", [(1, 1, 5), (1, 2, 6), (1, 2, 5), (3, 1, 5), (3, 2, 6), (3, 2, 5), (7, 2, 8)]
)
def test_convolution_pads_symmetrically(size, stride, side):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 4))
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    out = -(-side // stride)
    expected = np.zeros((2, out, out, 4))
    for i in range(out):
        for j in range(out):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            expected[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    found = Conv(4, size, stride).apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("pad_value", [0.0, -np.inf])
def test_max_pool_and_its_gradient(side, pad_value):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)) - 1.5  # mostly negative: zero padding shows
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=pad_value)
    out = (side + 1) // 2
    expected, gradient = np.zeros((2, out, out, 3)), np.zeros_like(padded)
    for b, i, j, c in np.ndindex(expected.shape):
        window = padded[b, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c]
        di, dj = np.unravel_index(window.argmax(), (3, 3))
        expected[b, i, j, c] = window.max()
        gradient[b, 2 * i + di, 2 * j + dj, c] += 1 + i + 10 * j  # a different weight for every output
    weights = jnp.asarray(np.fromfunction(lambda b, i, j, c: 1 + i + 10 * j, expected.shape), jnp.float32)
    pool = functools.partial(max_pool, pad_value=pad_value)
    np.testing.assert_array_equal(pool(jnp.float32(x)), np.float32(expected))
    found = jax.grad(lambda x: (pool(x) * weights).sum())(jnp.float32(x))
    np.testing.assert_allclose(found, gradient[:, 1:-1, 1:-1], atol=1e-5)


def batch_norm_oracle(x, scale, bias):
    """float64: normalised by its own mean and biased variance over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias


def apply_batch_norm(x, scale, bias, **options):
    variables = {
        "params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)},
        "batch_stats": {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 3.0)},
    }
    y, updated = jax.jit(lambda x: BatchNorm(**options).apply(variables, x, True, mutable=["batch_stats"]))(x)
    return y, updated["batch_stats"]


@pytest.mark.parametrize("shape", [(8, 4, 5, 3), (8, 3)])
def test_batch_norm_over_the_whole_batch(shape):
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(5, 2, shape), rng.normal(size=3), rng.normal(size=3)
    y, stats = apply_batch_norm(jnp.float32(x), scale, bias)
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(y, batch_norm_oracle(x, scale, bias), atol=1e-5)
    np.testing.assert_allclose(stats["mean"], 0.9 * 2 + 0.1 * x.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 * 3 + 0.1 * x.var(axes), rtol=1e-5)


def test_batch_norm_in_groups_is_batch_norm_of_each_group():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(5, 2, (8, 4, 5, 3)), rng.normal(size=3), rng.normal(size=3)
    y, stats = apply_batch_norm(jnp.float32(x), scale, bias, groups=4)
    expected = [batch_norm_oracle(part, scale, bias) for part in np.split(x, 4)]
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    group_var = np.mean([part.var((0, 1, 2)) for part in np.split(x, 4)], axis=0)
    np.testing.assert_allclose(stats["var"], 0.9 * 3 + 0.1 * group_var, rtol=1e-5)
    with pytest.raises(ConfigError, match="bn_groups=3 does not divide the batch of 8"):
        apply_batch_norm(jnp.float32(x), scale, bias, groups=3)


def test_batch_norm_gradient_against_finite_differences_in_float64():
    rng = np.random.default_rng(0)
    x, scale, bias, weights = (
        rng.normal(1, 2, (4, 2, 2, 3)),
        rng.normal(size=3),
        rng.normal(size=3),
        rng.normal(size=(4, 2, 2, 3)),
    )

    def loss(x, scale):
        return (batch_norm_oracle(x, scale, bias) ** 2 * weights).sum()

    def loss_jax(x, scale):
        variables = {
            "params": {"scale": scale, "bias": jnp.float32(bias)},
            "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
        }
        y, _ = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
        return (y**2 * jnp.float32(weights)).sum()

    dx, dscale = jax.grad(loss_jax, argnums=(0, 1))(jnp.float32(x), jnp.float32(scale))
    for found, array, f in ((dx, x, lambda a: loss(a, scale)), (dscale, scale, lambda a: loss(x, a))):
        expected = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[index] = 1e-5
            expected[index] = (f(array + step) - f(array - step)) / 2e-5
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_batch_norm_of_a_sharded_batch_is_that_of_the_global_batch():
    x = normal(16, 2, 2, 3) * 2 + 5
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    for groups in (1, 8):
        here, there = (apply_batch_norm(a, np.ones(3), np.zeros(3), groups=groups) for a in (x, sharded))
        chex.assert_trees_all_close(here, there, atol=1e-5)


def test_group_norm_against_numpy():
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 4, 64))
    norm = make_norm("group", name="norm")
    variables = {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}
    grouped = x.reshape(2, 16, 32, 2)  # 32 groups of 2 channels
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(norm.apply(variables, jnp.float32(x), False), expected, atol=1e-5)


def test_standardised_kernels_have_mean_0_and_variance_1_whatever_their_scale_and_offset():
    kernel = normal(3, 3, 8, 5)
    expected = (kernel - kernel.mean((0, 1, 2))) / kernel.std((0, 1, 2))  # per output channel
    np.testing.assert_allclose(standardize_kernel(jnp.asarray(kernel)), expected, atol=1e-5)
    np.testing.assert_allclose(standardize_kernel(jnp.asarray(7 * kernel + 3)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, bound, deviation",
    [
        ("torchvision", None, math.sqrt(2 / (9 * 512))),  # He et al., outputs
        # haiku: a normal of deviation 1 / sqrt(inputs), cut at 2 of them, which leaves 0.8796 of it
        ("haiku", 2 / math.sqrt(9 * 256), 0.87962566 / math.sqrt(9 * 256)),
        ("tensorflow", math.sqrt(6 / (9 * (256 + 512))), math.sqrt(2 / (9 * (256 + 512)))),  # Glorot & Bengio, uniform
    ],
)
def test_initial_kernels_have_the_deviation_of_the_library_they_are_named_after(name, bound, deviation):
    kernel = np.asarray(KERNEL_INITS[name](jax.random.key(0), (3, 3, 256, 512)))
    np.testing.assert_allclose(np.std(kernel), deviation, rtol=0.01)
    assert abs(np.mean(kernel)) < 2e-4
    assert bound is None or 0.99 * bound < np.abs(kernel).max() <= bound
    encoder = ResNet(depth=18, width=0.25, kernel_init=name)
    found = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    shape = found["params"]["stage4_block2"]["conv1"]["kernel"].shape
    expected = np.std(KERNEL_INITS[name](jax.random.key(1), shape))
    np.testing.assert_allclose(np.std(found["params"]["stage4_block2"]["conv1"]["kernel"]), expected, rtol=0.02)


def test_a_bottleneck_can_start_as_its_shortcut():
    """haiku's BlockV1: the last scale of a bottleneck is 0, basic blocks start at 1."""

    def scales(depth):
        variables = ResNet(depth=depth, width=0.0625, last_scale=0.0).init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
        )
        return {path: leaf for path, leaf in flatten_dict(variables["params"]).items() if path[-1] == "scale"}

    for path, leaf in scales(50).items():
        assert (leaf == (0.0 if path[-2] == "norm3" else 1.0)).all(), path
    assert all((leaf == 1.0).all() for leaf in scales(18).values())


def test_kernels_are_standardised_before_they_are_rounded():
    """Against float64, rounded once: of a kernel far from 0, rounding first loses most of what its mean leaves."""
    encoder = ResNet(depth=18, width=0.0625, norm="group", weight_standardization=True, dtype="bfloat16")
    kernel = np.float32(3 + 0.01 * np.random.default_rng(0).normal(size=(3, 3, 4, 4)))
    cast = encoder.cast_kernels({"conv": {"kernel": jnp.asarray(kernel)}})["conv"]["kernel"]
    exact = np.float64(kernel) - np.float64(kernel).mean((0, 1, 2))
    exact /= exact.std((0, 1, 2))
    assert cast.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(cast), exact, rtol=0.01, atol=1e-3)  # bfloat16 has 8 bits
    assert not encoder.on_cast_kernels().weight_standardization
    rounded = jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32)
    assert np.abs(np.asarray(standardize_kernel(rounded)) - exact).max() > 0.3


def test_batch_norm_has_the_decay_and_eps_it_is_given():
    encoder = ResNet(depth=18, width=0.0625, norm_decay=0.99, norm_eps=1e-3)
    images = np.float32(np.random.default_rng(1).uniform(size=(4, 32, 32, 3)))
    variables = random_variables(encoder)
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    apply = functools.partial(
        encoder.apply, train=True, capture_intermediates=True, mutable=["batch_stats", "intermediates"]
    )
    _, updated = jax.jit(apply)(variables, images)
    read = np.float64(updated["intermediates"]["stem_conv"]["__call__"][0])
    stem = jax.tree.map(np.float64, variables["params"]["stem_norm"])
    mean, var = read.mean((0, 1, 2)), read.var((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["stem_norm"]["mean"], 0.01 * mean, rtol=1e-3, atol=1e-6)
    expected = (read - mean) / np.sqrt(var + 1e-3) * stem["scale"] + stem["bias"]
    np.testing.assert_allclose(updated["intermediates"]["stem_norm"]["__call__"][0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_a_block_whose_branch_is_zero_is_its_shortcut(version):
    conv, norm = functools.partial(Conv), functools.partial(make_norm, "group")
    block = Block(channels=16, stride=1, bottleneck=True, version=version, last_scale=1.0, conv=conv, norm=norm)
    x = normal(2, 4, 4, 64)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(1), x, True), x)["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)
    last = "norm3" if version == 1 else "conv3"  # the last layer of the branch
    params[last] = jax.tree.map(jnp.zeros_like, params[last])
    expected = np.maximum(x, 0) if version == 1 else x
    y, read = block.apply({"params": params}, x, True)
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
    images = np.float32(np.random.default_rng(1).uniform(size=(4, 32, 32, 3)))
    encoder = ResNet(depth=18, width=0.125)
    variables = random_variables(encoder)

    def gradient(encoder):
        def loss(params):
            (pooled, _), _ = encoder.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.square(pooled).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    chex.assert_trees_all_close(gradient(encoder), gradient(encoder.clone(remat=True)), rtol=1e-3, atol=1e-3)
