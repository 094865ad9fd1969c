"""Report: what a splice inserted where, kept on the model as the record of the operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.plugin import Edit, Method, Site, Sites

RECORD = "_surgery_record"


@dataclass(frozen=True)
class Inserted:
    """One inserted module: where, by which method, and under which path in the model."""

    site: Site
    method: Method
    edit: Edit
    path: str
    parameters: int


@dataclass
class Report:
    """What ``surgery.splice`` did. Print it.

    Attributes:
        name: of the splice.  methods: in the order in which they were applied.
        inserted: every inserted module.
        change: for each host, the largest change of an output that was measured: 0.0 means that
            every bit is as before, None that there were no values to measure (``meta`` device).
        left_out: which method was left out at which sites, for want of a port.
        merged: has a part of it been folded into the base?
        order: the identities of the sites, as they were chosen.
    """

    name: str
    methods: tuple[Method, ...]
    inserted: list[Inserted] = field(default_factory=list)
    change: dict[str, float | None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    merged: bool = False
    order: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def start(self) -> str:
        """The start state, as declared: ``exact`` only if every method's is."""
        declared = [method.start for method in self.methods]
        return next((s for s in ("none", "gated") if s in declared), "exact")

    @property
    def sites(self) -> Sites:
        """The sites that something was inserted at, in the order in which they were chosen."""
        found = {i.site.identity: i.site for i in self.inserted}
        ordered = [found.pop(identity) for identity in self.order if identity in found]
        return Sites([*ordered, *found.values()], self.name)

    def __repr__(self) -> str:
        total = sum(i.parameters for i in self.inserted)
        measured = [c for c in self.change.values() if c is not None]
        if not measured:
            state = "not measured"
        else:
            state = (
                "outputs unchanged"
                if max(measured) == 0
                else f"outputs moved by up to {max(measured):.2g}"
            )
        lines = [
            f"spliced {self.name!r}: {len(self.inserted)} modules at {len(self.sites)} sites, "
            f"{total:,} parameters; start {self.start}, {state}"
        ]
        width = max((len(i.path) for i in self.inserted), default=0)
        for i in self.inserted:
            reads = f" reading {', '.join(i.edit.reads)}" if i.edit.reads else ""
            lines.append(
                f"  {i.path:<{width}}  {i.parameters:>9,}  {i.edit.verb} at {i.edit.port}{reads}"
            )
        if self.left_out:
            lines.append(f"  left out, for want of a port: {', '.join(self.left_out)}")
        return "\n".join(lines)


def records(model: nn.Module) -> dict[str, Report]:
    """The splices of a model, by name, in order."""
    found: dict[str, Report] = vars(model).get(RECORD, {})
    return found


ROWS = "_surgery_rows"


def forget_rows(model: nn.Module) -> None:
    """Let gradients reach whole parameters again."""
    hooks: dict[str, Any] = vars(model).pop(ROWS, {})
    for hook in hooks.values():
        hook.handle.remove()
