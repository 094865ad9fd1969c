"""Refuse to run a host whose projections a tensor-parallel plan has divided after the splice.

What is inserted is whole then. Some of it would fail at a shape, some would compute with what each
process has drawn for itself. A plan of transformers sets a forward on each module that it divides,
so the graphs of a host rely on there being none: the next call asks for a new graph, and raises.
"""

from __future__ import annotations

from torch import fx, nn

from surgery.capture import MISSING, Read
from surgery.errors import ForwardError
from surgery.interop import base_children, is_divided_by_plan, is_sharded


def plan_reads(graph: fx.Graph, host: nn.Module) -> list[Read]:
    """Return what shows that a plan has divided a projection of this graph."""
    paths = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    modules = [host.get_submodule(path) for path in sorted(paths)]
    return [
        Read("item", vars(module), "forward", vars(module).get("forward", MISSING))
        for module in modules
        if any(p.dim() == 2 for p in module.parameters(recurse=False))
    ]


def require_divided_alike(host: nn.Module, path: str, children: list[str]) -> None:
    """Raise if a plan has divided what the host runs, and not what was spliced into it.

    Raises:
        ForwardError: it has.
    """
    inserted = [p for child in children for p in host.get_submodule(child).parameters()]
    if all(map(is_sharded, inserted)):
        return
    stack = list(base_children(host).items())
    while stack:
        name, module = stack.pop()
        if is_divided_by_plan(module):
            raise ForwardError(
                f"{path}: a tensor-parallel plan has divided {name} after the splice, and what is "
                "spliced in is whole. In every process: surgery.save(model, folder), "
                "surgery.remove(model), then surgery.load(model, folder), which divides it."
            )
        stack += [(f"{name}.{n}", m) for n, m in base_children(module).items()]
