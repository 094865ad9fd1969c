"""Hold what one run of a model was seen to do: a flat graph, and the calls of its modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from surgery.interop import leaves
from surgery.patterns import StackedMap


@dataclass
class Call:
    """The arguments that a module was first called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Observation:
    """The flat graph of one forward, and the arguments of each module's first call.

    Nodes carry ``meta["value"]`` and ``meta["owner"]``, as in ``capture.Captured``, and
    ``meta["call"]``, the number of the module call that made them.

    Attributes:
        outputs: the nodes of the tensors that the model returned.
        without_gradient: paths of modules that the model runs under ``no_grad``.
        experts: paths of experts in lists, those that got no token included.
        mixtures: paths of modules with such experts that are kept whole.
        stacks: for modules that own the stacked weights of experts, how each weight is used.
        results: by the path of a module, the node of the hidden states that its first call gave.
    """

    graph: fx.Graph
    calls: dict[str, Call] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    without_gradient: set[str] = field(default_factory=set)
    experts: set[str] = field(default_factory=set)
    mixtures: set[str] = field(default_factory=set)
    stacks: dict[str, dict[str, StackedMap]] = field(default_factory=dict)
    results: dict[str, fx.Node] = field(default_factory=dict)

    def note_result(self, path: str, result: Any, nodes: dict[int, fx.Node]) -> None:
        """Note the node of the hidden states that a module gave, if it is the module's first."""
        first = first_of(result)
        if isinstance(first, Tensor) and id(first) in nodes:
            self.results.setdefault(path, nodes[id(first)])


def first_of(result: Any) -> Any:
    """Return what a module gives, or the first of several values: its hidden states, of a block."""
    if isinstance(result, dict):
        return next(iter(result.values()), None)
    return (result[0] if result else None) if isinstance(result, (tuple, list)) else result


def floats_in(structure: Any) -> list[Tensor]:
    """Return the floating-point tensors of nested arguments or outputs."""
    found = [x for x in leaves(structure) if isinstance(x, Tensor)]
    return [x for x in found if x.is_floating_point()]


def writes(function: Any) -> bool:
    """Whether a function changes its first argument, as ``add_`` and ``+=`` do."""
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or name.endswith("_")


def target_name(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def has_tensor(structure: Any) -> bool:
    """Whether a value is a tensor, or a tuple or list with one in it."""
    if isinstance(structure, (tuple, list)):
        return any(has_tensor(x) for x in structure)
    return isinstance(structure, Tensor)
