"""What a splice did to a host, and several splices that run as one edit under a route.

    splices in order    a   b   c   d          a, b, d: modules of one class, which run grouped
    on by the route     a   b                  c: off, or the run ends there
    steps of a graph    [a b d]                one edit for each port, whatever the route is

A run of such splices makes one graph for all routes: the edit asks at each call which rows have
which of them. A row that has several of a run gets them one after the other, in as many slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from surgery.host.active_set import Choice, Switches
from surgery.plugin import Edit
from surgery.rewrite import Partly, Picks

Step = tuple[Edit, str, Partly | None]  # an edit, the child that it inserts, how far it counts


@dataclass
class Operation:
    """What one splice did to one host: its edits, and the child that each of them inserts."""

    name: str
    edits: list[Edit]
    children: list[str]

    @property
    def grouped(self) -> type | None:
        """The class of all its modules, if modules of that class can run as one."""
        kinds = {edit.grouped for edit in self.edits}
        return kinds.pop() if len(kinds) == 1 else None


def runs(operations: Iterable[Operation], choice: Choice) -> list[list[Operation]]:
    """Return what is on, in order; splices that run as one under this route share a list."""
    found: list[list[Operation]] = []
    last: type | None = None  # the class of the run that goes on
    for each in operations:
        kind = each.grouped if choice.routed else None
        if kind is not None and kind is last:
            found[-1].append(each)
        elif kind is not None or choice.has(each.name):
            found.append([each])
            last = kind
    return [run for run in found if any(choice.has(each.name) for each in run)]


class Run:
    """Splices that are one edit for each port.

    Attributes:
        operations: the splices.
        slots: how many of them one row has at most.
    """

    def __init__(self, operations: list[Operation], choice: Choice) -> None:
        self.operations = operations
        self.names = tuple(each.name for each in operations)
        self.slots = len(choice.picks(self.names))

    def steps(self, switches: Switches) -> Iterator[Step]:
        """Yield the edits, those of the first slot first."""
        ports: dict[Any, dict[str, str]] = {}
        edits: dict[Any, Edit] = {}
        for operation in self.operations:
            seen = Counter[Any]()  # a list of methods may edit a port twice
            for edit, child in zip(operation.edits, operation.children, strict=True):
                port = edit.kind, edit.site, edit.port, edit.verb, edit.reads, edit.grouped
                key = port, seen[port]
                seen[port] += 1
                ports.setdefault(key, {})[operation.name] = child
                edits.setdefault(key, edit)
        for slot in range(self.slots):
            for key, children in ports.items():
                share = _share(switches, tuple(children), slot)
                yield edits[key], next(iter(children.values())), Partly(True, share, children)


def _share(switches: Switches, names: tuple[str, ...], slot: int) -> Any:
    def share() -> Picks:
        picks = switches.now().picks(names)
        return picks[slot] if slot < len(picks) else Picks((), 1)

    return share
