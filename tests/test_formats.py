"""Every format: the same features in its own runtime, at even and odd sizes; other features are not called fine."""

import functools
import hashlib
import importlib.util
import json
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from helpers.commands import ROOT, run_module
from helpers.networks import random_variables
from helpers.torchvision_models import import_or_skip
from vivi_jax import export
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import formats
from vivi_jax.export.formats import hub, npz, onnx_graph
from vivi_jax.models import build_encoder
from vivi_jax.models.base import Encoder

V1 = dict(name="resnet", depth=18, width=0.125)
BIT = dict(name="resnet", depth=50, width=0.5, version=2, norm="group", weight_standardization=True)
V2 = dict(name="resnet", depth=18, width=0.125, version=2)
SWIN = dict(name="swin", width=24, depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), window=4, patch=2)
VIT = dict(name="vit", width=48, depth=2, heads=4, patch=8, image_size=24)
VDIM = dict(name="vdim", table="small", width=0.25, frames=8)
slow = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def torchvision_imports():
    """transformers' models import it where it is installed."""
    if importlib.util.find_spec("torchvision"):
        import_or_skip("torchvision")


@functools.cache
def network(**config) -> tuple[Encoder, dict]:
    """An encoder with jittered norms, so that nothing about them is hidden."""
    encoder = build_encoder(**config)
    return encoder, random_variables(encoder)


def saved(form: str, config: dict, out, size: int) -> str:
    """Writes and tries an export; returns the line that says how it was tried."""
    encoder, variables = network(**config)
    return export.save(form, encoder, variables, out, export.About(size))[1]


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


def assert_same_features(form: str, config: dict, out, shape: tuple[int, ...]) -> None:
    """In the runtime's own hands, on images that the export was not tried on."""
    encoder, variables = network(**config)
    expected = np.asarray(jax.jit(functools.partial(encoder.apply, train=False))(variables, images(*shape))[0])
    found = formats.pick(form, out).call(out, images(*shape), encoder)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.std(expected) > 0.01


