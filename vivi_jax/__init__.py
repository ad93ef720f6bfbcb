"""Image representations learned from video. `vivi_jax.load(path).features(images)` uses a trained encoder."""

import runpy
import sys

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load`, imported when it is first used: it needs JAX, and importing this package must not."""
    if name == "load":
        from vivi_jax.export.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- The console scripts of setup.py: each is `python -m` of a module ------------------------------------------------

EVALUATIONS = (
    "action",
    "all",
    "attention",
    "davis",
    "detection",
    "probe",
    "report",
    "segmentation",
    "vid_robust",
    "vtab",
)


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_train() -> None:
    _run("vivi_jax.main")


def run_prepare() -> None:
    _run("input_pipeline.prepare")


def run_export() -> None:
    _run("vivi_jax.export")


def run_embed() -> None:
    _run("evaluation.embed")


def run_eval() -> None:
    """vivi-eval NAME ...: `python -m evaluation.NAME ...`."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in EVALUATIONS:
        sys.exit(f"error: vivi-eval NAME [options], NAME is one of {', '.join(EVALUATIONS)}, not {name!r}")
    _run(f"evaluation.{name}")
