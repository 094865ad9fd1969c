"""Hold which splices of a model are on, and how far: for the model, and for a running context.

    Switches (one for each model)    default: what every thread sees
    a context variable               what one thread or task sees instead

Threads and tasks each have their own answer (``contextvars``), so one may run a model with an
adapter and another without it. A forward that gradient checkpointing runs again in the backward
pass gets the answer that its first run had.

A graph is made for a set of splices, and reads at each call how far they are on: a factor, or the
rows of the batch. Dynamo cannot read a context variable. The answer therefore stands a second time
in a thread-local variable, whose attributes Dynamo guards.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.interop import in_backward, keep, kept
from surgery.rewrite import Picks, Rows

_compiling = torch.compiler.is_dynamo_compiling
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Choice:
    """Which splices of one model are on, and how far.

    Attributes:
        on: the names of those that are on; None means all, also those to come.
        shares: of those that are on in part: the factor of what they change, or the rows of the
            batch that they have.
        key: a text that is the same for all choices with the same graphs; empty if all are on.
    """

    on: frozenset[str] | None = None
    shares: Mapping[str, float | Rows] = field(default_factory=dict)
    key: str = field(init=False)
    _picks: dict[tuple[str, ...], list[Picks]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        routed = {name for name, share in self.shares.items() if isinstance(share, Rows)}
        kinds = {"on": self.on, "scaled": self.shares.keys() - routed, "routed": routed}
        if routed:
            rows = [
                " and ".join(name for name, _ in row) for row in self._rows(sorted(self.on or ()))
            ]
            kinds["in one row"] = {row for row in rows if " and " in row}
        texts = [f"{kind} {', '.join(sorted(n))}" for kind, n in kinds.items() if n is not None]
        object.__setattr__(self, "key", "; ".join(texts) if self.on is not None else "")

    def has(self, name: str) -> bool:
        """Whether this splice is on, wholly or in part."""
        return self.on is None or name in self.on

    @property
    def routed(self) -> bool:
        """Whether rows of a batch differ in what is on."""
        return any(isinstance(share, Rows) for share in self.shares.values())

    def picks(self, names: tuple[str, ...]) -> list[Picks]:
        """Return for each row the first of these splices that it has, then the second, ..."""
        if names not in self._picks:
            self._picks[names] = self._slots(self._rows(names))
        return self._picks[names]

    def _rows(self, names: Iterable[str]) -> list[list[tuple[str, float]]]:
        """Return for each entry of the route those of these splices that it has, with factors."""
        routes = [share for share in self.shares.values() if isinstance(share, Rows)]
        of = routes[0].of if routes else 1
        had: list[list[tuple[str, float]]] = [[] for _ in range(of)]
        for name in filter(self.has, names):
            share = self.shares.get(name, 1.0)
            if not isinstance(share, Rows):
                share = Rows(tuple(range(of)), of, (share,) * of)
            for i, factor in zip(share.entries, share.factors or (1.0,) * of, strict=False):
                had[i].append((name, factor))
        return had

    @staticmethod
    def _slots(rows: list[list[tuple[str, float]]]) -> list[Picks]:
        made = []
        for slot in range(max(map(len, rows))):
            entries = [(i, *row[slot]) for i, row in enumerate(rows) if len(row) > slot]
            at, which, factors = zip(*entries, strict=True)
            plain = all(factor == 1 for factor in factors)
            made.append(Picks(at, len(rows), () if plain else factors, names=which))
        return made


ALL_ON = Choice()


class Switches:
    """What is on in one model; its hosts share this object.

    Attributes:
        token: by which contexts know the model; a copy of the model has another.
        names: the splices of the model.
        default: what holds where a context has chosen nothing for this model.
        always: splices that are on whatever is chosen, such as those that only watch.
    """

    def __init__(self, names: frozenset[str] = frozenset(), default: Choice = ALL_ON) -> None:
        self.token = f"model {next(_numbers)}"
        self.names = names
        self.default = default
        self.always: frozenset[str] = frozenset()

    def __reduce__(self) -> Any:
        return Switches, (self.names, self.default)

    def now(self) -> Choice:
        """Return what is on in this context, or was in the forward that is being repeated."""
        choice = self._chosen()
        if not self.always or choice.on is None:
            return choice
        return dataclasses.replace(choice, on=choice.on | self.always)

    def _chosen(self) -> Choice:
        if _compiling():
            return _of(_mirror.choices, self)
        choices = _context.get()
        choice = _of(choices, self) if choices else self.default
        if in_backward():
            return kept(self.token, choice) or ALL_ON
        if choice is not ALL_ON:
            keep(self.token, choice)
        return choice


Choices = Mapping[str, Choice]  # by the token of the model
EVERY = "every model"
_NONE: Choices = {}
_context: ContextVar[Choices] = ContextVar("surgery_active", default=_NONE)


class _Mirror(threading.local):
    def __init__(self) -> None:
        self.choices: Choices = _NONE


_mirror = _Mirror()


def _of(choices: Choices, switches: Switches) -> Choice:
    """Return the choice for one model."""
    return choices.get(switches.token) or choices.get(EVERY) or switches.default


@contextmanager
def chosen(choice: Choice, switches: Switches | None) -> Iterator[None]:
    """Let a choice hold for the running thread or task, inside the ``with`` block.

    Args:
        switches: those of the model; None means every model that runs inside.
    """
    before = _context.get()  # of this task; the mirror may be another's, of the same thread
    own = {EVERY: choice} if switches is None else {**before, switches.token: choice}
    try:
        try:
            _context.set(own)
            _mirror.choices = own
            yield
        finally:
            _context.set(before)
            _mirror.choices = before
    finally:  # once more: an exception may have come in the lines above
        _context.set(before)
        _mirror.choices = before