@pytest.mark.parametrize(
    "config, size",
    [
        (V1, 33),
        pytest.param(dict(V1, num_classes=3), 32, marks=slow),
        pytest.param(BIT, 33, marks=slow),
        pytest.param(V2, 32, marks=slow),
        pytest.param(V2, 33, marks=slow),
        (VIT, 24),
        pytest.param(VIT, 27, marks=slow),
        pytest.param(SWIN, 32, marks=slow),
        pytest.param(SWIN, 35, marks=slow),
        pytest.param(VDIM, 48, marks=slow),
    ],
)
def test_onnx(config, size, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "a.onnx"
    assert saved("onnx", config, out, size).startswith("checked in onnxruntime")
    shape = (5, 8, size, size, 3) if config["name"] == "vdim" else (5, size, size, 3)
    assert_same_features("onnx", config, out, shape)
    subprocess.run(["sha256sum", "--check", "--quiet", "a.onnx.sha256"], cwd=tmp_path, check=True)


def test_a_max_pool_of_negative_values_is_kept_apart_from_its_padding(tmp_path):
    """onnxruntime up to 1.31 joins Pad and MaxPool into one that pads with -inf: between them stands another node."""
    onnx = pytest.importorskip("onnx")
    encoder, variables = network(**V2)
    apply = functools.partial(formats.programs.outputs, encoder, variables)
    onnx_graph.write_onnx(apply, (1, 32, 32, 3), tmp_path / "a.onnx", {})
    nodes = {node.output[0]: node for node in onnx.load(tmp_path / "a.onnx").graph.node}
    (pool,) = [node for node in nodes.values() if node.op_type == "MaxPool"]
    kinds, node = [], pool
    while node.op_type != "Pad":
        node = nodes[node.input[0]]
        kinds.append(node.op_type)
    assert kinds[-1] == "Pad" and "Max" in kinds


@pytest.mark.parametrize(
    "config, size", [(V1, 32), pytest.param(V2, 33, marks=slow), pytest.param(VIT, 27, marks=slow)]
)
def test_stablehlo(config, size, tmp_path):
    out = tmp_path / "a"
    assert saved("stablehlo", config, out, size).startswith(f"checked in jax {jax.__version__}")
    assert_same_features("stablehlo", config, out, (5, size, size, 3))
    program = jax.export.deserialize(bytearray((out / "encoder.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert (out / "encoder.stablehlo").stat().st_size < 1_000_000  # without the weights
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


@slow
@pytest.mark.parametrize("config, size", [(dict(V1, num_classes=3), 33), (SWIN, 32)])
def test_saved_model(config, size, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    said = saved("savedmodel", config, tmp_path / "a", size)
    assert said.startswith(f"checked in tensorflow {tensorflow.__version__}:")
    assert f"TensorFlow {tensorflow.__version__}, in which" in (tmp_path / "a/README.md").read_text()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True)
    assert_same_features("savedmodel", config, tmp_path / "a", (5, size, size, 3))


@pytest.mark.parametrize("config", [V1, BIT, SWIN, VIT, VDIM], ids=lambda config: config["name"])
def test_npz_comes_back_exactly(config, tmp_path):
    encoder, variables = network(**config)
    export.export_encoder("npz", encoder, variables, tmp_path / "a.npz")
    arguments, loaded = export.load_encoder(tmp_path / "a.npz")
    assert build_encoder(**arguments) == encoder
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(variables)))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        state = dict(archive)
    state[next(name for name in state if name.startswith("params/"))] += 1
    with pytest.raises(CheckpointError, match="damaged"):
        npz.read(state, {})


@pytest.mark.parametrize(
    "config, sizes",
    [
        (V1, (32, 33)),
        pytest.param(dict(V1, depth=50, num_classes=4), (32, 33), marks=slow),
        pytest.param(BIT, (32, 33), marks=slow),
        (VIT, (24,)),
        pytest.param(SWIN, (64,), marks=slow),
    ],
)
def test_huggingface(config, sizes, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "a"
    assert saved("huggingface", config, out, sizes[0]).startswith("checked in transformers")
    for size in sizes:
        assert_same_features("huggingface", config, out, (3, size, size, 3))
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"] == {
        "height": sizes[0],
        "width": sizes[0],
    }
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_an_entry_that_transformers_would_fill_at_random_is_an_error(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    encoder, variables = network(**VIT)
    export.export_encoder("huggingface", encoder, variables, tmp_path)
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    state["layernorm.wait"] = state.pop("layernorm.weight")
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys.*layernorm.weight.*unexpected_keys.*layernorm.wait"):
        hub.call_transformers(tmp_path, images(1, 24, 24, 3))


@slow
@pytest.mark.parametrize(
    "form, config, size",
    [
        ("torchvision", dict(V1, width=1), 32),
        ("timm", dict(V1, width=1), 32),
        ("timm", dict(V2, width=1, num_classes=3), 33),
        ("timm", VIT, 24),
    ],
)
def test_torchvision_and_timm(form, config, size, tmp_path):
    import_or_skip(form)
    for out in (tmp_path / "a.safetensors", *((tmp_path / "a",) if form == "timm" else ())):
        assert saved(form, config, out, size).startswith(f"checked in {form}")
        assert_same_features(form, config, out, (3, size, size, 3))


def test_other_features_are_not_called_fine(tmp_path):
    """The comparison itself: an export of other weights is refused, and nothing of it is left."""
    encoder, variables = network(**V1)
    other = jax.tree.map(lambda leaf: leaf * np.float32(1.01), variables)
    chosen = formats.FORMATS["npz"]
    wrong = chosen._replace(write=lambda encoder, _, path, about: chosen.write(encoder, other, path, about))
    wrote = wrong.write(encoder, variables, tmp_path / "a.npz", export.About(32))
    assert wrote
    with pytest.raises(CheckpointError, match=r"a.npz gives other features in numpy .* nothing was written"):
        formats.check("npz", wrong, tmp_path / "a.npz", encoder, variables, export.About(32))


@pytest.mark.parametrize(
    "form, config, works",
    [
        ("torchvision", dict(V2, width=1), "--format=timm or onnx or stablehlo or savedmodel or npz"),
        ("torchvision", VDIM, "has no VdimEncoder; use --format=onnx or stablehlo or savedmodel or npz"),
        ("timm", V1, "has no model of these sizes .*use --format=torchvision or huggingface"),
        ("huggingface", V2, "this one has version=2, norm='batch'.*use --format=onnx"),
    ],
)
def test_a_format_that_has_no_such_encoder_names_those_that_have(form, config, works, tmp_path):
    encoder, variables = network(**config)
    with pytest.raises(ConfigError, match=works):
        export.save(form, encoder, variables, tmp_path / "a", export.About(32))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_export_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    encoder, variables = network(**V1)
    with pytest.raises(ConfigError, match="is a folder that is no earlier export"):
        export.save("stablehlo", encoder, variables, tmp_path / "a", export.About(32))
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_folder_of_any_name_replaces_an_earlier_export(name, tmp_path):
    target, written = tmp_path / name, tmp_path / "beside" / name
    for version in ("first", "second"):
        written.mkdir(parents=True)
        (written / version).touch()
        formats.move(written, target)
        assert [path.name for path in target.iterdir()] == [version]
    assert list(written.parent.iterdir()) == []


def test_the_card_says_what_the_run_s_files_say(tmp_path):
    encoder, variables = network(**VIT)
    run = tmp_path / "run"
    run.mkdir()
    config = {"name": "mine", "batch_size": 8, "seed": 3, "data": {"path": "/home/someone/kinetics"}, "schedule": {}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "data.json").write_text('{"config.data.path=/home/someone/kinetics": "0123456789ab"}')
    (run / "metrics.jsonl").write_text('{"step": 1, "knn_top1": 0.25}\n{"step": 9, "knn_top1": 0.75}\n{"step": 12, "kn')
    about = export.About(24, run, "cc-by-4.0")
    export.export_encoder("huggingface", encoder, variables, tmp_path / "a", about)
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: transformers\n")
    for words in (
        "# mine",
        "| trained on | kinetics (its content has the digest 0123456789ab) |",
        "| knn_top1 | 0.75 at step 9 |",
        "| batch size | 8 |",
    ):
        assert words in card
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert f", commit {head.stdout[:12] or 'unknown'}" in card
    assert "/home/someone" not in card and "arxiv.org" not in card  # without a method no paper
    for method, paper in (("vivi", "1912.02783"), ("moco_v3", "2104.02057")):
        (run / "config.json").write_text(json.dumps(config | {"method": {"name": method}}))
        found = [line for line in hub.card(encoder, variables, about, "timm", "").splitlines() if "arxiv.org" in line]
        assert found == [f"| paper | [arXiv:{paper}](https://arxiv.org/abs/{paper}) |"]
    sums = (tmp_path / "a" / "SHA256SUMS").read_text().split()
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in sums


@slow
def test_the_command_says_how_it_was_tried(tmp_path):
    encoder, variables = network(**V1)
    export.export_encoder("npz", encoder, variables, tmp_path / "in.npz")
    done = run_module(
        "vivi_jax.export",
        f"--checkpoint={tmp_path}/in.npz",
        "--format=stablehlo",
        "--image_size=33",
        f"--out={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr
    assert "inputs 1x33x33x3 and 3x33x33x3" in done.stdout and "  run: in.npz" in done.stdout
    assert (ROOT / "setup.py").is_file()
