"""Name the nodes of a graph for reading: by ports, by the forward's own arguments, else as fx does.

A new value of a port takes over the name of the old one, as in ``query = added(..., query)``, if
nothing reads the old value afterwards. So what is spliced in changes as few lines as it can.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery.capture import run_forward_hooks, run_pre_hooks
from surgery.host import own_forward
from surgery.interop import input_key, map_leaves
from surgery.patterns import Match

# Of several ports of one node, the first of these names its variable.
_FIRST = (
    "query key value query_heads key_heads value_heads query_unrotated weights context merged lse "
    "gate up activation output input ids positions rows"
).split()
_RESULTS = {
    "getitem": "part", "add": "total", "sub": "difference", "mul": "product", "matmul": "product",
    "truediv": "quotient", "neg": "negative",
}  # fmt: skip
LIBRARIES = (torch, F, math, operator, builtins)
_TAKEN = {"self", "torch", "F", "math", "operator", "inf", "nan"}


def argument_names(
    module: nn.Module, graph: fx.Graph, args: Any, kwargs: Any
) -> dict[fx.Node, str]:
    """Return the name that the host's forward gives to each input of a graph of it."""
    inputs = list(graph.find_nodes(op="placeholder"))[1:]  # the first is the host
    names: dict[Any, str] = {}
    for name, argument in _by_name(module, args, kwargs):
        found: list[tuple[Any, str]] = []
        map_leaves(argument, lambda v, n=name, into=found: into.append((v, n)))  # type: ignore[misc]
        for i, (leaf, each) in enumerate(found):
            label = each if len(found) == 1 else f"{each}_{i}"
            names.setdefault(input_key(leaf, len(names)), label)
    return dict(zip(inputs, names.values(), strict=False))


def _by_name(module: nn.Module, args: Any, kwargs: Any) -> Iterable[tuple[str, Any]]:
    """Yield the arguments of a call in their order, each with its name."""
    try:
        parameters = [*inspect.signature(own_forward(module)).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    for i, argument in enumerate(args):
        yield (named[i] if i < len(named) else f"x{i}"), argument
    yield from kwargs.items()


def port_names(matches: Iterable[Match]) -> dict[fx.Node, tuple[str, ...]]:
    """Return the ports of each node; with their kind where two sites of a host share a name."""
    found: dict[fx.Node, list[tuple[str, str]]] = {}
    many = Counter(name for match in matches for name in {*match.ports})
    kinds = Counter[str]()
    for match in matches:
        kinds[match.kind] += 1
        kind = match.kind if kinds[match.kind] == 1 else f"{match.kind}_{kinds[match.kind]}"
        for name, port in match.ports.items():
            label = name if many[name] == 1 else f"{kind}_{name}"
            found.setdefault(port.node, []).append((name, label))
    return {
        node: tuple(label for _, label in sorted(pairs, key=lambda p: _rank(p[0])))
        for node, pairs in found.items()
    }


def _rank(port: str) -> int:
    return _FIRST.index(port) if port in _FIRST else len(_FIRST)


def variable_names(
    graph: fx.Graph,
    given: Mapping[fx.Node, str],
    ports: Mapping[fx.Node, tuple[str, ...]],
    news: Mapping[fx.Node, fx.Node] | None = None,
) -> dict[fx.Node, str]:
    """Return a variable for each node.

    Args:
        given: names that are known already: of arguments, or of the nodes of the base.
        ports: the ports of a node; the first names it.
        news: for a new value, the node whose value it takes the place of.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    known = news is not None
    names: dict[fx.Node, str] = dict(given) if known else {}
    used = {*names.values(), *_TAKEN, *(f.__name__ for f in map(own_function, graph.nodes) if f)}
    for node in graph.nodes:  # ports first: they get their names without a number
        if node in ports and node not in names and node not in (news or {}):
            names[node] = _free(_joined(node, ports[node]), used)
    for node in sorted(graph.nodes, key=_is_looked_up):  # stable; these seldom need their names
        was = (news or {}).get(node)
        if was is not None and was in names:
            last = max(order[user] for user in was.users) if was.users else 0
            names[node] = names[was] if last <= order[node] else _free(names[was], used)
        elif node not in names:
            names[node] = _free(given.get(node) or _plain(node), used)
    return names


def own_function(node: fx.Node) -> Any:
    """Return the function that a node calls if it is none of torch's or Python's, else None."""
    target: Any = node.target
    name = getattr(target, "__name__", "")
    known = any(getattr(module, name, None) is target for module in LIBRARIES)
    return None if node.op != "call_function" or known or not name else target


def _plain(node: fx.Node) -> str:
    """Return the name of the variable of a node that is no port: what computes it, shortened."""
    if node.op == "call_module":
        *parents, last = str(node.target).split(".")
        return "_".join([*parents[-1:], last]) if last.isdigit() else last
    if own_function(node):
        is_hooks = node.target in (run_pre_hooks, run_forward_hooks)
        return "hooked" if is_hooks else own_function(node).__name__.strip("_").partition("_")[0]
    if node.target is getattr:
        return str(node.args[1])
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return _RESULTS.get(name, name)


def _is_looked_up(node: fx.Node) -> bool:
    """Whether a node is mostly written where it is used, see ``Writer``."""
    item = node.target is operator.getitem and type(node.args[1]) is int
    return node.op == "get_attr" or node.target is getattr or item


def _joined(node: fx.Node, ports: tuple[str, ...]) -> str:
    """Return the name of a port's variable; a fused projection has those of all its ports."""
    fused = [p for p in ports if p in ("query", "key", "value", "gate", "up")]
    return "_".join(fused) if len(fused) > 1 else ports[0]


def _free(wanted: str, used: set[str]) -> str:
    """Return a name that no variable has, and note it as used."""
    wanted = wanted if wanted.isidentifier() and not keyword.iskeyword(wanted) else f"{wanted}_"
    name, number = wanted, 2
    while name in used:
        name, number = f"{wanted}_{number}", number + 1
    used.add(name)
    return name


def replacements(
    base: fx.Graph, edited: fx.Graph, copies: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Return the new nodes that nodes of the base read now, each with the node it stands for."""
    here = set(edited.nodes)
    back = {copy: node for node, copy in copies.items()}
    base_output, output = (next(iter(g.find_nodes(op="output"))) for g in (base, edited))
    back[base_output] = output
    found: dict[fx.Node, fx.Node] = {}
    for was in base.nodes:
        now = back.get(was)
        if now is None or now not in here or len(was.all_input_nodes) != len(now.all_input_nodes):
            continue
        for old, new in zip(was.all_input_nodes, now.all_input_nodes, strict=True):
            if new not in copies and back.get(old) in here:
                found.setdefault(new, back[old])
    return found
