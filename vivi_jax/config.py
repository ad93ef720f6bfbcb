"""Config sections become keyword arguments: each key is read by one function, or is an error. Imports no JAX."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vivi_jax.errors import ConfigError

T = TypeVar("T")


def without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without its `name`, which chose the function that gets the others."""
    return {key: value for key, value in section.items() if key != "name"}


def call_with_config(section: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """function(*args, **kwargs), the keywords being the keys of config.SECTION.

    Raises:
      ConfigError: a key that the function does not take, or one that it needs and does not get. What the function
        itself raises passes through.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        left = list(signature.parameters.values())[len(args) :]  # the others are no keys
        known = [p.name for p in left if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        hints = [
            f"{key!r} is unknown, did you mean {difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]!r}?"
            for key in kwargs
            if key not in known and known
        ]
        raise ConfigError(f"config.{section}: {' '.join(hints) or error}") from error
    return function(*args, **kwargs)
