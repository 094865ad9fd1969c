"""Tell the forward that a module has without a splice, whoever has set it on the object.

Other libraries set ``forward`` on a module object: a kernel library a faster one, accelerate a hook
around the one that it found. On a host such a forward would hide the spliced one, so the host takes
it over:

    it calls the host's forward      it stays around the host, and is called first
    it does not                      it replaces the class's forward: graphs are captured from it

The first kind is told by what the function holds: its closure, the arguments of a partial, the
``_old_forward`` of accelerate. If it then does not call the host after all, the call raises.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.errors import ForwardError
from surgery.host.state import HostState, original_class, state_of

Forward = Callable[..., Any]


def own_forward(module: nn.Module) -> Forward:
    """Return the bound forward that ``module`` has without a splice."""
    state = state_of(module)
    if state is not None and state.own is not None:
        return state.own
    if state is None and "_old_forward" not in vars(module) and "forward" in vars(module):
        found: Forward = vars(module)["forward"]
        return found
    return types.MethodType(original_class(module).forward, module)


def unbound_forward(module: nn.Module, state: HostState) -> Forward:
    """Return the forward that a host has without a splice, as a function of the module."""
    forward: Forward = original_class(module).forward
    return forward if state.own is None else unbound(state.own, module)


def unbound(own: Forward, module: nn.Module) -> Forward:
    """Return ``own``, a forward of ``module``, as a function whose first argument is the module."""
    if isinstance(own, types.MethodType) and own.__self__ is module:
        return own.__func__

    @functools.wraps(own)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    signature = inspect.signature(own)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def take_over(module: nn.Module, state: HostState, new: Forward) -> None:
    """Keep a forward that is set on a host: around the host's, or instead of the class's."""
    if _is_of_host(new, module):  # the one before comes back
        if state.own is not None:
            state.own = None
        else:
            state.around = state.around[:-1]
    elif _leads_to_host(new, module):
        state.around = (*state.around, new)
    else:
        state.own, state.around = new, ()
    state.refresh()


class _Calls(threading.local):
    """How far the calls of a thread have come: for each host, how many functions around it run."""

    def __init__(self) -> None:
        self.depth: dict[int, int] = {}
        self.reached: set[int] = set()


_calls = _Calls()


def next_around(module: nn.Module, state: HostState) -> Forward | None:
    """Return the function around the host that is to be called next; None if it is the host."""
    depth = _calls.depth.get(id(module), 0)
    if depth < len(state.around):
        return functools.partial(_call_around, module, state, depth)
    _calls.reached.add(id(module))
    return None


def _call_around(module: nn.Module, state: HostState, depth: int, *args: Any, **kwargs: Any) -> Any:
    """Call one function around the host; raise if it never called the host."""
    with _deeper(module, depth):
        outcome = state.around[len(state.around) - 1 - depth](*args, **kwargs)
    if depth == 0 and id(module) not in _calls.reached:
        raise ForwardError(
            f"{state.path}: a forward was set on this {type(module).__name__} object after the "
            "splice, and it does not call the one that it found, so nothing that is spliced in "
            "ran. Set a forward that calls it, or take the splice out first (surgery.remove)."
        )
    return outcome


@contextmanager
def _deeper(module: nn.Module, depth: int) -> Iterator[None]:
    if depth == 0:
        _calls.reached.discard(id(module))
    try:
        try:
            _calls.depth[id(module)] = depth + 1
            yield
        finally:
            _back_to(module, depth)
    finally:  # once more: an exception may have come in the line above
        _back_to(module, depth)


def _back_to(module: nn.Module, depth: int) -> None:
    if depth:
        _calls.depth[id(module)] = depth
    else:
        _calls.depth.pop(id(module), None)


def _is_of_host(function: Any, module: nn.Module) -> bool:
    """Whether this is the bound forward of the host itself."""
    if not isinstance(function, types.MethodType) or function.__self__ is not module:
        return False
    return function.__func__ in (type(module).forward, original_class(module).forward)


def _leads_to_host(function: Any, module: nn.Module) -> bool:
    """Whether a function holds the host's bound forward, and so may call it."""
    stack: list[Any] = [function]
    seen: set[int] = set()
    while stack and len(seen) < 1000:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if _is_of_host(each, module):
            return True
        if each is module:
            stack.append(vars(module).get("_old_forward"))  # of accelerate
        elif isinstance(each, functools.partial):
            stack += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, types.MethodType):
            stack += [each.__func__, each.__self__]
        elif isinstance(each, types.FunctionType):
            cells = [c.cell_contents for c in each.__closure__ or () if _is_filled(c)]
            stack += [*cells, *(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values()]
        elif isinstance(each, (list, tuple)):
            stack += each
        elif hasattr(each, "__dict__") and not isinstance(each, (nn.Module, type)):
            stack += vars(each).values()
    return False


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises if the cell is empty)
    except ValueError:
        return False
    return True
