"""Capture a missing graph of a host while ``torch.compile`` reads the host's forward.

Dynamo follows Python symbolically and cannot follow a capture. So when it reaches a host without a
graph for the call, the graph is captured beside Dynamo, at compile time:

    Dynamo reads run_graph -> prepare
      comptime(_start)              empty the list of examples
      comptime(_note), per leaf     turn Dynamo's fake value into a real example
      comptime(_finish)             call the capture with these examples
    Dynamo continues and finds the graph

``comptime`` functions run while Dynamo compiles and leave nothing in the compiled code. The
examples have the shapes that Dynamo knows, filled with ones.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, ComptimeVar, comptime
from torch._dynamo.variables import ConstDictVariable, TensorVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import SymNodeVariable

from surgery.interop import map_leaves

_seen = threading.local()


def prepare(host: Any, args: Any, kwargs: Any, capture: Callable[[Any, Any, Any], None]) -> None:
    """Call ``capture(host, args, kwargs)`` with real examples, while Dynamo reads this call.

    Dynamo hands over ``args`` and ``kwargs`` as it sees them; leaf by leaf they become real values.
    The local names ``structure`` and ``leaf`` are read by name in the functions below.
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
    """Empty the list of examples."""
    _seen.examples, _seen.made = [], {}


def _note(context: ComptimeContext) -> None:
    """Append an example for the local variable ``leaf``."""
    translator: Any = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    _seen.attributes = translator.output.side_effects.store_attr_mutations
    _seen.examples.append(_example(_tracker(context.get_local("leaf"))))


def _finish(context: ComptimeContext) -> None:
    """Put the examples into the structure of the arguments, and capture."""

    def leaf(number: int) -> Any:
        return _seen.examples[number]

    structure = context.get_local("structure").as_python_constant()
    args, kwargs = map_leaves(structure, leaf)
    capture, host = (_value(_tracker(context.get_local(name))) for name in ("capture", "host"))
    capture(host, args, kwargs)


def _tracker(variable: ComptimeVar) -> Any:
    """Return what Dynamo holds for a variable."""
    tracker: Any = variable._i_will_not_complain_if_bc_breaks_VariableTracker()
    return tracker.realize()


def _example(tracker: Any) -> Any:
    """Return a real value for what Dynamo holds; what is given twice stays one.

    An object that the compiled code itself makes, such as a KV cache, exists only as a class and
    the attributes that were set so far.
    """
    tracker = tracker.realize()
    if tracker.is_python_constant():
        return tracker.as_python_constant()
    if tracker in _seen.made:
        return _seen.made[tracker]
    if hasattr(tracker, "as_proxy") and _is_fake(tracker):
        fake = tracker.as_proxy().node.meta["example_value"]
        if id(fake) not in _seen.made:
            _seen.made[id(fake)] = fake, _real(fake)
        return _seen.made[id(fake)][1]
    if isinstance(tracker, BaseListVariable):
        made: Any = []
        _seen.made[tracker] = made
        made += map(_example, tracker.items)
        return tracker.python_type()(made) if tracker.python_type() is not list else made
    if isinstance(tracker, ConstDictVariable):
        made = _seen.made[tracker] = {}
        made.update((key.vt.as_python_constant(), _example(x)) for key, x in tracker.items.items())
        return made
    changed = _seen.attributes.get(tracker, {})
    value = _value(tracker)
    if not changed:
        return value
    made = _seen.made[tracker] = copy.copy(value)
    for name, attribute in changed.items():
        object.__setattr__(made, name, _example(attribute))
    return made


def _is_fake(tracker: Any) -> bool:
    """Whether Dynamo computes with this value: a tensor or a size."""
    return isinstance(tracker, (TensorVariable, SymNodeVariable))


def _real(fake: Any) -> Any:
    """Return a tensor of ones with the shape, dtype and device of a fake one."""
    if not isinstance(fake, Tensor):
        return fake.node.hint
    shape = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
    return torch.ones(shape, dtype=fake.dtype, device=fake.device)


def _value(tracker: Any) -> Any:
    """Return the Python object behind what is neither a tensor nor a constant."""
    return tracker.get_function() if hasattr(tracker, "get_function") else tracker.value
