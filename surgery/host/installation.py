"""Make a module a host by swapping its class, and give the class back.

The object keeps its place, parameters, hooks and attributes. Its class becomes a generated
subclass of the same name whose ``forward`` runs the graph that fits the call
(host/execution.py). ``uninstall`` puts the original class back: bit for bit the module that it was.
``torch.nn.utils.parametrize`` and FSDP2's ``fully_shard`` swap classes the same way.
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
    """Generate the host class of a module class, once per process."""

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
    """Make an empty host for ``copy`` and ``pickle``, which cannot find a generated class."""
    host_class = _host_class(original)  # type: ignore[arg-type]
    return host_class.__new__(host_class)


def install(module: nn.Module, plan: HostPlan) -> HostState:
    """Make ``module`` a host, unless it is one already.

    Raises:
        SpliceError: something has set a forward on the object itself, which would hide the host's.
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
    if "_old_forward" in vars(module):  # accelerate's hooks call the forward that they found
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)
    return state


def uninstall(module: nn.Module) -> None:
    """Give a host its own class back."""
    original = original_class(module)
    del vars(module)[STATE]
    module.__class__ = original
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(original.forward, module)
