"""The state of a host: its splices, the graphs captured so far, and which splices are on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.host.call_signature import signature
from surgery.host.guards import Recogniser
from surgery.host.off_switches import Off, off_key, off_now
from surgery.host.variant import Children, Variant
from surgery.plugin import Edit

STATE = "_surgery"


_ASKED_FIRST = 4  # recognisers that are asked before a call is described


@dataclass
class Operation:
    """What one splice did to one host: its edits, and the child that each of them inserts."""

    name: str
    edits: list[Edit]
    children: list[str]


class _ByName:
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
        edits: their edits, each with the child that it inserts, in order.
        wraps: the children that wrap the call, the innermost first.
        edited: whether the forward itself runs a rewritten graph.
        graphs: the graphs so far, by the signature of their calls.
        recent: the recognisers of the latest calls, asked first.
        children: fast access to the host's submodules; a replica of the host has its own.
        retired: the submodules as they were when one was taken out. Forwards that are under way in
            other threads go on with them.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        on = list(operations)
        self.names = tuple(operation.name for operation in on)
        self.edits = [pair for o in on for pair in zip(o.edits, o.children, strict=True)]
        self.wraps = tuple(child for edit, child in self.edits if edit.verb == "wrap")
        self.edited = len(self.wraps) < len(self.edits)
        self.graphs = _ByName()
        self.recent: tuple[tuple[Recogniser, Variant], ...] = ()
        self.children: Children | None = None
        self.retired: Children | None = None

    def find(self, args: Any, kwargs: Any) -> tuple[list[Variant], list[Any]]:
        """Return the graphs of calls with this signature, and the inputs that they take."""
        key, inputs = signature(args, kwargs, self.names)
        return getattr(self.graphs, _attribute(key), []), inputs

    def add(self, variant: Variant, key: Any) -> None:
        """Add the graph of calls with this signature."""
        vars(self.graphs).setdefault(_attribute(key), []).insert(0, variant)

    def variants(self) -> list[Variant]:
        """Return all graphs so far."""
        return [variant for group in vars(self.graphs).values() for variant in group]

    def children_of(self, module: nn.Module) -> Children:
        """Return the submodules of the host, or of a replica that shares this state."""
        children = self.retired or self.children
        if children is not None and (self.retired or children.__dict__ is module._modules):
            return children
        made = Children(module)
        if self.children is None or self.children.belongs_to(module):
            self.children = made
        return self.retired or made

    def retire(self, module: nn.Module) -> None:
        """Keep the submodules as they are now, before one is taken out."""
        self.retired = Children(module)
        for children in filter(None, (self.retired, self.children)):
            children.__dict__ = dict(module._modules)

    def remember(self, variant: Variant, args: Any, kwargs: Any) -> None:
        """Put this variant's recogniser first."""
        recognise = variant.recogniser(args, kwargs)
        if recognise is not None:
            others = [pair for pair in self.recent if pair[1] is not variant]
            self.recent = ((recognise, variant), *others[: _ASKED_FIRST - 1])


@dataclass
class HostState:
    """What a host needs beside the module itself.

    Attributes:
        path, through: where the host is, and the modules that its graphs trace through.
        operations: the splices in this host, by name.
        weights: by kind and key of each site, the modules and parameters that it ran with when it
            was spliced; a graph that runs with them and lacks the site is refused.
        everything: the selection of all splices, of which :meth:`all_on` tells those of a thread.
        trial: a thread and the selection that it alone sees, while it verifies a new splice.
        selections: the others, by the short name of what is off (host/off_switches.py).
        own: a forward that another library has set on the object, in place of the class's.
        around: functions that another library has set on the object around the host's forward, the
            innermost first.
    """

    path: str
    through: frozenset[str]
    operations: dict[str, Operation] = field(default_factory=dict)
    weights: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    everything: Selection = field(default_factory=lambda: Selection(()))
    trial: tuple[int, Selection] | None = None
    selections: Any = field(default_factory=_ByName)
    own: Callable[..., Any] | None = None
    around: tuple[Callable[..., Any], ...] = ()

    def selection(self) -> Selection:
        """Return the splices that are on in this context."""
        key = off_key()
        if not key:
            return self.everything if self.trial is None else self.all_on()
        found: Selection | None = getattr(self.selections, key, None)
        return found or self.without(off_now())

    def all_on(self) -> Selection:
        """Return the selection of all splices, as this thread sees them."""
        if self.trial is not None and self.trial[0] == threading.get_ident():
            return self.trial[1]
        return self.everything

    def without(self, off: Off) -> Selection:
        """Return the splices that are on where these are off."""
        every = self.all_on()
        names = [name for name in every.names if (id(self), name) not in off.pairs]
        on = [self.operations[name] for name in names if name in self.operations]
        made = every if len(on) == len(every.names) else Selection(on)
        setattr(self.selections, off.key, made)
        return made

    def refresh(self) -> None:
        """Forget all graphs; derive what is on again, after ``operations`` has changed."""
        every = Selection(self.operations.values())
        if self.trial is None:
            self.everything = every
        else:
            self.trial = self.trial[0], every
        self.selections = _ByName()

    def try_out(self) -> None:
        """Show what is spliced in from now on to this thread alone."""
        if self.trial is None:
            self.trial = threading.get_ident(), self.everything

    def end_trial(self) -> None:
        """Show every thread what is spliced in, in one step."""
        if self.trial is not None:
            self.everything, self.trial = self.trial[1], None
            self.selections = _ByName()

    def every_selection(self) -> list[Selection]:
        """Return the selections so far, that of all splices first."""
        others = [s for s in vars(self.selections).values() if s is not self.everything]
        return [self.everything, *others]

    def __getstate__(self) -> dict[str, Any]:
        # Graphs refer to this very module; a copy captures its own.
        left = {"everything": Selection(self.operations.values()), "selections": _ByName()}
        return {**self.__dict__, **left, "trial": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()


def state_of(module: nn.Module) -> HostState | None:
    """Return the state of a host; None for any other module."""
    return vars(module).get(STATE)


def is_host(module: nn.Module) -> bool:
    """Whether something is spliced into this very module."""
    return STATE in vars(module)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the hosts in a model, by path."""
    return {path: m for path, m in model.named_modules() if is_host(m)}


def inserted_children(module: nn.Module) -> set[str]:
    """Return the names of the children that splices have inserted into a host."""
    state = state_of(module)
    operations = () if state is None else state.operations.values()
    return {child for operation in operations for child in operation.children}


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of a host, the class that it had before."""
    if STATE not in vars(module):
        return type(module)
    original: type[nn.Module] = type(module)._surgery_original  # type: ignore[attr-defined]
    return original
