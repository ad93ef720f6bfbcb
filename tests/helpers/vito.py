"""A VITO of a few channels: its step compiles in seconds, once for all tests of a worker."""

import functools

import jax
import ml_collections
import numpy as np

from helpers.networks import TinyEncoder
from vivi_jax import optim
from vivi_jax.methods.vito import Vito
from vivi_jax.train_step import create, make_train_step

BATCH, VIEWS, SIZE, TOTAL_STEPS = 16, 2, 16, 100


@functools.cache
def tiny(norm: str, micro_batches: int = 1):
    """(method, optimizer, jitted train_step) of a two-scale VITO; one compilation of each serves all tests."""
    method = Vito(
        TinyEncoder(norm=norm),
        stages=("stage3", "stage4"),
        pooling="attention",
        attention_hidden=8,
        projector_hidden=16,
        projector_out=8,
        temperature=0.1,
    )
    schedule, _ = optim.cosine(256, base_lr=1.0, epochs=TOTAL_STEPS, warmup_epochs=0, examples_per_epoch=256)
    optimizer = optim.lars(schedule, weight_decay=1e-6, momentum=0.9, trust_coefficient=1e-3)
    ema = optim.ema_cosine(TOTAL_STEPS, base=0.99)
    step = make_train_step(method, optimizer, schedule, ema, seed=0, micro_batches=micro_batches)
    return method, optimizer, jax.jit(step)


@functools.cache
def initial_state(norm: str):
    method, optimizer, _ = tiny(norm)
    spec = method.batch_spec(BATCH, ml_collections.ConfigDict({"views": VIEWS, "image_size": SIZE}))
    return jax.jit(lambda: create(method, optimizer, spec, seed=0))()


def batch() -> dict:
    return {"views": np.random.default_rng(0).integers(0, 256, (BATCH, VIEWS, SIZE, SIZE, 3), dtype=np.uint8)}


def embeddings(seed: int, batch: int = 16, views: int = 3, dim: int = 8, temperature: float = 0.1):
    """Two float32[B, V, D] of norm 1/sqrt(temperature)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, batch, views, dim))
    return (z / np.linalg.norm(z, axis=-1, keepdims=True) / np.sqrt(temperature)).astype(np.float32)
