"""Training steps on one GPU, ours against the same work in PyTorch.

    python -m benchmarks.gpu [--rows=vito,vivi,...] [--out=JSON] [--quick]

Each row is a whole step with the paper's network in bfloat16, from uint8 images that are on the GPU already to the
updated parameters, colours included. The peers (benchmarks/torch_*.py) are run eagerly in channels_last and compiled,
and as time remains compiled with "max-autotune-no-cudagraphs"; the best counts. A peer is timed only if it has as many
parameters, outputs of the same shapes and, within a tenth, as many FLOPs.

    seconds       median of the repetitions, and their range; a repetition is as many steps as fill REPETITION_SECONDS
    memory        peak of the framework's own allocator, each framework being in a process of its own
    utilisation   FLOPs of our step before compilation, for both, over the time and over the rate of an 8192^3 bfloat16
                  product, measured in the same run: the faster of the two frameworks'
    parity        our loss and gradient in bfloat16 against float32, from the same weights and images

While one process of each framework compiles, the next gets ready, but a process that measures is alone: the others are
stopped meanwhile. The whole takes BUDGET_SECONDS at most; what was not begun by then is named. The file
is written anew after every row. It needs JAX and PyTorch with their GPU, and neither a network nor TensorFlow; without
git the environment variable COMMIT says what was measured. --quick runs everything at its smallest size on whatever is
there, and measures nothing.
"""

import argparse
import collections
import contextlib
import fcntl
import functools
import json
import math
import os
import pathlib
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from benchmarks import results, same_work
from benchmarks.same_work import NOT_TIMED, OurStep, our_method_step

SEED = 0
REPETITIONS, REPETITION_SECONDS = 5, 0.5
BUDGET_SECONDS = 460.0  # of the whole run; --quick has an hour for all, as CI's machines are slow
CHILD_SECONDS = {"ours": 260.0, "peer": 200.0, "peer_max": 200.0, "parity": 200.0, "spec": 300.0}  # of their turn
IN_LANE = {"spec": 1, "ours": 2, "parity": 1, "peer": 2}  # processes at a time: one compiles, the next gets ready
MATRIX = 8192
SCRATCH = "BENCHMARKS_GPU_SCRATCH"  # environment variable: a folder of one run
NO_GPU = "a framework sees no GPU"


# ---- What is measured -----------------------------------------------------------------------------------------------
def vito_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import vito

    return resized(vito.get_config("views=2" if quick else ""), quick, batch_size=128)


def vivi_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import vivi

    config = with_group_norm(resized(vivi.get_config("ex4"), quick, batch_size=8))
    config.data.frames = 2 if quick else config.data.frames
    # Of 16 shots each as in the paper's config; and a rate at which random images do not let the loss diverge.
    config.method.triplet_groups = math.ceil(config.batch_size * config.data.shots / 16)
    config.schedule.lr = 1e-3
    return config


def supervised_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import vivi

    config = with_group_norm(resized(vivi.get_config("sup,co=100"), quick, batch_size=1))
    config.data.labelled_batch_size = 8 if quick else 256
    config.schedule.lr = 1e-3
    return config


def vdim_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import vdim

    config = vdim.get_config("difference=no")
    config.batch_size = 4 if quick else 32
    if quick:
        config.encoder.table = "small"
        config.data.update(dict(frames=8, image_size=48))
    return config


def moco_v3_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import moco_v3

    config = moco_v3.get_config()
    config.batch_size = 4 if quick else 128
    if quick:
        config.encoder.update(dict(width=48, depth=2, heads=4, image_size=32))
        config.data.image_size = 32
    return config


def vtab_config(quick: bool) -> ml_collections.ConfigDict:
    from configs import vtab

    config = vtab.get_config()
    config.batch_size, config.image_size = (8, 32) if quick else (256, 224)
    config.num_classes = 100
    network = dict(name="resnet", depth=50, version=2, norm="batch", width=1.0, stem="imagenet", dtype="bfloat16")
    config.network = network | (dict(depth=18, width=0.25) if quick else {})  # VIVI §4's encoder
    return config


