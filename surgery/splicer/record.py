"""The record of all operations on a model: the one object that the library keeps on it.

    model._surgery_record = Record
      reports   what each splice inserted, by the splice's name, in order
      kept      base parameters that are trained and saved along (surgery.freeze_base)
      rows      gradient hooks of parameters of which single rows are trained (surgery.train_rows)
      closed    encoders whose nested-tensor path is switched off while something is spliced in
      switches  which splices are on (surgery.use); the hosts share it
      saver     what writes the adapter where ``save_pretrained`` would write the whole model

The record is made by the first operation on the model and goes with the last splice. It is an
ordinary attribute, so ``copy.deepcopy`` and pickle take it along. A host keeps its own state
beside it (surgery/host/state.py), because a host may be called without its model.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.errors import SpliceError, shown
from surgery.host import Choice, Switches
from surgery.interop import tell_calls
from surgery.plugin import TOLD, Edit, Method, Site, Sites, html_table, overlooked_lines

RECORD = "_surgery_record"


@dataclass(frozen=True)
class Inserted:
    """One inserted module.

    Attributes:
        site, method, edit: where the module was inserted, by which method, and how.
        path: the path of the module in the model.
        parameters: how many numbers it trains; those shared with an earlier module count there.
        frozen: its parameters that its author has given ``requires_grad=False``; they stay so.

    Example:
        ``[each.path for each in surgery.summary(model).reports[0].inserted]``
    """

    site: Site
    method: Method
    edit: Edit
    path: str
    parameters: int
    frozen: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The edit in words, such as ``add at query reading query.source``."""
        reads = f" reading {', '.join(self.edit.reads)}" if self.edit.reads else ""
        return f"{self.edit.verb} at {self.edit.port}{reads}"


@dataclass
class Report:
    """The result of ``surgery.splice``. Print it.

    Attributes:
        name: the name of the splice.
        methods: the methods, in the order in which they were applied.
        inserted: every inserted module.
        change: for each host, the largest measured change of an output: 0.0 means that every bit
            is as before, None that there were no values to measure (``meta`` device).
        left_out: what was left out for want of a port: the method and the site, and the port where
            the site has others that the method edits.
        notes: what was chosen instead, where a method found no attention.
        overlooked: what no site of the model reaches, as ``surgery.locate`` names it.
        merged: whether a part has been folded into the base.
        order: the identities of the sites, in the order in which they were chosen.

    Example:
        ``report = surgery.splice(model, "ia3")``; ``surgery.remove(model, report.name)``
    """

    name: str
    methods: tuple[Method, ...]
    inserted: list[Inserted] = field(default_factory=list)
    change: dict[str, float | None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overlooked: list[str] = field(default_factory=list)
    merged: bool = False
    order: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def start(self) -> str:
        """The declared start state: ``exact`` only if every method's is."""
        declared = [method.start for method in self.methods]
        return next((s for s in ("none", "gated") if s in declared), "exact")

    @property
    def sites(self) -> Sites:
        """The sites with an inserted module, in the order in which they were chosen."""
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
        lines += [f"  {i.path:<{width}}  {i.parameters:>9,}  {i.place}" for i in self.inserted]
        if self.left_out:
            lines.append(f"  left out, for want of a port: {', '.join(self.left_out)}")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {line}" for line in overlooked_lines(self.overlooked)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heading, *lines = repr(self).splitlines()
        rows = [(i.path, f"{i.parameters:,}", i.place) for i in self.inserted]
        columns = ("module", "parameters", "edit")
        return html_table(heading, columns, rows, lines[len(rows) :])


def tell_of_calls(model: nn.Module) -> None:
    """Let the modules whose calls tell what inserted modules read of a call note it."""
    every = [i for report in reports(model).values() for i in report.inserted]
    reading = [i.site for i in every if not set(i.edit.reads).isdisjoint(TOLD)]
    tell_calls(model, dict(site.teller for site in reading))


@dataclass
class Record:
    """What the library knows of one model; the module docstring explains each field."""

    reports: dict[str, Report] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    switches: Switches = field(default_factory=Switches)
    saver: Any = None

    def settle(self) -> None:
        """Tell the switches which splices there are now; the newest is on."""
        names, default = frozenset(self.reports), self.switches.default
        if default.on is not None:
            on = (default.on & names) | (names - self.switches.names)
            shares = {name: share for name, share in default.shares.items() if name in on}
            self.switches.default = Choice(on, shares)
        self.switches.names = names


def is_name(name: object) -> bool:
    """Whether a splice may have this name: a part of the names of modules, files and commands."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,100}", name):
        return False
    return unicodedata.normalize("NFKC", name) == name  # as Python reads identifiers


def require_free(model: nn.Module, name: str) -> None:
    """Raise unless a splice may have this name in this model."""
    if not is_name(name):
        raise SpliceError(
            f"name={shown(name)} is no name for a splice: it has letters, digits, - and _ alone, "
            "at most 100."
        )
    if name in reports(model):
        raise SpliceError(
            f"this {type(model).__name__} is already spliced under the name {name!r}. Pass "
            f"another, say name={unused_name(model, name)!r}, or surgery.remove(model, {name!r}) "
            "first."
        )


def unused_name(model: nn.Module, wanted: str) -> str:
    """Return ``wanted``, with a number behind it if a splice has that name."""
    every = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(2)))
    return next(each for each in every if each not in reports(model))


def spliced_model(model: nn.Module) -> nn.Module:
    """Return the model that has a record: this one, or the one that it wraps.

    DDP, FSDP and ``torch.compile`` wrap a model in a module whose child it is. A model without a
    record is returned as it is.
    """
    found: nn.Module | None = model
    while found is not None and RECORD not in vars(found):
        wrapped = getattr(found, "module", None) or getattr(found, "_orig_mod", None)
        found = wrapped if isinstance(wrapped, nn.Module) else None
    return model if found is None else found


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``; attach an empty one if there is none yet."""
    record: Record = vars(model).setdefault(RECORD, Record())
    return record


def look_up(model: nn.Module) -> Record:
    """Return the record of ``model`` for reading; a model without one is left as it is."""
    return vars(model).get(RECORD) or Record()


def drop_record(model: nn.Module) -> None:
    """Detach the record of ``model``."""
    record = vars(model).pop(RECORD, None)
    if record is not None and record.saver is not None:
        record.saver.remove()


def reports(model: nn.Module) -> dict[str, Report]:
    """Return the splices of a model, by name, in order."""
    return look_up(model).reports


def forget_rows(model: nn.Module) -> None:
    """Let gradients reach whole parameters again, where only single rows were trained."""
    hooks = look_up(model).rows
    for hook in hooks.values():
        hook.handle.remove()
    hooks.clear()
