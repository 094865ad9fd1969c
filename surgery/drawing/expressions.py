"""Write the nodes of a graph as Python, for reading.

Sizes, attributes, items of tuples and constants are written where they are used, so a line is left
for each operation on tensors. The text runs: ``Writer.names`` has what it calls beside ``torch``,
``F``, ``math`` and ``operator``.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and_": "&", "or_": "|", "xor": "^",
}  # fmt: skip
_PREFIX = {"neg": "-", "invert": "~", "pos": "+"}
_LONGEST = 40  # characters of a number's computation that is written in place


class Writer:
    """Writes the nodes of one graph.

    Args:
        variables: the name of each node.
        kinds: what a node holds: ``tensor``, ``tensors``, ``number`` or ``other``.
        named: nodes that get a line in any case: those of ports.

    Attributes:
        names: what the text calls, by name.
    """

    def __init__(
        self,
        graph: fx.Graph,
        variables: Mapping[fx.Node, str],
        kinds: Mapping[fx.Node, str],
        named: set[fx.Node],
    ) -> None:
        self.host = next(iter(graph.nodes))
        self.variables, self.kinds, self.named = variables, kinds, named
        self.names: dict[str, Any] = {}
        read = (node for node in graph.nodes if node.users or node.op == "placeholder")
        self._taken = {"self", *(variables[node] for node in read)}
        self._inline: dict[fx.Node, str | None] = {}

    def inline(self, node: fx.Node) -> str | None:
        """Return the text that stands for a node wherever it is used; None if it has a line."""
        if node not in self._inline:
            self._inline[node] = self._in_place(node)
        return self._inline[node]

    def _in_place(self, node: fx.Node) -> str | None:
        if node is self.host:
            return "self"
        if node.op in ("placeholder", "output") or node in self.named:
            return None
        if node.op == "get_attr":
            return self.statement(node)
        if node.op != "call_function" or node.kwargs:
            return self._number(node) if node.op == "call_method" else None
        target, name = node.target, getattr(node.target, "__name__", "")
        if name == "constant" and not node.args:
            return self.statement(node)
        if target is getattr and self._is_looked_up(node):
            return self.statement(node)
        if target is operator.getitem and type(node.args[1]) in (int, str):
            base = node.args[0]
            several = isinstance(base, fx.Node) and self.kinds.get(base) != "tensor"
            return self.statement(node) if several else None
        return self._number(node) if name in _INFIX or name in _PREFIX else None

    def _number(self, node: fx.Node) -> str | None:
        """Return the text of a short computation of a number, such as a size."""
        if self.kinds.get(node) != "number":
            return None
        text = self.statement(node)
        if node.op == "call_function":
            text = f"({text})"
        elif self.kinds.get(node.args[0]) != "tensor":  # type: ignore[arg-type]
            return None  # an object may answer otherwise later, as a cache does
        return text if len(text) <= _LONGEST else None

    def _is_looked_up(self, node: fx.Node) -> bool:
        """Whether an attribute is that of a module, or a fact about a tensor."""
        base = node.args[0]
        if not isinstance(base, fx.Node):
            return False
        below = base.target is getattr and self.inline(base) is not None
        fact = self.kinds.get(base) == "tensor" and self.kinds.get(node) != "tensor"
        return base is self.host or below or fact

    def value(self, a: Any) -> str:
        """Return the text of an argument."""
        if isinstance(a, fx.Node):
            return self.inline(a) or self.variables[a]
        if type(a) is tuple:
            inside = ", ".join(map(self.value, a))
            return f"({inside},)" if len(a) == 1 else f"({inside})"
        if isinstance(a, (list, tuple)):
            return f"[{', '.join(map(self.value, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in a.items()) + "}"
        if isinstance(a, slice):
            return f"slice({', '.join(map(self.value, (a.start, a.stop, a.step)))})"
        if a is ...:
            return "..."
        if isinstance(a, float) and not math.isfinite(a):
            return f"float({str(a)!r})"
        if isinstance(a, torch.device):
            return f"torch.{a!r}"
        if isinstance(a, (int, float, str, bytes, complex, torch.dtype, torch.layout)) or a is None:
            return repr(a)
        return self.called(a)

    def index(self, a: Any) -> str:
        """Return the text of an index, without the call of ``slice``."""
        if type(a) is tuple and a:
            return ", ".join(map(self.index, a)) + ("," if len(a) == 1 else "")
        if isinstance(a, slice):
            ends = ["" if x is None else self.value(x) for x in (a.start, a.stop, a.step)]
            return ":".join(ends if ends[2] else ends[:2])
        return self.value(a)

    def called(self, target: Any) -> str:
        """Return how the text names a function or any other object."""
        name = getattr(target, "__name__", type(target).__name__)
        for module, prefix in ((torch, "torch."), (F, "F."), (math, "math."),
                               (operator, "operator."), (builtins, "")):  # fmt: skip
            if getattr(module, name, None) is target:
                return prefix + name
        name = name if name.isidentifier() and not keyword.iskeyword(name) else "function"
        known, number = name, 2
        while known in self._taken or self.names.get(known, target) is not target:
            known, number = f"{name}_{number}", number + 1
        self.names[known] = target
        return known

    def statement(self, node: fx.Node) -> str:
        """Return the text that computes a node."""
        if node.op == "get_attr":
            return f"self.{_path(str(node.target))}"
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        given = [self.value(a) for a in node.args]
        options = [f"{name}={self.value(a)}" for name, a in node.kwargs.items()]
        if node.op == "call_module":
            return f"self.{_path(str(node.target))}({', '.join(given + options)})"
        if node.op == "call_method":
            owner, *rest = given
            return f"{owner}.{node.target}({', '.join(rest + options)})"
        return self._function(node, given, options)

    def _function(self, node: fx.Node, given: list[str], options: list[str]) -> str:
        target: Any = node.target
        name = getattr(target, "__name__", "")
        if name == "constant" and not given:
            return self.value(target())
        if target is getattr and len(given) == 2 and isinstance(node.args[1], str):
            at = node.args[1]
            return f"{given[0]}[{at}]" if at.isdigit() else f"{given[0]}.{at}"
        if target is operator.getitem:
            return f"{given[0]}[{self.index(node.args[1])}]"
        if target is operator.setitem:
            return f"{given[0]}[{self.index(node.args[1])}] = {given[2]}"
        infix = getattr(operator, name, None) is target or getattr(torch, name, None) is target
        if infix and not options:
            if name in _INFIX and len(given) == 2:
                return f"{given[0]} {_INFIX[name]} {given[1]}"
            if name in _PREFIX and len(given) == 1:
                return f"{_PREFIX[name]}{given[0]}"
        return f"{self.called(target)}({', '.join(given + options)})"


def _path(target: str) -> str:
    """Return a path of modules as Python reads it: a number is an item of a list."""
    first, *rest = target.split(".")
    return first + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)
