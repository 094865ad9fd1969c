"""Describe what a forward read beside its arguments, so that it can be asked again.

A graph holds the answers that Python got while it was captured. A :class:`Read` says where an
answer came from; the graph is right for another call as long as every read gives the same answer:

    how          place                       name             answer
    item         the attributes of an object an attribute     the very object, or an equal number
    item         the globals of a file       a global         the function, class or object
    attribute    a class                     a method         the function
    attribute    a cell of a closure         cell_contents    the object
    contents     a list, dict, set           None             its items, in order

A tensor that is an attribute is read again by the graph itself, so its answer is a
:class:`TensorKind`: all that Python code can see of it without reading its values.
"""

from __future__ import annotations

import argparse
import collections
import operator
import types
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.interop import unpatched

MISSING = object()  # the answer of a read that found nothing
_NAMESPACES = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
)
_SEQUENCES = (list, tuple, collections.deque)
_SETS = (set, frozenset)
_EQUAL = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range)


class Read(NamedTuple):
    """One answer that a forward got from the state of Python."""

    how: str  # "item", "attribute" or "contents"
    place: Any
    name: Any
    answer: Any

    def holds(self) -> bool:
        """Whether asking again gives the same answer."""
        return same(self.again(), self.answer)

    def __str__(self) -> str:
        at = {"item": "in", "attribute": "of"}.get(self.how, "the contents of")
        place = type(self.place).__name__
        if isinstance(self.place, dict):
            place = str(self.place.get("__name__", f"a dict with {list(self.place)[:3]}"))
        return f"{self.name or ''} {at} {place}: {self.answer!r:.60}"

    def again(self) -> Any:
        """Return the answer of now."""
        if self.how == "item":
            return self.place.get(self.name, MISSING)
        if self.how == "contents":
            return contents(self.place)
        try:
            return getattr(self.place, self.name, MISSING)
        except ValueError:  # an empty cell
            return MISSING


class TensorKind(NamedTuple):
    """What Python code sees of a tensor without reading its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorKind:
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Contents(NamedTuple):
    """The items of a container: its keys, if it has keys, and its values."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


def is_container(value: Any) -> bool:
    """Whether ``value`` is a list, tuple, dict, set or namespace: its items are read with it."""
    return isinstance(value, (*_SEQUENCES, *_SETS, dict, *_NAMESPACES)) and not isinstance(
        value, (torch.Size, Enum)
    )


def contents(container: Any) -> Contents:
    """Return the items of a container as they are now."""
    if isinstance(container, dict):
        return Contents(tuple(container), tuple(container.values()))
    if isinstance(container, _NAMESPACES):
        held = vars(container)
        return Contents(tuple(held), tuple(held.values()))
    if isinstance(container, _SETS):
        return Contents((), (frozenset(container),))
    return Contents((), tuple(container))


def same(now: Any, before: Any) -> bool:
    """Whether two answers are the same for the forward that got the first of them.

    Objects are compared by identity, as they are looked into by reads of their own; numbers,
    strings and their like by type and value.
    """
    if type(now) is types.FunctionType:
        now = unpatched(now)  # another thread's splice may have replaced it for a while
    if now is before:
        return True
    kind = type(before)
    if kind is TensorKind:
        return isinstance(now, Tensor) and TensorKind.of(now) == before
    if type(now) is not kind:
        return False
    if kind is Contents:
        return _all_same(now.keys, before.keys) and _all_same(now.values, before.values)
    if kind is types.MethodType:  # each look-up of a method makes a new object
        return now.__func__ is before.__func__ and now.__self__ is before.__self__
    if kind is tuple:
        return _all_same(now, before)
    if issubclass(kind, _EQUAL):
        return bool(now == before) or (now != now and before != before)
    return kind is frozenset and bool(now == before)


def _all_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    alike = len(now) == len(before)
    return alike and (all(map(operator.is_, now, before)) or all(map(same, now, before)))
