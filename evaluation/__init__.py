import importlib
import warnings

# Modules that stood here before, for one release.
_FORMER = {
    "detection_data": "evaluation.protocols.detection.data",
    "detection_scores": "evaluation.protocols.detection.scores",
}


def __getattr__(name: str):
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"evaluation.{name} is now {_FORMER[name]}; the old name goes", DeprecationWarning, stacklevel=2)
    return importlib.import_module(_FORMER[name])
