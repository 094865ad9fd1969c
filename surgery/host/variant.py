"""One captured and edited graph of a host, compiled, with the guards that choose it.

Capture takes one path through the host's forward and records the branches that it took. A branch
on values that can be evaluated without tensor work or side effects is *early*: it is checked before
the graph runs, with the other guards (host/guards.py). Any other branch is *late*: a node of the
graph checks it where it was decided. A late branch that flips raises :class:`GuardFlipped`, and the
host tries another graph; once the KV cache has changed that is no longer possible, and
:class:`FlippedTooLate` reaches the caller.
"""

from __future__ import annotations

import itertools
import linecache
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import IN_PLACE, Branch, Captured, Read, is_pure, reads_opaque
from surgery.errors import ForwardError
from surgery.host.guards import Guards, Recogniser, recogniser
from surgery.rewrite import lse_of, output_of

_numbers = itertools.count(1)
_FOLLOWED = (bool, int, float, str, torch.dtype, type(None))


class GuardFlipped(ForwardError):
    """A branch inside a graph would go the other way; nothing has changed yet."""


class FlippedTooLate(ForwardError):
    """A branch inside a graph would go the other way, and the KV cache has changed already."""


class Variant:
    """A compiled graph of a host.

    Attributes:
        graph: the ``torch.fx.Graph``; print it, or its ``code``.
        code: the Python source that runs.

    Example:
        ``for variants in surgery.variants(model).values(): print(variants[0].code)``
    """

    def __init__(self, captured: Captured) -> None:
        self.graph = captured.graph
        changed = _behind_a_change(captured.graph)
        texts = [g for g in captured.branches if _reads_text(g)]
        early = [g for g in captured.branches if g not in texts and _early(g.node, changed)]
        inputs = list(captured.graph.find_nodes(op="placeholder"))[1:]  # the first is the host
        self._guards = Guards(
            captured.reads,
            _items_of(captured.reads, _FOLLOWED),
            [f for f in _items_of(captured.reads, (types.FunctionType,)) if _followed(f[2])],
            [(m._modules, name, part) for m, name, part in captured.parts],
            captured.ambient,
            _early_function(captured.graph, early),
            [(inputs.index(g.node), g.expected) for g in texts],
        )
        self._recogniser: Recogniser | None = None
        self.branches = [f"{g.node.name} -> {g.expected!r} at {g.where}" for g in captured.branches]
        late = [g for g in captured.branches if g not in texts + early]
        for branch in late:
            _check_inside(captured.graph, branch)
        _shorten(captured.graph)
        _drop_unused(captured.graph)
        captured.graph.lint()
        self.run, self.code = compile_graph(captured.graph)
        for node in captured.graph.nodes:
            node.meta.pop("value", None)  # free the example values

    def matches(self, host: nn.Module, inputs: list[Any]) -> bool:
        """Whether the host's own forward would now take the path of this graph for ``inputs``."""
        return self._guards.hold(host, inputs)

    def relies_on(self) -> list[str]:
        """Describe what keeps this graph from being used: reads that changed, or all branches."""
        return self._guards.unmet() or self.branches

    def recogniser(self, args: Any, kwargs: Any) -> Recogniser | None:
        """Return the recogniser of calls like the one with ``args`` and ``kwargs``."""
        if self._recogniser is None:
            self._recogniser = recogniser(args, kwargs, self._guards)
        return self._recogniser


class Children:
    """Fast attribute access to a host's submodules, skipping ``nn.Module.__getattr__``.

    ``nn.Module.__getattr__`` looks in four dictionaries, in Python, which costs as much as a small
    operator for each child and decoded token. This object shares the host's dictionary of
    submodules as its own ``__dict__``, so a look-up is a plain attribute access. It holds the host
    weakly.
    """

    __slots__ = ("__dict__", "_surgery_host")

    def __init__(self, host: nn.Module) -> None:
        self._surgery_host = weakref.ref(host)
        self.__dict__ = host._modules

    def __getattr__(self, name: str) -> Any:  # parameters, buffers
        return getattr(self._surgery_host(), name)

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether these are the children of ``module``, or of a host that no longer exists."""
        return self._surgery_host() in (module, None)


def _items_of(reads: list[Read], kinds: tuple[type, ...]) -> list[tuple[dict[str, Any], str, Any]]:
    """Return the reads of attributes and globals whose answer is of these kinds."""
    return [
        (read.place, read.name, read.answer)
        for read in reads
        if read.how == "item" and type(read.answer) in kinds
    ]


def _followed(function: Any) -> bool:
    """Whether Dynamo can compare a function with another: it replaces those of ``inspect``."""
    return bool(function.__module__ != "inspect")


def _behind_a_change(graph: fx.Graph) -> set[fx.Node]:
    """Return nodes that look something up in an object after the graph may have changed it."""
    changed: set[int] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        base = node.args[0] if node.args else None
        if _changes_something(node) and isinstance(base, fx.Node):
            changed.add(id(base.meta.get("value")))
        if reads_opaque(node) and isinstance(base, fx.Node):
            if base in found or id(base.meta.get("value")) in changed:
                found.add(node)
    return found


def _reads_text(branch: Branch) -> bool:
    """Whether a branch is for one value of a string argument."""
    text = branch.node.op == "placeholder" and type(branch.node.meta["value"]) is str
    return text and branch.convert is str


def _early(node: fx.Node, changed: set[fx.Node]) -> bool:
    """Whether the value of ``node`` can be computed before the graph runs."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current in changed or not is_pure(current):
            return False
        if current.op != "placeholder":
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return True


