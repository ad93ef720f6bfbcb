"""Image representations learned from video. `vivi_jax.load(path).features(images)` uses a trained encoder."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load`, imported when it is first used: it needs JAX, and importing this package must not."""
    if name == "load":
        from vivi_jax.export.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
