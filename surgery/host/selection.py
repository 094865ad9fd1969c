"""The splices of a host that are on in some context, and the graphs that have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.host.call_signature import signature
from surgery.host.guards import Recogniser
from surgery.host.operation import Operation, Step
from surgery.host.variant import Children, Variant

ASKED_FIRST = 4  # recognisers that are asked before a call is described
KEPT = 32  # graphs of one selection; see "Bounds" in docs/guarantees.md


class ByName:
    """Values by name, each an attribute.

    Dynamo reads a dict once in a compilation, and does not see what is added to it meanwhile. It
    reads, and guards, each attribute when a call asks for it.
    """


def _attribute(key: Any) -> str:
    """Return a name for a signature; Dynamo takes no dot in it."""
    return str(key).replace(".", "/")


class Selection:
    """The splices of a host that are on in some context, and the graphs that have them.

    Attributes:
        names: their names, in order.
        kind: the same for selections that have the same graphs.
        edits: their edits, each with the child that it inserts, in order.
        steps: the edits as a graph gets them, each with how far it counts; None means wholly.
        wraps: the children that wrap the call, the innermost first.
        by_name: whether one of them is given all arguments by their names.
        edited: whether the forward itself runs a rewritten graph.
        graphs: the graphs so far, by the signature of their calls.
        used: all of them, the one that was looked up longest ago first, with their attributes
            in ``graphs``.
        recent: the recognisers of the latest calls, asked first.
        children: fast access to the host's submodules; a replica of the host has its own.
        given: every such access that a thread has been given.
        retired: the submodules as they were when one was taken out. Forwards that are under way in
            other threads go on with them.
    """

    def __init__(
        self,
        operations: Iterable[Operation],
        steps: Iterable[Step] | None = None,
        kind: tuple[Any, ...] | None = None,
    ) -> None:
        on = list(operations)
        self.names = tuple(operation.name for operation in on)
        self.kind = self.names if kind is None else kind
        self.edits = [pair for o in on for pair in zip(o.edits, o.children, strict=True)]
        self.steps: list[Step] = [(*e, None) for e in self.edits] if steps is None else [*steps]
        self.wraps = tuple(child for edit, child in self.edits if edit.verb == "wrap")
        self.by_name = any(edit.port == "call" for edit, _ in self.edits)
        self.edited = len(self.wraps) < len(self.edits)
        self.graphs = ByName()
        self.used: dict[Variant, str] = {}
        self.recent: tuple[tuple[Recogniser, Variant], ...] = ()
        self.children: Children | None = None
        self.given: list[Children] = []
        self.retired: Children | None = None

    def find(self, args: Any, kwargs: Any) -> tuple[list[Variant], list[Any]]:
        """Return the graphs of calls with this signature, and the inputs that they take."""
        key, inputs = signature(args, kwargs, self.names)
        return getattr(self.graphs, _attribute(key), []), inputs

    def add(self, variant: Variant, key: Any) -> bool:
        """Add the graph of calls with this signature; drop the least recently used of too many.

        Returns:
            whether one was dropped. A call that needs it again captures it again.
        """
        name = _attribute(key)
        vars(self.graphs).setdefault(name, []).insert(0, variant)
        self.used[variant] = name
        too_many = max(len(self.used) - KEPT, 0)
        asked = {each for _, each in self.recent}  # their uses are not noted
        for each in [v for v in list(self.used) if v not in asked][:too_many]:
            self._drop(each)
        return too_many > 0

    def _drop(self, variant: Variant) -> None:
        name = self.used.pop(variant, None)
        if name is None:  # another thread uses it just now
            return
        group = vars(self.graphs)[name]
        group.remove(variant)
        if not group:
            delattr(self.graphs, name)

    def variants(self) -> list[Variant]:
        """Return all graphs so far."""
        return list(self.used)

    def children_of(self, module: nn.Module) -> Children:
        """Return the submodules of the host, or of a replica that shares this state."""
        children = self.retired or self.children
        if children is not None and (self.retired or children.__dict__ is module._modules):
            return children
        made = Children(module)
        if self.children is None or self.children.belongs_to(module):
            # Several threads may come here at once. Each notes its own before it reads ``retired``,
            # and ``retire`` does the reverse, so it reaches all. A lock would stay closed where an
            # exception, such as Ctrl-C, comes between its two ends.
            self.given.append(made)
            self.children = made
        return self.retired or made

    def retire(self, module: nn.Module) -> None:
        """Keep the submodules as they are now, before one is taken out."""
        self.retired = Children(module)
        for children in (self.retired, *self.given):
            if children.__dict__ is module._modules:
                children.__dict__ = dict(module._modules)

    def touch(self, variant: Variant) -> None:
        """Note that this variant is the latest used; one that was dropped meanwhile stays so."""
        name = self.used.pop(variant, None)
        if name is not None:
            self.used[variant] = name

    def remember(self, variant: Variant, args: Any, kwargs: Any) -> None:
        """Put this variant's recogniser first."""
        self.touch(variant)
        recognise = variant.recogniser(args, kwargs)
        if recognise is not None:
            others = [pair for pair in self.recent if pair[1] is not variant]
            self.recent = ((recognise, variant), *others[: ASKED_FIRST - 1])
