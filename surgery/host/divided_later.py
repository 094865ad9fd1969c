"""Notice that a tensor-parallel plan has divided a host's projections after the splice.

What is inserted is whole then. A plan of transformers sets a forward on each module that it
divides, so the graphs of a host rely on there being none: the next call asks for a new graph.
Before one is captured, the splicer divides what is inserted (``HostState.divide``), or the call
raises.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from surgery.capture import MISSING, Read
from surgery.errors import ForwardError
from surgery.host.state import HostState, inserted_children
from surgery.interop import (
    base_children,
    is_carried_over,
    is_divided_by_plan,
    is_of_plan,
    is_sharded,
    several_processes,
)


def plan_reads(graph: fx.Graph, host: nn.Module) -> list[Read]:
    """Return what shows that a plan has divided a projection of this graph."""
    paths = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    modules = [host.get_submodule(path) for path in sorted(paths)]
    return [
        Read("item", vars(module), "forward", vars(module).get("forward", MISSING))
        for module in modules
        if any(p.dim() == 2 for p in module.parameters(recurse=False))
    ]


def divide_alike(host: nn.Module, state: HostState, args: Any, kwargs: Any) -> None:
    """Divide what was spliced into a host as a plan has divided what the host runs, if one has.

    Args:
        args, kwargs: those of the call that is about to run.

    Raises:
        ForwardError: it cannot be divided, or the host is a copy of one that was spliced into.
    """
    if not several_processes():
        return
    children = [host.get_submodule(child) for child in inserted_children(host)]
    inserted = [[*child.parameters()] for child in children]
    if all(own and all(is_sharded(p) or is_carried_over(p) for p in own) for own in inserted):
        return
    divided = divided_in(host, state)
    if divided is None:
        return
    if state.divide is None:
        raise ForwardError(
            f"{state.path}: a tensor-parallel plan has divided {divided} after the splice, and "
            "what is spliced into this copy of the model is whole. In every process: "
            "surgery.save(model, folder), surgery.remove(model), then surgery.load(model, folder)."
        )
    state.divide(state.path, divided, args, kwargs)


def divided_in(host: nn.Module, state: HostState) -> str | None:
    """Return the path below a host of a module that a plan has divided; None if none is."""
    if any(map(is_of_plan, (*state.around, state.own))):
        return "this module itself"
    stack = list(base_children(host).items())
    while stack:
        name, module = stack.pop(0)
        if is_divided_by_plan(module):
            return name
        stack += [(f"{name}.{n}", m) for n, m in base_children(module).items()]
    return None


def watched(host: nn.Module) -> tuple[Any, ...]:
    """Return what changes when a plan divides a module below a host whose call is wrapped."""
    return tuple(
        (vars(module), vars(module).get("forward"))
        for module in host.modules()
        if any(p.dim() == 2 for p in module.parameters(recurse=False))
    )


def divide_wrapped(host: nn.Module, state: HostState, args: Any, kwargs: Any) -> None:
    """Do what :func:`divide_alike` does for a host whose call is wrapped, which needs no graph."""
    if not several_processes():
        return
    if not all(owned.get("forward") is forward for owned, forward in state.watched) or not (
        state.watched
    ):
        divide_alike(host, state, args, kwargs)
        state.watched = watched(host)
