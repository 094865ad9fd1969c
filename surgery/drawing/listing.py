"""List a graph as steps: a line of Python for each, its ports, and its source in the model.

    def forward(self, input, past_key_values):       # input is hidden_states
        c_attn = self.c_attn(input)                   # modeling.py:210
        query = c_attn.split(32, dim=2)[0]            # modeling.py:210
        query = added(self.lora_query, query, input)  # lora_query: add at query

The text is for reading. It computes what the graph computes, but another text runs
(``surgery.variants(model)``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from surgery.capture import run_forward_hooks, run_pre_hooks
from surgery.drawing.expressions import Writer


@dataclass(frozen=True)
class Step:
    """One line of a listing, and one box of a drawing.

    Attributes:
        kind: ``input``, ``module``, ``method``, ``function`` or ``output``.
        variable: the name that it assigns; empty if it assigns none.
        text: the whole line, without its comment.
        where: file and line of the model, or what inserted it.
        label: what it does, in a word or two.
        ports: the ports whose value it is.
        shape: the shape of its value in the example.
        sources: the numbers of the steps that it reads.
        inserted: whether a splice has added it.
        drawn: whether it is an operation on tensors; a number, a check or a hook is none.
    """

    kind: str
    variable: str
    text: str
    where: str
    label: str
    ports: tuple[str, ...]
    shape: str
    sources: tuple[int, ...]
    inserted: bool
    drawn: bool


@dataclass(frozen=True)
class Listing:
    """A graph as steps, in the order in which they run."""

    steps: list[Step]
    names: dict[str, Any] = field(repr=False)

    def lines(self) -> list[tuple[int | None, str, str]]:
        """Return each line with the number of its step and its comment."""
        given = [step for step in self.steps if step.kind == "input"]
        head = f"def forward({', '.join(['self', *(s.variable for s in given)])}):"
        renamed = [f"{s.variable} is {s.label}" for s in given if s.variable != s.label]
        found: list[tuple[int | None, str, str]] = [(None, head, ", ".join(renamed))]
        for number, step in enumerate(self.steps):
            if step.kind != "input":
                found.append((number, f"    {step.text}", step.where))
        return found

    def __str__(self) -> str:
        pairs = [(text, f"  # {note}" if note else "") for _, text, note in self.lines()]
        return "".join(f"{text}{note}\n" for text, note in pairs)

    def function(self) -> Any:
        """Return the listing as a function, which computes what the graph computes."""
        namespace = {"torch": torch, "F": F, **self.names}
        exec("import math, operator\n" + str(self), namespace)
        return namespace["forward"]


def listed(
    graph: fx.Graph,
    variables: Mapping[fx.Node, str],
    ports: Mapping[fx.Node, tuple[str, ...]],
    arguments: Mapping[fx.Node, str],
    kinds: Mapping[fx.Node, str],
    shapes: Mapping[fx.Node, str],
    inserted: Mapping[fx.Node, str],
) -> Listing:
    """List a graph.

    Args:
        arguments: the name that the forward gives to an input.
        kinds, shapes: what each node holds (see ``Writer``), and its shape in the example.
        inserted: what splices have added, with what to say of it.
    """
    writer = Writer(graph, variables, kinds, set(ports))
    steps: list[Step] = []
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if writer.inline(node) is not None:
            continue
        numbers[node] = len(steps)
        text, kind = writer.statement(node) if node.op != "placeholder" else "", _kind(node)
        variable = "" if kind == "output" or not (node.users or node in ports) else variables[node]
        if kind == "input":
            variable = variables[node]
        elif variable:
            text = f"{variable} = {text}"
        new = node in inserted
        label = arguments.get(node, variables[node]) if kind == "input" else _label(node, writer)
        if new and kind == "function":
            label = _label_of_inserted(node, label)
        holds = (
            new
            or kinds.get(node, "").startswith("tensor")
            or node in ports
            or kind in ("input", "output")
        )
        drawn = bool(holds or not node.users) and _name(node) != "check" and not _is_hooks(node)
        through = _through_hooks(node)
        given = node.all_input_nodes if through is None else through
        found = sorted({numbers[n] for a in given for n in _sources(a, numbers, kinds)})
        if _is_hooks(node):
            found = []
        steps.append(
            Step(kind, variable, text, inserted.get(node) or _where(node), label,
                 ports.get(node, ()), shapes.get(node, ""), tuple(found), new, drawn)
        )  # fmt: skip
    return Listing(steps, writer.names)


def _kind(node: fx.Node) -> str:
    kinds = {"placeholder": "input", "call_module": "module", "call_method": "method"}
    return "output" if node.op == "output" else kinds.get(node.op, "function")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _label(node: fx.Node, writer: Writer) -> str:
    """Return what a node does in a word or two."""
    if node.op == "output":
        return "return"
    if node.op == "call_module":
        return str(node.target)
    name = _name(node).strip("_")
    if name == "getitem":
        return "slice" if type(node.args[1]) is tuple else writer.statement(node)
    return name


def _label_of_inserted(node: fx.Node, label: str) -> str:
    """Return the names of the inserted modules that a node calls, or else its own label."""
    children = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if len(children) != 1:
        return label
    return children[0] if label.startswith("added") else f"{label} {children[0]}"


def _is_hooks(node: fx.Node) -> bool:
    return node.target in (run_pre_hooks, run_forward_hooks)


def _where(node: fx.Node) -> str:
    """Return file and line of the model's code; without them, the module that it belongs to."""
    if node.meta.get("keep"):
        return "a branch, asked at each call"
    line = node.meta.get("line")
    if line is not None:
        return f"{PurePath(line[0].replace(chr(92), '/')).name}:{line[1]}"
    return str(node.meta.get("owner") or "")


def _sources(
    node: Any, numbers: Mapping[fx.Node, int], kinds: Mapping[fx.Node, str]
) -> list[fx.Node]:
    """Return the nodes with a line that a value comes from.

    Hooks let values through; the size of a tensor comes from none.
    """
    if not isinstance(node, fx.Node):
        return []
    if node in numbers and not _is_hooks(node):
        return [node]
    through = _through_hooks(node)
    if through is None:
        is_fact = kinds.get(node) == "number" or (node.target is getattr and node not in numbers)
        through = [] if is_fact else node.all_input_nodes
    return [n for a in through for n in _sources(a, numbers, kinds)]


def _through_hooks(node: fx.Node) -> list[fx.Node] | None:
    """Return what a value was before the hooks of a module; None if it is not behind any."""
    path: list[Any] = []
    base: Any = node
    while isinstance(base, fx.Node) and _name(base) == "getitem":
        path.insert(0, base.args[1])
        base = base.args[0]
    if not isinstance(base, fx.Node) or not _is_hooks(base):
        return None
    behind: Any = base.args[1:] if base.target is run_pre_hooks else base.args[2]
    for at in path:
        known = isinstance(behind, (tuple, list, dict))
        if not known or (isinstance(behind, dict) and at not in behind):
            break
        behind = behind[at]
    return _nodes(behind)


def _nodes(structure: Any) -> list[fx.Node]:
    """Return the nodes in nested values."""
    if isinstance(structure, dict):
        structure = list(structure.values())
    if isinstance(structure, (tuple, list)):
        return [n for each in structure for n in _nodes(each)]
    return [structure] if isinstance(structure, fx.Node) else []
