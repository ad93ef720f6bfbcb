"""torchvision and timm beside a torch for CPUs."""

import importlib
from typing import Any

import pytest


def import_or_skip(name: str) -> Any:
    """torchvision, or timm, which imports it; the test is skipped where they are not installed.

    PyPI's torchvision is compiled for CUDA. Beside a torch for CPUs its operators do not load, and its import fails at
    the first one that it describes. Models need none of them: so those that it misses are declared, without a kernel.
    """
    torch: Any = pytest.importorskip("torch")
    missing = ["nms", "qnms"]
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        except RuntimeError as error:
            if not missing or f"torchvision::{missing[0]} " not in str(error):
                raise
            arguments = "Tensor dets, Tensor scores, float iou_threshold"
            torch.library.define(f"torchvision::{missing.pop(0)}", f"({arguments}) -> Tensor")
