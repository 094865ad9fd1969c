"""Host: a module that stays the object it was while its forward runs a rewritten graph.

The object keeps its place, parameters, hooks and attributes; its class becomes a generated
subclass of the same name whose ``forward`` picks the graph for the call at hand. A graph is one
path through the original forward, so calls of another structure get another *variant*, captured
when first met. ``uninstall`` puts the class back: bit for bit the module that it was.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.host.execution import run, run_graph
from surgery.host.state import STATE, HostState, original_class, state_of
from surgery.interop import capturing
from surgery.plugin import HostPlan


@functools.cache
def _host_class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: HostState = self.__dict__[STATE]
        if not state.active or capturing():
            return original.forward(self, *args, **kwargs)
        return (run if state.wraps else run_graph)(self, state, args, kwargs)

    def unspliced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), self.__dict__

    body = {
        "forward": forward,
        "_unspliced_forward": unspliced,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_surgery_original": original,
    }
    return type(original.__name__, (original,), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    host_class = _host_class(original)  # type: ignore[arg-type]
    return host_class.__new__(host_class)


def install(module: nn.Module, plan: HostPlan) -> HostState:
    """Make ``module`` a host, if it is none yet.

    Raises:
        SpliceError: something else has replaced the module's forward on the instance.
    """
    state = state_of(module)
    if state is not None:
        return state
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise SpliceError(
            f"{plan.path}: something has set a forward on this {type(module).__name__} object "
            "itself, which would hide the spliced one. Undo that first, splice, then redo it."
        )
    state = HostState(plan.path, plan.through)
    module.__class__ = _host_class(type(module))  # type: ignore[arg-type]
    vars(module)[STATE] = state
    if "_old_forward" in vars(module):  # accelerate's hooks call what they found
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)
    return state


def uninstall(module: nn.Module) -> None:
    """Give a host its own class back."""
    original = original_class(module)
    del vars(module)[STATE]
    module.__class__ = original
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(original.forward, module)
