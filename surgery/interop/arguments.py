"""Values: the leaves of nested arguments, and copies of them that can be worked on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = (bool, str, Enum, type, torch.dtype, torch.device)  # parts of a call's structure


def map_leaves(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to the leaves of nested tuples, lists and dicts; keep constants."""
    if structure is None or isinstance(structure, CONSTANT):
        return structure
    if type(structure) in (tuple, list):
        return type(structure)(map_leaves(x, function) for x in structure)
    if type(structure) is dict:
        return {k: map_leaves(v, function) for k, v in structure.items()}
    return function(structure)


def leaves(structure: Any) -> list[Any]:
    """The inputs of a graph: numbers, and tensors and opaque objects once each, in order."""
    found: dict[Any, Any] = {}
    map_leaves(structure, lambda v: found.setdefault(identity(v, len(found)), v))
    return list(found.values())


def identity(value: Any, position: int) -> Any:
    """Two numbers that are equal by chance are two inputs; one tensor given twice is one."""
    return ("number", position) if isinstance(value, (int, float)) else id(value)


def detached(value: Any) -> Any:
    """An example value that can be worked on: tensors without history, opaque objects copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (int, float)):
        return value
    history = {id(t): t.detach().clone() for t in tensors_in(value) if not t.is_leaf}
    with torch.no_grad():  # deepcopy refuses tensors with history
        return copy.deepcopy(value, history)


def detached_copy(structure: Any) -> Any:
    """:func:`detached` for nested arguments; an object that is given twice stays one object."""
    copies: dict[int, Any] = {}

    def copied(v: Any) -> Any:
        if isinstance(v, (int, float)):
            return v
        if id(v) not in copies:
            copies[id(v)] = detached(v)
        return copies[id(v)]

    return map_leaves(structure, copied)


def snapshot(value: Any) -> Any:
    """An opaque object as it is now, sharing its tensors: what a cache held at this moment."""
    if isinstance(value, (Tensor, int, float, nn.Module)) or callable(value):
        return value
    return copy.deepcopy(value, {id(t): t for t in tensors_in(value)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside an opaque object."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
            stack.extend(vars(item).values())


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def by_name(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the names that ``forward`` gives them."""
    signature = _signature(forward)
    named = signature.bind(module, *args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return dict(list(named.items())[1:])


def is_whole(x: Any) -> bool:
    """Is this a tensor of whole numbers?"""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def same(a: Tensor, b: Tensor) -> bool:
    """Are these two alike, as far as one can see?"""
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or bool((a == b).all()))
