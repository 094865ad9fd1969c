"""The state of a host: its splices, and which of them are on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.errors import SpliceError, suggest
from surgery.host.active_set import Choice, Switches
from surgery.host.operation import Operation, Run, Step, runs
from surgery.host.selection import ByName, Selection
from surgery.rewrite import Partly, Rows

STATE = "_surgery"


KEYS = 1000  # choices whose graphs are known


@dataclass
class HostState:
    """What a host needs beside the module itself.

    Attributes:
        path, through: where the host is, and the modules that its graphs trace through.
        operations: the splices in this host, by name.
        weights: by kind and key of each site, the modules and parameters that it ran with when it
            was spliced; a graph that runs with them and lacks the site is refused.
        everything: the selection of all splices, of which :meth:`all_on` tells those of a thread.
        switches: which splices are on, for all hosts of the model.
        trial: a thread and the selection that it alone sees, while it verifies a new splice.
        selections: the others, by the key of what is on (host/active_set.py).
        told: whether the user knows that this host has too many graphs.
        own: a forward that another library has set on the object, in place of the class's.
        around: functions that another library has set on the object around the host's forward, the
            innermost first.
        divide: divides what is inserted, where a tensor-parallel plan came after the splice
            (host/divided_later.py); a copy of the host has none.
        watched: what showed, at the last call that was wrapped, whether there is such a plan.
    """

    path: str
    through: frozenset[str]
    operations: dict[str, Operation] = field(default_factory=dict)
    weights: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    switches: Switches = field(default_factory=Switches)
    everything: Selection = field(default_factory=lambda: Selection(()))
    trial: tuple[int, Selection] | None = None
    selections: Any = field(default_factory=ByName)
    told: bool = False
    own: Callable[..., Any] | None = None
    around: tuple[Callable[..., Any], ...] = ()
    divide: Callable[..., None] | None = None
    watched: tuple[Any, ...] = ()

    def selection(self) -> Selection:
        """Return the splices that are on in this context."""
        choice = self.switches.now()
        if not choice.key:
            return self.everything if self.trial is None else self.all_on()
        found: Selection | None = getattr(self.selections, choice.key, None)
        return found or self.select(choice)

    def all_on(self) -> Selection:
        """Return the selection of all splices, as this thread sees them."""
        if self.trial is not None and self.trial[0] == threading.get_ident():
            return self.trial[1]
        return self.everything

    def select(self, choice: Choice) -> Selection:
        """Return the selection of the splices that are on by this choice."""
        every, unknown = self.all_on(), sorted((choice.on or set()) - self.switches.names)
        if unknown:
            raise SpliceError(
                f"{self.path}: nothing named {unknown[0]!r} is spliced into this model. "
                f"{suggest(unknown[0], self.switches.names)}Splices here: "
                f"{', '.join(sorted(self.switches.names))}."
            )
        on = [self.operations[n] for n in every.names if n in self.operations and choice.has(n)]
        for edit, name in [(e, o.name) for o in on if o.name in choice.shares for e in o.edits]:
            why = edit.why_whole(isinstance(choice.shares[name], Rows))
            if why:
                raise SpliceError(
                    f"{name!r} runs whole or not at all, because of {edit.child!r} at "
                    f"{self.path or 'the model'}: {why}. Switch it with surgery.use instead."
                )
        made = self._made(choice)
        known = [every, *vars(self.selections).values()]
        made = next((selection for selection in known if selection.kind == made.kind), made)
        if len(vars(self.selections)) >= KEYS:
            self.selections = ByName()
            for selection in dict.fromkeys(known[1:]):  # under one of its keys, for its graphs
                setattr(self.selections, f"kept {id(selection)}", selection)
        setattr(self.selections, choice.key, made)
        return made

    def _made(self, choice: Choice) -> Selection:
        """Return a new selection for a choice."""
        there = [self.operations[n] for n in self.all_on().names if n in self.operations]
        on, steps, kind = list[Operation](), list[Step](), list[Any]()
        for run in runs(there, choice):
            on += run
            if len(run) > 1:
                group = Run(run, choice)
                steps += group.steps(self.switches)
                kind.append((group.names, group.slots))
                continue
            (each,) = run
            part = self._partly(each.name, choice) if each.name in choice.shares else None
            steps += [(e, c, part) for e, c in zip(each.edits, each.children, strict=True)]
            kind.append(each.name if part is None else (each.name, part.routed))
        return Selection(on, steps, tuple(kind))

    def _partly(self, name: str, choice: Choice) -> Partly:
        """Return how the edits of a splice count, which is on in part."""
        switches = self.switches

        def share() -> float | Rows:
            now = switches.now()  # another thread may have chosen anew since the forward began
            return now.shares.get(name, float(now.has(name)))

        return Partly(isinstance(choice.shares[name], Rows), share)

    def refresh(self) -> None:
        """Forget all graphs; derive what is on again, after ``operations`` has changed."""
        every = Selection(self.operations.values())
        if self.trial is None:
            self.everything = every
        else:
            self.trial = self.trial[0], every
        self.selections = ByName()

    def try_out(self) -> None:
        """Show what is spliced in from now on to this thread alone."""
        if self.trial is None:
            self.trial = threading.get_ident(), self.everything

    def end_trial(self) -> None:
        """Show every thread what is spliced in, in one step."""
        if self.trial is not None:
            self.everything, self.trial = self.trial[1], None
            self.selections = ByName()

    def every_selection(self) -> list[Selection]:
        """Return the selections so far, that of all splices first."""
        return [*dict.fromkeys([self.everything, *vars(self.selections).values()])]

    def __getstate__(self) -> dict[str, Any]:
        # Graphs refer to this very module; a copy captures its own.
        left = {"everything": Selection(self.operations.values()), "selections": ByName()}
        return {**self.__dict__, **left, "trial": None, "divide": None, "watched": ()}

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
