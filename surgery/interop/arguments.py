"""Take the arguments of a call apart into leaves, and copy them for runs on the side.

Arguments are nested in tuples, lists and dicts. A *leaf* is what is left: a tensor, a number, a
string, or an opaque object such as a KV cache, which is never looked into. None and other
``CONSTANT`` values are no leaves: they belong to the structure of a call.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import shown

CONSTANT = (bool, str, Enum, type, torch.dtype, torch.device)


def map_leaves(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Return ``structure`` with ``function`` applied to each leaf; None and constants stay."""
    if structure is None or (isinstance(structure, CONSTANT) and type(structure) is not str):
        return structure
    if type(structure) in (tuple, list):
        return type(structure)(map_leaves(x, function) for x in structure)
    if type(structure) is dict:
        return {k: map_leaves(v, function) for k, v in structure.items()}
    return function(structure)


def leaves(structure: Any) -> list[Any]:
    """Return the inputs of a graph in order: numbers and strings each, every other leaf once."""
    found: dict[Any, Any] = {}
    map_leaves(structure, lambda v: found.setdefault(input_key(v, len(found)), v))
    return list(found.values())


def input_key(value: Any, position: int) -> Any:
    """Return the key by which a leaf counts as one input of a graph.

    A tensor or object that is given twice is one input. Numbers and strings are keyed by their
    position: two that are equal in one call may differ in the next.
    """
    return ("value", position) if isinstance(value, (int, float, str)) else id(value)


def detached(value: Any) -> Any:
    """Return a copy of a leaf that a run may change: tensors are cloned without their history.

    An opaque object is copied with the tensors in it.
    """
    if isinstance(value, Tensor):
        return _without_symbols(value).detach().clone()
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, torch.SymInt):
        return value.node.hint
    copies: dict[int, Any] = {}
    for tensor in tensors_in(value):
        known = _without_symbols(tensor)
        if known is not tensor or not tensor.is_leaf:
            copies[id(tensor)] = known.detach().clone()
    with torch.no_grad():  # deepcopy refuses tensors with history
        return copy.deepcopy(value, copies)


def _without_symbols(tensor: Tensor) -> Tensor:
    """Return a tensor of known sizes: ones, if torch.export has made sizes unknown."""
    if not any(isinstance(size, torch.SymInt) for size in tensor.shape):
        return tensor
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in tensor.shape]
    return torch.ones(sizes, dtype=tensor.dtype, device=tensor.device)


def detached_copy(structure: Any) -> Any:
    """Apply :func:`detached` to nested arguments; an object that is given twice stays one."""
    copies: dict[int, Any] = {}

    def copied(v: Any) -> Any:
        if isinstance(v, (int, float, str)):
            return v
        if id(v) not in copies:
            copies[id(v)] = detached(v)
        return copies[id(v)]

    return map_leaves(structure, copied)


def snapshot(value: Any) -> Any:
    """Return an opaque object as it is now, such as a cache before a layer adds to it.

    The copy shares the tensors, so one that is changed in place later shows the change. Tensors,
    numbers, strings, modules and functions are returned themselves.
    """
    if isinstance(value, (Tensor, int, float, str, nn.Module)) or callable(value):
        return value
    return copy.deepcopy(value, {id(t): t for t in tensors_in(value)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside an opaque object, modules left out."""
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    """Return the names of the parameters that can be given by position, the module's own first."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def named_arguments(forward: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by the names that ``forward`` gives them.

    Args:
        forward: an unbound forward, whose first parameter is the module itself.
    """
    names = _parameters(forward)[1:]
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} arguments by position, not {len(args)}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def arguments_with_names(forward: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call that have a name, see :func:`named_arguments`.

    Those that a forward takes as ``*args`` have none, and are left out.
    """
    return named_arguments(forward, args[: len(_parameters(forward)) - 1], kwargs)


def described(value: Any) -> str:
    """Say what a module has returned, without the numbers of its tensors."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(described, value)) or 'nothing'}"
    return shown(value)


def is_integer_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor of integers with at least one axis."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def tensors_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and, except on the meta device, values."""
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or bool((a == b).all()))
