"""The steps that ours are timed against do the same work: equal colours and losses; a whole run at its smallest."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import gpu, results, same_work, torch_color, torch_moco_v3, torch_vdim, torch_vito, torch_vivi  # noqa: E402
from helpers.commands import one_device  # noqa: E402
from vivi_jax import losses  # noqa: E402
from vivi_jax.augment import color, vivi  # noqa: E402
from vivi_jax.models import vit  # noqa: E402

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def planes_of(images: np.ndarray) -> tuple:
    return tuple(torch.from_numpy(images[..., c].reshape(len(images), -1)) for c in range(3))


def images_of(planes: tuple, like: np.ndarray) -> np.ndarray:
    return torch.stack(planes, dim=-1).view(like.shape).numpy()


def test_colours_equal_ours():
    images = RNG.random((4, 8, 8, 3), dtype=np.float32)
    order = np.stack([RNG.permutation(4) for _ in images])
    names = ("shift", "contrast_factor", "saturation_factor", "hue_shift")
    values = dict(zip(names, RNG.uniform(0.1, 1.2, size=(4, len(images))).astype(np.float32), strict=True))
    ours = jax.vmap(lambda image, order, values: color.jitter_in_order(image, order, **values))(images, order, values)
    theirs = torch_color.jitter_in_order(
        planes_of(images), torch.from_numpy(order), **{k: torch.from_numpy(v)[:, None] for k, v in values.items()}
    )
    np.testing.assert_allclose(images_of(theirs, images), ours, atol=1e-5)

    factors, hue = [values[name] for name in names[:3]], values["hue_shift"]
    ours = jax.vmap(
        lambda image, order, *values: color.torchvision_jitter_in_order(
            image, order, factors=list(values[:3]), hue_shift=values[3]
        )
    )(images, order, *factors, hue)
    theirs = torch_color.torchvision_jitter_in_order(
        planes_of(images),
        torch.from_numpy(order),
        factors=[torch.from_numpy(v)[:, None] for v in factors],
        hue_shift=torch.from_numpy(hue)[:, None],
    )
    np.testing.assert_allclose(images_of(theirs, images), ours, atol=1e-5)

    shift, factor = values["shift"], values["saturation_factor"]
    ours = jax.vmap(vivi.shift_and_saturate)(images, shift, factor)
    theirs = torch_color.shift_and_saturate(planes_of(images), *(torch.from_numpy(v)[:, None] for v in (shift, factor)))
    np.testing.assert_allclose(images_of(theirs, images), ours, atol=1e-5)

    theirs = torch_color.grey(planes_of(images))
    np.testing.assert_allclose(images_of(theirs, images), color.to_grey(images), atol=1e-5)

    sigma = np.float32([0.1, 0.5, 1.0, 2.0])
    ours = jax.vmap(functools.partial(color.gaussian_blur, radius=2))(images, sigma)
    theirs = torch_color.gaussian_blur(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(sigma)[:, None], radius=2
    )
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), ours, atol=1e-5)


def test_losses_equal_ours():
    def compare(theirs, ours, *arrays):
        np.testing.assert_allclose(theirs(*map(torch.from_numpy, arrays)), ours(*arrays), rtol=1e-4)

    exemplars = normal(8, 3, 5)
    compare(
        functools.partial(torch_vivi.semi_hard_triplet, margin=0.5, groups=2),
        lambda e: losses.semi_hard_triplet(jnp.asarray(e), margin=0.5, groups=2)[0],
        exemplars,
    )
    compare(torch_vivi.shot_info_nce, lambda p, s: losses.shot_info_nce(p, s)[0], normal(4, 3, 5), normal(4, 4, 5))

    def deep_infomax(a, c):
        nce, penalty = losses.deep_infomax_nce(a, c, clip_score=20.0)
        return nce + 0.05 * penalty

    compare(torch_vdim.nce, deep_infomax, normal(4, 6, 5), normal(4, 1, 5))
    online, target = normal(4, 3, 5), normal(4, 3, 5)
    step = torch_vito.VitoStep(18, 0.25)
    theirs = step.loss({"online": torch.from_numpy(online), "target": torch.from_numpy(target)}, None)
    np.testing.assert_allclose(theirs, losses.moclr(online, target), rtol=1e-4)
    np.testing.assert_allclose(
        torch_moco_v3.sine_cosine(3, 8), vit.positions(3, 3, 8).reshape(9, 8), rtol=1e-4, atol=1e-5
    )


def test_a_peer_that_does_other_work_is_refused():
    ours = {"parameters": 10, "outputs": {"z": [2, 3]}, "flops_per_step": 100.0}
    same_work.check(ours, ours | {"flops_per_step": 105.0}, quick=False)
    for other in ({"parameters": 11}, {"outputs": {"z": [2, 4]}}, {"flops_per_step": 120.0}):
        with pytest.raises(SystemExit, match="not the same work, so not timed"):
            same_work.check(ours, ours | other, quick=False)


@pytest.mark.slow
@pytest.mark.parametrize("row", gpu.ROWS)
def test_every_peer_does_our_work(row):
    """At the smallest sizes, without compiling ours."""
    ours = gpu.describe(row, quick=True)
    step, prepare = gpu.ROWS[row].peer(gpu.ROWS[row].config(True), "cpu")
    shapes = {name: (s.shape, s.dtype) for name, s in gpu.batch_spec(row, gpu.ROWS[row].config(True)).items()}
    batch = {name: torch.from_numpy(array) for name, array in gpu.synthetic(shapes).items()}
    same_work.check(ours, same_work.of_peer(step, prepare(batch)), quick=True)


@pytest.mark.slow
def test_rows_run_at_their_smallest_size(tmp_path):
    """One of them, as each compiles for minutes in both frameworks; `python -m benchmarks.gpu --quick` runs all."""
    rows = ["vito"]
    done = run("--quick", f"--rows={','.join(rows)}", f"--out={tmp_path / 'gpu.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads((tmp_path / "gpu.json").read_text())["values"]
    assert [row["row"] for row in values["rows"]] == rows
    for row in values["rows"]:
        assert not [part["error"] for part in (row["ours"], row["peer"], row.get("parity", {})) if "error" in part], row
        assert row["parameters"] == row["peer"]["parameters"] and row["rate_ratio"] > 0
        assert row["batch"] and row["images_per_step"] > 0 and row["flops_per_step"] > 1e6
        assert {"eager", "compiled"} <= set(row["peer"]["modes"])
    found = [row["parity"] for row in values["rows"] if "parity" in row]
    assert len(found) == 1
    for parity in found:  # the cosine of such small networks says little: maps of one location, few examples
        assert parity["loss"]["bfloat16"] == pytest.approx(parity["loss"]["float32"], rel=0.05)
        assert parity["gradient_cosine"] > 0.2


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    if gpu.gpu():
        pytest.skip("there is a GPU")
    done = run(f"--out={tmp_path / 'gpu.json'}")
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU here") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        cwd=results.ROOT,
        env=one_device(),
    )
