"""Compiled: what a host needs while ``torch.compile`` reads its forward.

Dynamo follows Python symbolically, so a graph that it meets for the first time cannot be captured
by the code that it reads. It is captured beside it instead, at compile time, on example values of
the shapes that Dynamo knows; then Dynamo goes on and finds the graph in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, ComptimeVar, comptime

from surgery.interop import map_leaves

_seen = threading.local()


def prepare(host: Any, args: Any, kwargs: Any, capture: Callable[[Any, Any, Any], None]) -> None:
    """Call ``capture(host, args, kwargs)`` with real examples, while Dynamo reads this call.

    ``args`` and ``kwargs`` are given as Dynamo sees them; leaf by leaf they become real values.
    """
    found: list[Any] = []

    def number(leaf: Any) -> int:
        found.append(leaf)
        return len(found) - 1

    structure = map_leaves((args, kwargs), number)  # noqa: F841 (read by _finish)
    comptime(_start)
    for leaf in found:  # noqa: B007 (read by _note)
        comptime(_note)
    comptime(_finish)


def _start(context: ComptimeContext) -> None:
    _seen.examples, _seen.made = [], {}


def _note(context: ComptimeContext) -> None:
    _seen.examples.append(_example(context.get_local("leaf")))


def _finish(context: ComptimeContext) -> None:
    def leaf(number: int) -> Any:
        return _seen.examples[number]

    structure = context.get_local("structure").as_python_constant()
    args, kwargs = map_leaves(structure, leaf)
    _value(context.get_local("capture"))(_value(context.get_local("host")), args, kwargs)


def _example(variable: ComptimeVar) -> Any:
    if variable.is_python_constant():
        return variable.as_python_constant()
    if not variable.is_proxy():
        return _value(variable)
    fake = variable.as_fake()
    if id(fake) not in _seen.made:
        _seen.made[id(fake)] = fake, _real(fake)
    return _seen.made[id(fake)][1]


def _real(fake: Any) -> Any:
    if not isinstance(fake, Tensor):
        return fake.node.hint
    shape = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
    return torch.ones(shape, dtype=fake.dtype, device=fake.device)


def _value(variable: ComptimeVar) -> Any:
    """The Python object behind a variable that is neither a tensor nor a constant."""
    tracker: Any = variable._i_will_not_complain_if_bc_breaks_VariableTracker()
    return tracker.get_function() if hasattr(tracker, "get_function") else tracker.value