def with_group_norm(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """GroupNorm and weight standardisation, as VIVI's co-training has them; a batch of any size will do."""
    config.encoder.update(dict(norm="group", weight_standardization=True, bn_groups=1))
    return config


def resized(config: ml_collections.ConfigDict, quick: bool, batch_size: int) -> ml_collections.ConfigDict:
    """A ResNet's config with the batch of one GPU, or of the smallest size."""
    config.batch_size = min(batch_size, 4) if quick else batch_size
    if quick:
        config.encoder.update(dict(depth=18, width=0.25))
        config.data.image_size = 32
    return config


def synthetic(shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """A batch: images of 4 x 4 random coloured fields with noise, which differ as photographs do; labels below 100."""
    rng, batch = np.random.default_rng(SEED), {}
    for name, (shape, dtype) in shapes.items():
        if dtype != np.uint8:
            batch[name] = rng.integers(100, size=shape).astype(dtype)
            continue
        *rows, height, width, _ = shape
        fields = rng.integers(240, size=(*rows, 4, 4, 3), dtype=np.uint8)
        images = fields.repeat(height // 4, axis=-3).repeat(width // 4, axis=-2)
        batch[name] = images + rng.integers(16, size=(*[1] * len(rows), height, width, 3), dtype=np.uint8)
    return batch


def timed(step: Callable[[], Any], wait: Callable[[], Any], quick: bool, repetitions: int = REPETITIONS) -> dict:
    """Seconds per step. `step` only starts its work; `wait` ends when all of it is done."""

    def repetition(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - start) / steps

    repetition(1 if quick else 3)  # warms up
    steps = 1 if quick else max(2, math.ceil(REPETITION_SECONDS / repetition(2)))
    seconds = [repetition(steps) for _ in range(2 if quick else repetitions)]
    return {
        "seconds_per_step": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "steps": steps * len(seconds),
    }


# ---- A child's side of the talk with its parent ---------------------------------------------------------------------
def say(**values) -> None:
    print(json.dumps(values, allow_nan=False), flush=True)


@contextlib.contextmanager
def alone() -> Iterator[dict]:
    """The GPU for itself; yields what our step of the row is, see `spec`."""
    say(turn="begin")
    yield json.loads(sys.stdin.readline())
    say(turn="end")


@contextlib.contextmanager
def compiling(framework: str) -> Iterator[None]:
    """One process of a framework at a time, as its search for fast kernels must not meet another's."""
    with open(pathlib.Path(os.environ[SCRATCH], framework), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        say(compiling=framework)
        yield


# ---- Ours -----------------------------------------------------------------------------------------------------------
def our_step(row: str, quick: bool) -> OurStep:
    config = ROWS[row].config(quick)
    return our_vtab_step(config) if row == "vtab" else our_method_step(config)[0]


def our_vtab_step(config: ml_collections.ConfigDict) -> OurStep:
    import jax
    import jax.numpy as jnp

    from evaluation.protocols.vtab import finetune
    from vivi_jax.models import build_encoder

    encoder = build_encoder(**config.network)
    image = jax.ShapeDtypeStruct((config.batch_size, config.image_size, config.image_size, 3), jnp.uint8)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    variables = jax.eval_shape(
        lambda key: encoder.init(key, jnp.zeros((1, *image.shape[1:])), train=False), jax.random.key(SEED)
    )
    classifier, variables = finetune.make_classifier(
        encoder, variables, num_classes=config.num_classes, image_size=config.image_size
    )
    state = {**variables, "velocity": variables["params"]}

    def step(state, batch):
        *changed, loss = finetune.train_step(
            classifier, *(state[name] for name in ("params", "batch_stats", "velocity")), batch, 1e-3, momentum=0.9
        )
        return dict(zip(("params", "batch_stats", "velocity"), changed, strict=True)), {"loss": loss}

    outputs = {"class_logits": (config.batch_size, config.num_classes)}
    return OurStep(step, state, batch, state["params"], outputs)


def weights_like(shapes: Any) -> Any:
    """Random kernels, scales and variances of one, all else zero: as at step 0, but there is no program to compile."""
    import jax

    rng = np.random.default_rng(SEED)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "opt_state" in name or "velocity" in name:
            return np.zeros(leaf.shape, leaf.dtype)
        if name.endswith("kernel']"):
            values = rng.standard_normal(leaf.shape, np.float32) / math.sqrt(math.prod(leaf.shape[:-1]))
            return values.astype(leaf.dtype)
        return np.full(leaf.shape, name.endswith(("scale']", "var']")), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def start_jax(quick: bool) -> str:
    """The kind of device, once JAX has it."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and not quick:
        sys.exit(f"{NO_GPU}: JAX")
    return device.device_kind


def ours(row: str, quick: bool) -> None:
    import jax

    say(device=start_jax(quick))
    ours = our_step(row, quick)
    lowered = jax.jit(ours.step, donate_argnums=0).lower(ours.state, ours.batch)
    with compiling("ours"):
        start = time.perf_counter()
        compiled = lowered.compile(gpu_options())
        say(compile_seconds=time.perf_counter() - start)
    state, metrics = weights_like(ours.state), {}
    batch = synthetic({name: (s.shape, s.dtype) for name, s in ours.batch.items()})
    with alone():
        state, batch = jax.device_put((state, batch))

        def step() -> None:
            nonlocal state, metrics
            state, metrics = compiled(state, batch)

        say(**timed(step, lambda: jax.block_until_ready((state, metrics)), quick), loss=float(metrics["loss"]))
        say(peak_memory_mb=peak_memory(jax.devices()[0]), planned_memory_mb=planned_memory(compiled))


def peak_memory(device) -> float | None:
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] / 2**20 if stats else None  # CPUs have none


def planned_memory(compiled) -> float:
    """What the compiler has laid out: arguments, results in their place, and all in between."""
    m = compiled.memory_analysis()
    of_results = m.output_size_in_bytes - m.alias_size_in_bytes
    return (m.argument_size_in_bytes + of_results + m.temp_size_in_bytes) / 2**20


def spec(rows: list[str], quick: bool) -> None:
    """What our steps are, before compilation; see `describe`. Runs on the CPU."""
    say(row="matrix", spec={"flops_per_step": 2.0 * matrix_size(quick) ** 3})
    failed = False
    for row in rows:
        try:
            say(row=row, spec=describe(row, quick))
        except Exception as error:  # the other rows go on
            failed = True
            print(f"{row}: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(int(failed))


def describe(row: str, quick: bool) -> dict:
    ours = our_step(row, quick)
    return {
        "batch": {name: list(s.shape) for name, s in ours.batch.items()},
        "images_per_step": sum(math.prod(s.shape[:-3]) for s in ours.batch.values() if s.dtype == np.uint8),
        **same_work.of_ours(ours),
    }


def parity(row: str, quick: bool) -> None:
    """Loss and gradient of our step in bfloat16 and in float32 (no TF32), of an eighth of the batch."""
    import jax

    from vivi_jax.train_step import example_keys, plain_gradients

    start_jax(quick)
    losses, gradients = {}, {}
    for dtype in ("bfloat16", "float32"):
        config = ROWS[row].config(quick)
        config.batch_size = max(4, config.batch_size // 8)
        if row == "vivi":
            config.method.triplet_groups = 1
        config.encoder.dtype = dtype
        ours, method = our_method_step(config)

        def gradient(state, batch, method=method):
            found = plain_gradients(method, state, batch, example_keys(SEED, state.step, batch))
            return found.metrics["loss"], found.grads

        with jax.default_matmul_precision("float32" if dtype == "float32" else "default"):
            lowered = jax.jit(gradient).lower(ours.state, ours.batch)
        compiled = compile_quickly(lowered)
        inputs = weights_like(ours.state), synthetic({name: (s.shape, s.dtype) for name, s in ours.batch.items()})
        with alone():
            loss, grads = compiled(*jax.device_put(inputs))
            losses[dtype] = float(loss)
            gradients[dtype] = np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(grads)])
    a, b = gradients["bfloat16"], gradients["float32"]
    say(
        batch_size=config.batch_size,
        loss=losses,
        gradient_cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        gradient_norm_ratio=float(np.linalg.norm(a) / np.linalg.norm(b)),
    )


def gpu_options() -> dict[str, Any] | None:
    """The compiler options of training."""
    import jax

    from vivi_jax.train_step import GPU_OPTIONS

    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


def compile_quickly(lowered):
    """Without the search for the fastest kernels, where the compiler knows that option."""
    if options := gpu_options():
        with contextlib.suppress(Exception):  # an option of XLA's, whose names come and go
            return lowered.compile(options | {"xla_gpu_autotune_level": 0})
    return lowered.compile(options)


def matrix_size(quick: bool) -> int:
    return 256 if quick else MATRIX


def our_matrix(quick: bool) -> None:
    import jax
    import jax.numpy as jnp

    say(device=start_jax(quick))
    a, b = (jax.random.normal(jax.random.key(k), (matrix_size(quick),) * 2).astype(jnp.bfloat16) for k in (0, 1))
    product = jax.jit(jnp.matmul)
    c = jax.block_until_ready(product(a, b))
    with alone():

        def step() -> None:
            nonlocal c
            c = product(a, b)

        say(**timed(step, lambda: jax.block_until_ready(c), quick))


# ---- PyTorch's ------------------------------------------------------------------------------------------------------
def vito_peer(config, device: str):
    from benchmarks import torch_color
    from benchmarks.torch_vito import VitoStep

    def views(batch: dict) -> tuple:
        return (views_in_channels_last(torch_color.byol_views(batch["views"])),)

    return VitoStep(config.encoder.depth, config.encoder.width, device=device, bfloat16=in_bfloat16(config)), views


def moco_v3_peer(config, device: str):
    from benchmarks import torch_color
    from benchmarks.torch_moco_v3 import MocoV3Step

    def views(batch: dict) -> tuple:
        return (views_in_channels_last(torch_color.byol_views(batch["views"])),)

    step = MocoV3Step(
        {name: config.encoder[name] for name in ("patch", "width", "depth", "heads", "image_size")},
        hidden=config.method.hidden,
        out=config.method.out,
        temperature=config.method.temperature,
        learning_rate=1e-4,
        weight_decay=config.optimizer.weight_decay,
        device=device,
        bfloat16=in_bfloat16(config),
    )
    return step, views


def views_in_channels_last(views_VxBxHxWx3):
    from benchmarks.torch_step import normalised
    from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD

    views, batch = views_VxBxHxWx3.shape[:2]
    return normalised(views_VxBxHxWx3.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD).unflatten(0, (views, batch))


def vivi_peer(config, device: str):
    from benchmarks import torch_color
    from benchmarks.torch_step import normalised
    from benchmarks.torch_vivi import ViviStep

    statistics = input_statistics(config)

    def frames(batch: dict) -> tuple:
        return (normalised(torch_color.inception(batch["shots"].flatten(0, 2)), *statistics),)

    step = ViviStep(
        config.encoder.depth,
        config.encoder.width,
        shots=config.data.shots,
        frames=config.data.frames,
        method=config.method,
        learning_rate=config.schedule.lr,
        weight_decay=config.optimizer.weight_decay,
        device=device,
        bfloat16=in_bfloat16(config),
    )
    return step, frames


def supervised_peer(config, device: str):
    from benchmarks import torch_color
    from benchmarks.torch_step import normalised
    from benchmarks.torch_vivi import ClassifierStep

    statistics = input_statistics(config)

    def images(batch: dict) -> tuple:
        return normalised(torch_color.inception(batch["image"]), *statistics), batch["label"].long()

    step = ClassifierStep(
        config.encoder.depth,
        config.encoder.width,
        norm=config.encoder.norm,
        num_classes=config.method.num_classes,
        learning_rate=config.schedule.lr,
        weight_decay=config.optimizer.weight_decay,
        device=device,
        bfloat16=in_bfloat16(config),
    )
    return step, images


def vtab_peer(config, device: str):
    from benchmarks.torch_step import normalised
    from benchmarks.torch_vivi import ClassifierStep
    from vivi_jax.models.base import IMAGENET_MEAN, IMAGENET_STD

    def images(batch: dict) -> tuple:
        return normalised(batch["image"].float() / 255, IMAGENET_MEAN, IMAGENET_STD), batch["label"].long()

    step = ClassifierStep(
        config.network.depth,
        config.network.width,
        norm="batch",
        num_classes=config.num_classes,
        learning_rate=1e-3,
        weight_decay=0.0,
        device=device,
        bfloat16=in_bfloat16(config),
    )
    return step, images


def vdim_peer(config, device: str):
    from benchmarks import torch_color
    from benchmarks.torch_step import normalised
    from benchmarks.torch_vdim import VdimStep

    statistics = input_statistics(config)

    def clip(images_BxTxHxWx3):
        frames = normalised(images_BxTxHxWx3.flatten(0, 1), *statistics)
        return frames.unflatten(0, images_BxTxHxWx3.shape[:2]).transpose(1, 2)

    def views(batch: dict) -> tuple:
        return tuple(clip(torch_color.jitter_grey(batch[name])) for name in ("view1", "view2"))

    return VdimStep(config.encoder.table, config.method.embed_dim, device=device, bfloat16=in_bfloat16(config)), views


def in_bfloat16(config) -> bool:
    return config.get("network", config.get("encoder")).dtype == "bfloat16"


def input_statistics(config) -> tuple:
    return tuple(config.encoder.input_mean), tuple(config.encoder.input_std)


def start_torch(quick: bool) -> str:
    import torch

    if not torch.cuda.is_available() and not quick:
        sys.exit(f"{NO_GPU}: PyTorch")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")  # TF32, as JAX's default is
    torch.backends.cudnn.benchmark = True
    return "cuda" if torch.cuda.is_available() else "cpu"


def peer(row: str, quick: bool, max_autotune: bool) -> None:
    """Eager, then compiled; or compiled with max-autotune alone."""
    import torch

    device = start_torch(quick)
    config = ROWS[row].config(quick)
    step, prepare = ROWS[row].peer(config, device)
    shapes = {name: (s.shape, s.dtype) for name, s in batch_spec(row, config).items()}
    batch = {name: torch.from_numpy(array).to(device) for name, array in synthetic(shapes).items()}
    on_gpu = device == "cuda"
    loss = None

    def run() -> None:
        nonlocal loss
        loss = step(*prepare(batch))

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def measure(mode: str, repetitions: int = REPETITIONS, **values) -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        values |= timed(run, wait, quick, repetitions)
        values |= {"peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None, "loss": float(loss)}
        say(mode=mode, values=values)
        if on_gpu:
            torch.cuda.empty_cache()

    with alone() as ours:
        theirs = same_work.of_peer(step, prepare(batch))
        say(**{name: theirs[name] for name in ("parameters", "flops_per_step")})
        same_work.check(ours, theirs, quick)
        if not max_autotune:
            measure("eager", repetitions=3)
    # On a CPU only that it runs is of interest, and Inductor's code for CPUs takes long to build.
    options = {"mode": "max-autotune-no-cudagraphs"} if max_autotune else {}
    options = options if on_gpu else {"backend": "aot_eager"}
    step.compile(**options)
    prepare = torch.compile(prepare, dynamic=False, backend="inductor" if on_gpu else "aot_eager")
    with compiling("peer"):
        start = time.perf_counter()
        run()
        wait()
        seconds = time.perf_counter() - start
    with alone():
        measure("max-autotune" if max_autotune else "compiled", compile_seconds=seconds)


def batch_spec(row: str, config) -> dict:
    """Shapes and dtypes of our batch; the method says them, on the CPU."""
    import jax

    if row == "vtab":
        size = config.image_size
        return {
            "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((config.batch_size,), np.int32),
        }
    from vivi_jax.build import build_method

    return build_method(config).batch_spec(config.batch_size, config.data)


def peer_matrix(quick: bool) -> None:
    import torch

    device = start_torch(quick)
    a, b = (torch.randn((matrix_size(quick),) * 2, device=device).bfloat16() for _ in range(2))
    with alone():
        say(mode="eager", values=timed(lambda: a @ b, lambda: device == "cuda" and torch.cuda.synchronize(), quick))


# ---- Rows ----------------------------------------------------------------------------------------------------------
class Row(NamedTuple):
    what: str
    config: Callable[[bool], ml_collections.ConfigDict]  # of --quick
    peer: Callable[[ml_collections.ConfigDict, str], tuple]  # (config, device) -> (step, uint8 batch -> its inputs)
    parity: bool = False


ROWS = {
    "vito": Row("VITO, ResNet-50: 3 views of 224 px, LARS, target", vito_config, vito_peer, parity=True),
    "vivi": Row("VIVI-Ex(4), ResNet-50 v2 GN+WS: 4 shots of 8 frames of 224 px", vivi_config, vivi_peer, parity=True),
    "vdim": Row("VDIM, Table 1: 2 views of 32 frames of 128 px, no difference", vdim_config, vdim_peer),
    "supervised": Row("Supervised, ResNet-50 v2 GN+WS, 224 px", supervised_config, supervised_peer),
    "vtab": Row("VTAB fine-tuning, ResNet-50 v2 BatchNorm, 224 px", vtab_config, vtab_peer),
    "moco_v3": Row("MoCo v3, ViT-S/16: 2 views of 224 px, AdamW, target", moco_v3_config, moco_v3_peer),
}


# ---- The parent -----------------------------------------------------------------------------------------------------
class Task(NamedTuple):
    kind: str  # of CHILD_SECONDS
    row: str


class Child:
    """A process with a task; its lines go to `events` as (child, line), and (child, None) at its end."""

    def __init__(self, task: Task, rows: list[str], quick: bool, events: queue.Queue, environment: dict[str, str]):
        self.task = task
        self.errors = tempfile.TemporaryFile("w+")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            f"--child={task.kind},{task.row}",
            f"--rows={','.join(rows)}",
        ]
        self.process = subprocess.Popen(
            command + ["--quick"] * quick,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=results.ROOT,
            env=environment | ({"JAX_PLATFORMS": "cpu"} if task.kind in ("spec", "peer", "peer_max") else {}),
            start_new_session=True,
        )
        self.seconds = 3600.0 if quick else CHILD_SECONDS[task.kind]
        self.deadline = time.monotonic() + 2 * self.seconds  # until it compiles: it may wait for the one before
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: queue.Queue) -> None:
        for line in self.process.stdout:
            if line.startswith('{"'):  # other lines are a library's
                events.put((self, json.loads(line)))
        self.process.wait()
        events.put((self, None))

    def signal(self, number: int) -> None:
        """To all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def last_error(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["no message"]
        print(*lines[-12:], sep="\n", file=sys.stderr, flush=True)
        if lines[-1].startswith((NO_GPU, NOT_TIMED)):
            return lines[-1]
        if self.process.returncode < 0:  # a library ended the process: it says why in a line that begins with F
            fatal = [line for line in lines if re.match(r"F\d{4} ", line)] or ["no message"]
            return f"ended by {signal.Signals(-self.process.returncode).name}: {fatal[0]}"[:300]
        named = [line for line in lines if line.split(":")[0].endswith("Error")]  # behind it stands advice
        return (named or lines)[-1][:300]


class Run:
    """All tasks, each framework's one after the other, and what they found."""

    def __init__(self, rows: list[str], quick: bool, write: Callable[[dict], None]):
        self.rows, self.quick, self.write = rows, quick, write
        self.found: dict[str, dict] = {name: {} for name in ("matrix", *rows)}
        self.specs: dict[str, dict] = {}
        self.children: list[Child] = []
        self.waiting: collections.deque[Child] = collections.deque()
        self.measuring: Child | None = None
        self.began = 0.0
        self.stop_at = time.monotonic() + (3600.0 if quick else BUDGET_SECONDS)
        self.events: queue.Queue = queue.Queue()
        every = ("matrix", *rows)
        autotuned = rows[:1] if quick else rows
        self.lanes = {
            "spec": collections.deque([Task("spec", "all")]),
            "ours": collections.deque(Task("ours", row) for row in every),
            "parity": collections.deque(Task("parity", row) for row in rows if ROWS[row].parity),
            "peer": collections.deque(
                [*(Task("peer", row) for row in every), *(Task("peer_max", row) for row in autotuned)]
            ),
        }

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            environment = {
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "JAX_COMPILATION_CACHE_DIR": f"{scratch}/jax",  # kernels searched for in one row serve the next
                **os.environ,
                SCRATCH: scratch,
            }
            if self.quick:
                environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in half the time
            try:
                while self.begin_tasks(environment):
                    with contextlib.suppress(queue.Empty):
                        self.hear(*self.events.get(timeout=0.5))
                    self.end_late_children()
                    self.give_turns()
            finally:
                for child in self.children:
                    child.signal(signal.SIGKILL)

    def begin_tasks(self, environment: dict[str, str]) -> bool:
        """Starts what comes next; False: nothing runs and nothing is left."""
        kinds = [child.task.kind for child in self.children]
        for name, lane in self.lanes.items():
            if time.monotonic() > self.stop_at:
                while lane:
                    self.note(lane.popleft(), {"error": f"not run: {BUDGET_SECONDS:.0f} s were over"})
            elif lane and self.measuring is None:
                running = sum(self.lane_of(child.task) == name for child in self.children)
                # PyTorch's long search for kernels would disturb ours.
                too_early = lane[0].kind == "peer_max" and (self.lanes["ours"] or "ours" in kinds)
                if running < IN_LANE[name] and not too_early:
                    self.children.append(Child(lane.popleft(), self.rows, self.quick, self.events, environment))
        return bool(self.children)

    @staticmethod
    def lane_of(task: Task) -> str:
        return "peer" if task.kind == "peer_max" else task.kind

    def hear(self, child: Child, line: dict | None) -> None:
        if child not in self.children:
            return
        if line is None:
            self.end(child)
        elif "turn" in line:
            self.waiting.append(child) if line["turn"] == "begin" else self.end_turn()
        elif "compiling" in line:
            child.deadline = time.monotonic() + child.seconds
        elif "spec" in line:
            self.specs[line["row"]] = line["spec"]
        else:
            self.note(child.task, line)

    def note(self, task: Task, values: dict) -> None:
        """Adds to what a row has found, and writes it."""
        if task.kind == "spec":
            return
        part = self.found[task.row].setdefault(self.lane_of(task), {})
        if "mode" in values:
            part.setdefault("modes", {})[values["mode"]] = values["values"]
        elif "error" in values and task.kind == "peer_max":
            part.setdefault("modes", {})["max-autotune"] = values
        else:
            part.update(values)
        self.write(self.summary())

    def end(self, child: Child, error: str | None = None) -> None:
        self.children.remove(child)
        if child in self.waiting:
            self.waiting.remove(child)
        if child is self.measuring:
            self.end_turn()
        error = error or (child.last_error() if child.process.returncode else None)
        if error:
            self.note(child.task, {"error": error})
        print(f"{time.strftime('%X')} {child.task.kind} {child.task.row}: {error or 'done'}", flush=True)

    def end_late_children(self) -> None:
        now = time.monotonic()
        for child in list(self.children):
            limit = min(child.deadline, self.stop_at)
            paused = self.measuring is not None and child is not self.measuring
            if now > limit and not (paused and now < self.stop_at):
                child.signal(signal.SIGKILL)
                over = f"{child.seconds:.0f} s" if limit < self.stop_at else "the whole run's time"
                self.end(child, f"not finished: {over} were over")

    def give_turns(self) -> None:
        """Lets the next child measure, once our step of its row is known; all others are stopped meanwhile."""
        if self.measuring or not self.waiting:
            return
        spec_runs = any(child.task.kind == "spec" for child in self.children)
        for child in self.waiting:
            needs_spec = child.task.kind in ("peer", "peer_max")
            if needs_spec and child.task.row not in self.specs:
                if spec_runs:
                    continue
                child.signal(signal.SIGKILL)
                return self.end(child, f"{NOT_TIMED}our step could not be described, see the error above")
            self.waiting.remove(child)
            self.measuring, self.began = child, time.monotonic()
            for other in self.children:
                if other is not child:
                    other.signal(signal.SIGSTOP)
            time.sleep(0.0 if self.quick else 0.5)  # what they had sent to the GPU ends
            with contextlib.suppress(BrokenPipeError):
                child.process.stdin.write(json.dumps(self.specs.get(child.task.row, {})) + "\n")
                child.process.stdin.flush()
            return None

    def end_turn(self) -> None:
        for other in self.children:
            if other is not self.measuring:
                other.deadline += time.monotonic() - self.began
            other.signal(signal.SIGCONT)
        self.measuring = None

    def summary(self) -> dict:
        """The values of the result."""
        rates = []
        for framework, part in self.found["matrix"].items():
            timings = [part] if framework == "ours" else part.get("modes", {}).values()
            flops = self.specs.get("matrix", {}).get("flops_per_step", math.nan)
            rates += [flops / t["seconds_per_step"] for t in timings if "seconds_per_step" in t]
        peak = max((rate for rate in rates if math.isfinite(rate)), default=None)
        return {
            "quick": self.quick,
            "gpu": gpu(),
            "matrix_peak_tflops": peak and peak / 1e12,
            "matrix": self.found["matrix"],
            "rows": [row_summary(row, self.found[row], self.specs.get(row, {}), peak) for row in self.rows],
        }


def row_summary(row: str, found: dict, spec: dict, peak: float | None) -> dict:
    """A row of the result: rates, utilisation and ratios where both sides are known."""
    found = json.loads(json.dumps(found))  # a copy
    ours, modes = found.get("ours", {}), found.get("peer", {}).get("modes", {})
    for timing in (ours, *modes.values()):
        if "seconds_per_step" in timing and spec:
            rate = 1 / timing["seconds_per_step"]
            timing["images_per_second"] = rate * spec["images_per_step"]
            timing["utilisation"] = peak and rate * spec["flops_per_step"] / peak
    summary = {"row": row, "what": ROWS[row].what, **spec, **found}
    timed_modes = {mode: timing for mode, timing in modes.items() if "seconds_per_step" in timing}
    if timed_modes and "seconds_per_step" in ours:
        best = min(timed_modes, key=lambda mode: timed_modes[mode]["seconds_per_step"])
        summary["best_peer"] = best
        summary["rate_ratio"] = timed_modes[best]["seconds_per_step"] / ours["seconds_per_step"]
        if ours.get("peak_memory_mb"):
            summary["memory_ratio"] = ours["peak_memory_mb"] / timed_modes[best]["peak_memory_mb"]
    return summary


@functools.cache
def gpu() -> dict | None:
    """Name, driver and memory as nvidia-smi says them; None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = ("name", "driver_version", "memory.total", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().splitlines()[:1]
    return dict(zip(fields, values[0].split(", "), strict=False)) if values and done.returncode == 0 else None


def table(values: dict) -> str:
    """The result for people; a dash where nothing was measured."""

    def show(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    name = (values["gpu"] or {}).get("name", "no GPU")
    lines = [f"{name}; matrix product {show(values['matrix_peak_tflops'], '.0f')} TFLOP/s"]
    form = "{:11} {:>10} {:>10} {:>13} {:>6} {:>6} {:>6} {:>9} {:>9}  {}"
    lines.append(
        form.format("row", "images/s", "PyTorch's", "best", "ratio", "util", "its", "memory", "its", "parity, errors")
    )
    for row in values["rows"]:
        ours, peer = row.get("ours", {}), row.get("peer", {})
        best = peer.get("modes", {}).get(row.get("best_peer"), {})
        notes = [part["error"] for part in (ours, peer, *peer.get("modes", {}).values()) if "error" in part]
        if found := row.get("parity"):
            notes.insert(0, found.get("error") or f"cosine {found['gradient_cosine']:.4f}")
        lines.append(
            form.format(
                row["row"],
                show(ours.get("images_per_second"), ".0f"),
                show(best.get("images_per_second"), ".0f"),
                row.get("best_peer", "-"),
                show(row.get("rate_ratio")),
                show(ours.get("utilisation")),
                show(best.get("utilisation")),
                show(ours.get("peak_memory_mb"), ".0f"),
                show(best.get("peak_memory_mb"), ".0f"),
                "; ".join(notes),
            )
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=pathlib.Path, help="default: docs/results/gpu.json; with --quick none")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, any machine: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--rows: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if options.child:
        return run_child(Task(*options.child.split(",")), rows, options.quick)
    if not options.quick and gpu() is None:
        sys.exit("error: no GPU here (nvidia-smi finds none); --quick runs everything at its smallest size anywhere")
    out = options.out or (None if options.quick else results.RESULTS / "gpu.json")
    command = f"python -m benchmarks.gpu --rows={options.rows}" + " --quick" * options.quick

    def write(values: dict) -> None:
        if out:
            results.record(out.stem, values, command=command, seeds=[SEED], directory=out.parent)

    run = Run(rows, options.quick, write)
    run.run()
    values = run.summary()
    write(values)
    print(table(values))
    if not any("rate_ratio" in row for row in values["rows"]):
        sys.exit("error: no row has both sides")


def run_child(task: Task, rows: list[str], quick: bool) -> None:
    if task.kind == "spec":
        spec(rows, quick)
    elif task.row == "matrix":
        our_matrix(quick) if task.kind == "ours" else peer_matrix(quick)
    elif task.kind == "ours":
        ours(task.row, quick)
    elif task.kind == "parity":
        parity(task.row, quick)
    else:
        peer(task.row, quick, max_autotune=task.kind == "peer_max")


if __name__ == "__main__":
    main()
