"""Take apart objects that a forward makes of its tensors, so that a graph makes them, too.

A forward may return a dataclass, a ``ModelOutput``, an ``OrderedDict`` or an object of a class of
its own. In the graph such a record is one node: the class, its attributes and its items. The node
makes an object of the class without calling ``__init__``, which has run once, in the capture.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from surgery.capture.proxy import is_proxy

_PLAIN = (tuple, list, dict, slice, set, frozenset)  # fx writes the first three itself


def is_record(x: Any) -> bool:
    """Whether ``x`` is an object other than a plain container, with a proxy somewhere in it."""
    return type(x) not in _PLAIN and _may_hold(x) and _holds_proxy(x, set())


def is_own_kind(x: Any) -> bool:
    """Whether fx would write ``x`` as something else: a numpy scalar, a tuple of an own class.

    fx calls the class of a dataclass anew; one without a proxy in it is the object that it is.
    """
    scalar = isinstance(x, (int, float)) and type(x) not in (int, float, bool)
    own_tuple = isinstance(x, tuple) and type(x) is not tuple and not hasattr(x, "_fields")
    return scalar or own_tuple or (dataclasses.is_dataclass(x) and not isinstance(x, type))


def attributes(x: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    slots = [n for kind in type(x).__mro__ for n in _slots(kind) if hasattr(x, n)]
    return {**getattr(x, "__dict__", {}), **{name: getattr(x, name) for name in slots}}


def items(x: Any) -> Any:
    """Return the items of a subclass of tuple, list or dict as a plain one; None for others."""
    if isinstance(x, dict):
        return dict(dict.items(x))
    if isinstance(x, list):
        return list(x)
    return tuple(x) if isinstance(x, tuple) else None


def parts_of(record: Any) -> tuple[Any, Any]:
    """Return the attributes and the items of a record, as :func:`make_record` takes them."""
    return attributes(record), items(record)


def make_record(kind: Any, held: dict[str, Any], inside: Any) -> Any:
    """Make an object of a class from its attributes and items."""
    if issubclass(kind, tuple):
        return tuple.__new__(kind, inside)
    made = kind.__new__(kind)
    for name, value in held.items():
        object.__setattr__(made, name, value)  # also of a frozen dataclass
    if issubclass(kind, dict):
        base = next(each for each in kind.__mro__ if each.__module__ in ("builtins", "collections"))
        for key, value in inside.items():
            base.__setitem__(made, key, value)
    elif issubclass(kind, list):
        list.extend(made, inside)
    return made


def unwrapped(x: Any) -> Any:
    """Return ``x`` with every proxy in it, however nested, replaced by the proxy's value."""
    kind = type(x)  # isinstance would see the class of a proxy's value
    if is_proxy(x):
        return x.value
    if kind is slice:
        return slice(unwrapped(x.start), unwrapped(x.stop), unwrapped(x.step))
    if kind is tuple:
        return tuple(unwrapped(y) for y in x)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*(unwrapped(y) for y in x))
    if kind is list:
        return [unwrapped(y) for y in x]
    if kind is dict:
        return {k: unwrapped(v) for k, v in x.items()}
    if is_record(x):
        return make_record(kind, unwrapped(attributes(x)), unwrapped(items(x)))
    return x


def _may_hold(x: Any) -> bool:
    """Whether a class written in Python made ``x``, and it is no module, tensor or function."""
    kind = type(x)
    if is_proxy(x) or isinstance(x, (Tensor, nn.Module, type)) or kind.__module__ == "builtins":
        return False
    held = hasattr(x, "__dict__") or isinstance(x, (tuple, list, dict)) or bool(_slots(kind))
    return held and not callable(x)


def _holds_proxy(x: Any, seen: set[int]) -> bool:
    if is_proxy(x):
        return True
    if id(x) in seen:
        return False
    seen.add(id(x))
    if type(x) in _PLAIN[:3]:
        return any(_holds_proxy(y, seen) for y in (x.values() if type(x) is dict else x))
    if not _may_hold(x):
        return False
    inside = items(x)
    values = inside.values() if isinstance(inside, dict) else inside or ()
    return any(_holds_proxy(y, seen) for y in (*attributes(x).values(), *values))


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)