def _early_function(graph: fx.Graph, branches: list[Branch]) -> Callable[..., bool] | None:
    """Compile the early branches into one function of the host and the inputs; None without any."""
    if not branches:
        return None
    small = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = {b.node for b in branches}
    for node in reversed(list(graph.nodes)):
        if node in needed and node.op != "placeholder":
            needed.update(node.all_input_nodes)
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = small.node_copy(node, lambda n: copies[n])
    asked = [(b.convert, b.expected) for b in branches]

    def hold(*values: Any) -> bool:
        pairs = zip(asked, values, strict=True)
        return all(convert(v) == expected for (convert, expected), v in pairs)

    small.output(small.call_function(hold, tuple(copies[b.node] for b in branches)))
    asks = compile_graph(small)[0]

    def early(host: nn.Module, inputs: list[Any]) -> bool:
        try:
            return bool(asks(host, host, *inputs))
        except (AttributeError, TypeError, LookupError):  # the inputs lack what a branch reads
            return False

    return early


def _check_inside(graph: fx.Graph, branch: Branch) -> None:
    """Insert a node that checks a late branch where it was decided.

    Before a cache update the host can still turn to another graph; after it the check raises
    :class:`FlippedTooLate`.
    """
    node = branch.node
    order = list(graph.nodes)
    touched = any(_changes_something(n) for n in order[: order.index(node)])

    convert, expected = branch.convert, branch.expected

    def check(value: Any) -> None:
        if convert(value) != expected:
            if touched:
                raise FlippedTooLate(
                    f"the branch at {branch.where} depends on values that are known only after the "
                    "KV cache has changed, and it would now go the other way. Start again with a "
                    "fresh cache, and keep the module that branches whole with the is_leaf hook."
                )
            raise GuardFlipped(
                f"the branch at {branch.where} goes the other way now: what is spliced in changes "
                "the value that decides it. Keep the module that branches whole with the is_leaf "
                "hook."
            )

    with graph.inserting_after(node):
        graph.call_function(check, (node,)).meta["keep"] = True


def _changes_something(node: fx.Node) -> bool:
    """Whether a node has a side effect on an object or on a tensor of the caller."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    if name in ("setitem", "setattr") or (name.endswith("_") and not name.endswith("__")):
        return True
    if name in IN_PLACE:
        return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
    owner = node.args[0] if node.op == "call_method" and node.args else None
    opaque = isinstance(owner, fx.Node) and not isinstance(owner.meta.get("value"), Tensor)
    return opaque and not is_pure(node)


def _shorten(graph: fx.Graph) -> None:
    """Replace ``x.shape[:-1][0]`` by ``x.shape[0]``; every layer unpacks shapes this way."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        part, at = node.args
        if isinstance(part, fx.Node) and part.target is operator.getitem and type(at) is int:
            whole, cut = part.args
            size = isinstance(whole, fx.Node) and isinstance(whole.meta.get("value"), torch.Size)
            from_first = isinstance(cut, slice) and cut.start in (None, 0) and cut.step is None
            if size and from_first and at >= 0:
                node.args = (whole, at)


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes that served only an answer in Python, such as sizes and attributes."""
    for node in reversed(list(graph.nodes)):
        unused = not node.users and node.op in ("call_function", "get_attr", "call_method")
        if unused and (
            node.op == "get_attr" or is_pure(node) or node.target in (output_of, lse_of)
        ):
            graph.erase_node(node)


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Return ``forward(self, host, *inputs)`` of a graph, and its source, which tracebacks show."""
    generated = graph.python_code("self")
    name = f"<surgery graph {next(_numbers)}>"
    namespace = dict(generated.globals)
    exec(compile(generated.src, name, "exec"), namespace)
    forward = namespace["forward"]
    linecache.cache[name] = (len(generated.src), None, generated.src.splitlines(True), name)
    # A traceback may live longer than the graph, and holds the code.
    weakref.finalize(forward.__code__, linecache.cache.pop, name, None).atexit = False
    return forward, generated.src
