"""Checkpoints of the training state: saved, verified, restored, read (states.py), and their manifests (manifest.py)."""

from vivi_jax.checkpoint.copies import local_copy
from vivi_jax.checkpoint.manifest import MANIFEST, newest_good_step, steps, verify, write_manifest
from vivi_jax.checkpoint.states import (
    Checkpoints,
    all_finite,
    directory_of,
    load_config,
    load_encoder,
    load_state,
    state_sha256,
    upgrade,
)

__all__ = [
    "MANIFEST",
    "Checkpoints",
    "all_finite",
    "directory_of",
    "load_config",
    "load_encoder",
    "load_state",
    "local_copy",
    "newest_good_step",
    "state_sha256",
    "steps",
    "upgrade",
    "verify",
    "write_manifest",
]
