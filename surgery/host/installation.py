"""Make a module a host by swapping its class, and give the class back.

The object keeps its place, parameters, hooks and attributes. Its class becomes a generated
subclass of the same name whose ``forward`` runs the graph that fits the call
(host/execution.py). ``uninstall`` puts the original class back: bit for bit the module that it was.
``torch.nn.utils.parametrize`` and FSDP2's ``fully_shard`` swap classes the same way. If one of them
has swapped the class after the splice, its class stays, and the host's below it only passes calls
on.
"""

from __future__ import annotations

import functools
import types
from abc import ABCMeta
from typing import Any

from torch import nn

from surgery.host.containers import container_methods, hiding
from surgery.host.execution import run, run_graph
from surgery.host.foreign_forward import next_around, own_forward, take_over
from surgery.host.state import STATE, HostState, inserted_children, original_class, state_of
from surgery.interop import capturing
from surgery.plugin import HostPlan


class _Silent:
    """Keeps a class of the user's from hearing of the subclasses that are generated here."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_surgery_original" not in vars(cls):  # another library's subclass of a host
            super().__init_subclass__(**kwargs)


@functools.cache
def _host_class(original: type[nn.Module]) -> type[nn.Module]:
    """Generate the host class of a module class, once per process."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: HostState | None = self.__dict__.get(STATE)
        if state is None:  # removed, and still called by who had kept this method
            return original.forward(self, *args, **kwargs)
        if state.around and not capturing():
            around = next_around(self, state)
            if around is not None:
                return around(*args, **kwargs)
        on = state.selection()
        if not on.names or capturing():
            with hiding(self):
                if state.own is not None:
                    return state.own(*args, **kwargs)
                return original.forward(self, *args, **kwargs)
        return (run if on.wraps else run_graph)(self, state, args, kwargs, on)

    def unspliced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with hiding(self):
            return own_forward(self)(*args, **kwargs)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        state = self.__dict__.get(STATE)
        if name == "forward" and state is not None:
            take_over(self, state, value)
        else:
            super(made, self).__setattr__(name, value)

    def delete_attribute(self: nn.Module, name: str) -> None:
        state = self.__dict__.get(STATE)
        if name == "forward" and state is not None and (state.own or state.around):
            state.own, state.around = None, ()
            state.refresh()
        else:
            super(made, self).__delattr__(name)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), self.__dict__

    body = {
        "forward": forward,
        "_unspliced_forward": unspliced,
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "__reduce_ex__": reduce,
        "_surgery_inserted": inserted_children,
        **container_methods(original),
    }
    made = subclass(original, body)
    return made


def subclass(original: type[nn.Module], body: dict[str, Any]) -> type[nn.Module]:
    """Return a subclass of the same name, of which no code of the user's hears."""
    names = ("__module__", "__qualname__", "__doc__")
    body = {"_surgery_original": original, **{n: getattr(original, n) for n in names}, **body}
    kind = type(original)  # a metaclass of the user's may keep a register, too
    maker = ABCMeta if issubclass(kind, ABCMeta) else type
    bases = (original,) if issubclass(original, _Silent) else (_Silent, original)
    made: type[nn.Module] = maker.__new__(kind, original.__name__, bases, body)
    return made


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """Make an empty host for ``copy`` and ``pickle``, which cannot find a generated class."""
    host_class = _host_class(original)  # type: ignore[arg-type]
    return host_class.__new__(host_class)


def install(module: nn.Module, plan: HostPlan) -> HostState:
    """Make ``module`` a host, unless it is one already; take over a forward set on the object."""
    state = state_of(module)
    if state is not None:
        return state
    state = HostState(plan.path, plan.through)
    held = vars(module)
    if "_old_forward" in held:  # accelerate's hooks call the forward that they found
        state.around = (held.pop("forward"),) if "forward" in held else ()
    elif "forward" in held:
        state.own = held.pop("forward")
    kind = type(module)
    module.__class__ = _host_class(vars(kind).get("_surgery_original", kind))
    held[STATE] = state
    if "_old_forward" in held:
        held["_old_forward"] = types.MethodType(type(module).forward, module)
    return state


def uninstall(module: nn.Module) -> None:
    """Give a host its own class back, and the forward that was set on the object."""
    original = original_class(module)
    state: HostState = vars(module).pop(STATE)
    if "_surgery_original" in vars(type(module)):
        module.__class__ = original
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(original.forward, module)
    if state.around or state.own is not None:
        vars(module)["forward"] = state.around[-1] if state.around else state.own
