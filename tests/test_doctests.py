"""The examples in docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "input_pipeline.preparation.shots",
        "input_pipeline.streams.sampling",
        "input_pipeline.streams.tar_shards",
        "vivi_jax.files",
        "vivi_jax.losses",
        "vivi_jax.metrics",
        "vivi_jax.optim",
        "vivi_jax.loop",
    ],
)
def test_the_examples_of_a_module_are_true(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0
