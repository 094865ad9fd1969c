"""Check the options of a method against the types of its fields, before the method reads them.

    annotation              accepted
    bool, int, float, str   a value of that type; a whole number for float; no bool for a number
    Literal["a", "b"]       a value of the type of the choices; the method names the choices
    tuple[T, ...]           a tuple, a list (JSON has no tuples), or one text alone
    tuple[T, U]             a tuple or a list of as many
    Mapping[K, V]           a dict
    X | Y                   what one of them accepts
    others                  anything

Floats must be finite: JSON has no infinity, and no method has a use for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from surgery.errors import MethodError, shown

_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text"}


def check_option_types(method: Any) -> None:
    """Raise unless every option has the type of its field; turn lists into tuples.

    Raises:
        MethodError: an option has another type; the message says which it must have.
    """
    types_of_fields = _types_of(type(method))  # type: ignore[arg-type]  # mypy: no Hashable
    for field in dataclasses.fields(method):
        wanted = types_of_fields.get(field.name, Any)
        value = getattr(method, field.name)
        try:
            accepted = _accepted(value, wanted)
        except TypeError:
            raise MethodError(
                f"method {method.name!r}: {field.name}={shown(value)} is not possible. "
                f"It must be {_words(wanted)}{_hint(value, wanted)}."
            ) from None
        if accepted is not value:
            object.__setattr__(method, field.name, accepted)


def undecorated(cls: type[Any], base: type[Any]) -> list[str]:
    """Return the options of a class that ``@dataclass`` has not seen.

    A class without it still has the ``__init__`` of its parent, which knows none of its options.
    """
    return [
        name
        for part in cls.__mro__
        if part is not base and issubclass(part, base) and "__dataclass_params__" not in vars(part)
        for name, kind in inspect.get_annotations(part).items()
        if "ClassVar" not in str(kind)
    ]


@functools.cache
def _types_of(cls: Any) -> dict[str, Any]:
    """Return the types of a class's fields, but those that cannot be evaluated."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # names of a function's inside, or of type-checking alone
        found: dict[str, Any] = {}
        for part in reversed(cls.__mro__):
            for name, kind in inspect.get_annotations(part).items():
                with contextlib.suppress(Exception):
                    known = vars(sys.modules[part.__module__])
                    found[name] = eval(kind, known) if isinstance(kind, str) else kind
        return found


def _accepted(value: Any, wanted: Any) -> Any:
    """Return the value, as a tuple where one is wanted.

    Raises:
        TypeError: the value has another type.
    """
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind in (Union, types.UnionType):
        for each in inner:
            try:
                return _accepted(value, each)
            except TypeError:
                pass
        raise TypeError
    if kind is Literal:
        fits = type(value) in map(type, inner)
    elif kind is tuple and len(inner) == 2 and inner[1] is ...:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (tuple, list)):
            raise TypeError
        made = tuple(_accepted(item, inner[0]) for item in items)
        return value if type(value) is tuple and made == value else made
    elif kind is tuple:
        if not isinstance(value, (tuple, list)) or len(value) != len(inner):
            raise TypeError
        made = tuple(_accepted(item, each) for item, each in zip(value, inner, strict=True))
        return value if type(value) is tuple and made == value else made
    elif isinstance(kind, type) and issubclass(kind, Mapping):
        fits = isinstance(value, Mapping)
        for key, item in value.items() if fits else ():
            _accepted(key, inner[0])
            _accepted(item, inner[1])
    elif wanted is float:
        fits = _is_number(value) and _is_finite(value)
    elif wanted in (int, str, bool, type(None)):
        fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    else:
        fits = True
    if not fits:
        raise TypeError
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def _words(wanted: Any) -> str:
    """Say in words what a type accepts."""
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if kind is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if kind is tuple and inner[1:] != (...,):
        return f"a list of {len(inner)}: {', '.join(map(_words, inner))}"
    if kind is tuple:
        return f"a list, each of it {_words(inner[0])}"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a mapping from {_words(inner[0])} to {_words(inner[1])}"
    return _WORDS.get(wanted, "None")


def _hint(value: Any, wanted: Any) -> str:
    """Say how to write a number that was given as text; '' where that is not the matter."""
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(value, str) and wanted in (int, float):
            wanted(value)
            return f": {value.strip()}, without quotes"
    return ""
