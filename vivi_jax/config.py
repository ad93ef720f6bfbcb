"""Config sections become keyword arguments: each key is read by one function, or is an error. Imports no JAX.

What a value may be stands in the signature of that function, as its annotation: `temperature: Positive`. Python callers
are not checked; what comes from a config is, by `call_with_config` or, ahead of the call, by `check`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from ml_collections import ConfigDict

from vivi_jax.errors import ConfigError

T = TypeVar("T")


# ---- What a value may be --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Within:
    """Annotated[int or float, Within(...)]: the numbers from `low` to `high`, or above and below them. All are finite.

    >>> str(Within(0, 1, above=True)), str(Within(1)), str(Within(0, 1, below=True))
    ('above 0, at most 1', '1 or more', 'from 0 to below 1')
    """

    low: float
    high: float = math.inf
    above: bool = False  # `low` itself is out
    below: bool = False  # `high` itself is out

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.above:
            return f"above {self.low:g}, {'below' if self.below else 'at most'} {self.high:g}"
        return f"from {self.low:g} to {'below ' if self.below else ''}{self.high:g}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotated[str, OneOf(names)]: one of these values."""

    values: tuple

    def __init__(self, values: typing.Iterable):
        object.__setattr__(self, "values", tuple(values))

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Annotated[tuple[..., ...], NotEmpty()]: one value or more."""

    def __contains__(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "at least one"


Count = Annotated[int, Within(1)]
Whole = Annotated[int, Within(0)]
Seed = Annotated[int, Within(0, 2**32, below=True)]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Part = Annotated[float, Within(0, 1, above=True, below=True)]  # and something is left
Share = Annotated[float, Within(0, 1, above=True)]  # of something there, so never none of it
Chance = Annotated[float, Within(0, 1)]
Decay = Annotated[float, Within(0, 1, below=True)]  # of a moving average, a momentum
DType = Annotated[Any, OneOf(("float32", "bfloat16"))]  # of computations

_PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", dict: "a section of keys"}
_LARGEST = sys.float_info.max  # whole numbers may be larger, and nobody means them
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a type of _PLAIN, those above, tuples, unions and Literals of them.

    >>> fits(3, Count), fits(0, Count), fits(2.5, Count), fits(True, Count), fits([0.5, 2], tuple[Positive, Positive])
    (True, False, False, False, True)
    """
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return fits(value, of[0]) and value in of[1]
    if origin is Literal:
        return value in OneOf(of)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in of)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        each = of[:1] * len(value) if of[1:] == (...,) else of
        return len(each) == len(value) and all(map(fits, value, each))
    if kind in _NUMBERS:  # a bool is an int to Python; and nobody means NaN or infinity
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if kind is dict:
        return isinstance(value, Mapping | ConfigDict)
    if kind in (Any, types.NoneType):
        return kind is Any or value is None
    return isinstance(value, kind)


def described(kind: Any) -> str:
    """What `fits` accepts, in words.

    >>> described(Share | None), described(tuple[Count, ...])
    ('a number, above 0, at most 1, or None', 'a list, each a whole number, 1 or more')
    """
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return str(of[1]) if isinstance(of[1], OneOf) else f"{described(of[0])}, {of[1]}"
    if origin is Literal:
        return str(OneOf(of))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(described, of))
    if origin is tuple:
        each = dict.fromkeys(map(described, of[:1] if of[1:] == (...,) else of))
        length = "a list" if of[1:] == (...,) else f"a list of {len(of)}"
        return f"{length}, each {' or '.join(each)}"
    return "None" if kind is types.NoneType else _PLAIN[kind]


def _known(kind: Any) -> bool:
    """Whether a config can hold such a value: not a network, a store or an array."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return isinstance(kind.__metadata__[0], Within | OneOf | NotEmpty)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, tuple):
        return all(one is ... or _known(one) for one in of)
    return kind is types.NoneType or (isinstance(kind, type) and kind in _PLAIN)


# ---- Sections -------------------------------------------------------------------------------------------------------


def without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without its `name`, which chose the function that gets the others."""
    return {key: value for key, value in section.items() if key != "name"}


def check(
    section: str, kinds: Callable | Mapping[str, Any], values: Mapping[str, Any], *, besides: tuple[str, ...] = ()
) -> None:
    """Checks keys and values of config.SECTION, or of the config itself if `section` is "".

    Args:
      kinds: the function that will take the values, or {key: what its value may be}.
      besides: arguments of that function that are no keys of the config.

    Raises:
      ConfigError: one line with the key, its value and what is allowed; or with the unknown key, and the nearest one.
    """
    others = None  # what keys may be that have no name in the signature
    if not isinstance(kinds, Mapping):
        parameters = inspect.signature(kinds).parameters.values()
        others = next((p.annotation for p in parameters if p.kind is p.VAR_KEYWORD), None)
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        kinds = {p.name: p.annotation for p in named if _known(p.annotation) or p.annotation is p.empty}
    prefix = f"config.{section}." if section else "config."
    kinds = {key: kind for key, kind in kinds.items() if key not in besides}
    for key, value in values.items():
        if key not in besides and (key in kinds or others is not None):
            kind = kinds.get(key, others)
            if _known(kind) and not fits(value, kind):
                raise ConfigError(f"{prefix}{key}={value!r} is not allowed: it is {described(kind)}")
        elif kinds:
            nearest = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{prefix.rstrip('.')}: {key!r} is unknown, did you mean {nearest!r}?")
        else:
            raise ConfigError(f"{prefix.rstrip('.')}: {key!r} is unknown; with this name it has no other key")


def call_with_config(section: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """function(*args, **kwargs), the keywords being the keys of config.SECTION.

    Raises:
      ConfigError: a key that the function does not take, one that it needs and does not get, or a value that its
        annotation excludes. What the function itself raises passes through.
    """
    bound = functools.partial(function, *args)
    check(section, bound, kwargs)
    try:
        inspect.signature(bound).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"config.{section}: {error}") from error
    return function(*args, **kwargs)
