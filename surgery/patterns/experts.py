"""Recognise a mixture of experts, an FFN whose tokens are routed to one of several networks.

    stacked     one module owns the weights of all experts, (experts, in, out)
    in a list   a module calls the children of a ``ModuleList`` or ``ModuleDict``, each with rows of
                one source; none reads what another gives, and one of them at least is an FFN

Which tokens an expert gets depends on values, so no graph of one path is right for all of them. The
module stays whole: it is an FFN with an input and an output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx, nn

from surgery.patterns.attention import match_attention
from surgery.patterns.dataflow import VIEWS, inputs, is_activation, op_name, origin, value
from surgery.patterns.ffn import match_ffn
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import (
    is_convolution,
    module_call_of,
    projection,
    stacks_weights,
)

_LISTS = (nn.ModuleList, nn.ModuleDict)
_ATTENTIONS = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")
# Operations between the tokens and the rows that an expert gets.
_ROUTING = VIEWS | frozenset(
    "mul imul rmul einsum matmul bmm gather masked_select take_along_dim where".split()
)


def match_experts(node: fx.Node, root: nn.Module) -> Match | None:
    """Return a block of experts as an FFN, whose first output is ``node``.

    Its output must have as many elements, and the same width, as its input.
    """
    call, out = module_call_of(node), value(node)
    if call.op != "call_module":
        return None
    module = root.get_submodule(str(call.target))
    stacked = stacks_weights(module) and not is_convolution(module)
    if not stacked and not expert_lists(module, ""):
        return None
    source = next((n for n in inputs(call) if is_activation(n)), None)
    if source is None or value(source).numel() != out.numel():
        return None
    if value(source).shape[-1] != out.shape[-1]:
        return None
    ports = {"input": PortNode(source), "output": PortNode(node)}
    return Match("ffn", str(call.target), node, ports, [*dict.fromkeys((call, node))])


def expert_lists(module: nn.Module, path: str) -> dict[str, list[str]]:
    """Return the paths of what may be experts of a module, by the path of the list they are in."""
    lists = [("", module), *module.named_children()]
    found = {".".join(filter(None, (path, name))): each for name, each in lists
             if isinstance(each, _LISTS) and len(each) > 1}  # fmt: skip
    return {
        at: [f"{at}.{name}".removeprefix(".") for name, _ in each.named_children()]
        for at, each in found.items()
    }


def place(node: fx.Node) -> str:
    """Return the path of the module that a node calls, or whose forward made it."""
    return str(node.target if node.op == "call_module" else node.meta["owner"])


def innermost(path: str, among: Collection[str]) -> str | None:
    """Return which path of ``among`` is, or lies next above, ``path``; None if none does."""
    while path and path not in among:
        path = path.rpartition(".")[0]
    return path if path in among else None


def runs_experts(lists: dict[str, list[str]], nodes: list[fx.Node], root: nn.Module) -> bool:
    """Whether the children of these lists are experts, by the nodes of one call of their parent.

    Children of one name or number, in several lists, count as one expert.
    """
    paths = {path for children in lists.values() for path in children}
    experts: dict[fx.Node, str] = {}
    for node in nodes:
        if found := innermost(place(node), paths):
            experts[node] = found.rpartition(".")[2]
    if any(op_name(n) in _ATTENTIONS or n.meta.get("attention") for n in experts):
        return False
    return (
        _are_independent(nodes, experts)
        and any(_is_ffn(node, experts, root) for node in experts)
        and bool(set.intersection(*_sources(experts)))
    )


def _are_independent(nodes: list[fx.Node], experts: dict[fx.Node, str]) -> bool:
    """Whether no expert reads what depends on another."""
    known: dict[fx.Node, set[str]] = {}
    for node in nodes:
        depends = {name for n in inputs(node) for name in known.get(n, ())}
        if node in experts:
            if depends - {experts[node]}:
                return False
            depends = {experts[node]}
        known[node] = depends
    return True


def _is_ffn(node: fx.Node, experts: dict[fx.Node, str], root: nn.Module) -> bool:
    """Whether a node is the last projection of an FFN that lies in one expert."""
    down = projection(node, root)
    match = match_ffn(down, root) if down else None
    made = [p.projection.node for p in match.ports.values() if p.projection] if match else []
    return bool(made) and {experts.get(n) for n in made} == {experts[node]}


def _sources(experts: dict[fx.Node, str]) -> Iterator[set[fx.Node]]:
    """Yield for each expert the nodes whose rows it may have been given."""
    for name in dict.fromkeys(experts.values()):
        stack = [n for node, own in experts.items() if own == name for n in inputs(node)
                 if experts.get(n) != name]  # fmt: skip
        found, seen = set(), set(stack)
        while stack:
            node = origin(stack.pop())
            if op_name(node) not in _ROUTING:
                found |= {node} if is_activation(node) else set()
                continue
            before = [n for n in inputs(node) if n not in seen]
            seen.update(before)
            stack += before
        yield found


def stays_whole(nodes: list[fx.Node], source: fx.Node, out: fx.Node, root: nn.Module) -> bool:
    """Whether one call of a module with experts is an FFN from ``source`` to ``out``.

    It is not if the module has an attention, too, or adds its input to its output: then it is a
    block, or a sub-layer with the residual inside.
    """
    x, y = value(source), value(out)
    alike = x.numel() == y.numel() and x.shape[-1] == y.shape[-1]
    return (
        alike
        and not _adds_input(out, source)
        and not any(match_attention(node, root) for node in nodes)
    )


def _adds_input(out: fx.Node, source: fx.Node) -> bool:
    """Whether ``out`` is a sum with ``source``, each rearranged."""
    stack, seen = [(out, False)], {out}
    while stack:
        node, added = stack.pop()
        if node is source:
            if added:
                return True
            continue
        sums = op_name(node) in ("add", "iadd", "radd")
        if sums or op_name(node) in VIEWS:
            before = [n for n in inputs(node) if n not in seen]
            seen.update(before)
            stack += [(n, added or sums) for n in before]
    return False
