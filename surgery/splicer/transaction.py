"""A splice under way: what it has done so far, until it is entered into the model's record.

``splice`` changes a model step by step, since a method is verified by running it. Other threads see
the steps when ``commit`` has ended. If a step fails, ``atomically`` puts back what the model was.

    change -> change -> verify -> commit
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.host import HostState
from surgery.interop import encoder_fastpath, huggingface, keep_unpacked
from surgery.plugin import Method, OpenSite, Site, opened, referred, settle_advance
from surgery.splicer.record import Inserted, Report, record_of, reports, tell_of_calls


@dataclass
class Transaction:
    """A splice under way.

    Attributes:
        model, report: the model, and the report that grows with each host.
        todo: the methods and their sites, by the path of the host.
        trunk: whether the model has a trunk, in one run of which methods with ``together`` can be
            verified.
        chosen: the sites that each method edits, by its id.
        shared: modules that all sites of a method share, by the method's id and by name.
        closed: encoders whose nested-tensor path this splice has switched off.
        hosts: the state of each host so far.
        base_parts: modules and parameters that the model had before any splice, by id. They are
            held here: offloading replaces parameters, and a freed id would be given to another.
    """

    model: nn.Module
    report: Report
    todo: dict[str, list[tuple[Method, Site]]]
    trunk: bool
    chosen: dict[int, list[Site]] = field(init=False, repr=False)
    shared: dict[int, dict[str, nn.Module]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    hosts: list[HostState] = field(default_factory=list)
    base_parts: dict[int, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.chosen = {}
        for method, site in (pair for pairs in self.todo.values() for pair in pairs):
            self.chosen.setdefault(id(method), []).append(site)
        earlier = [i.path for report in reports(self.model).values() for i in report.inserted]
        modules = [self.model.get_submodule(path) for path in earlier]
        theirs = {id(x) for m in modules for x in (*m.modules(), *m.parameters())}
        every = (*self.model.modules(), *self.model.parameters())
        self.base_parts = {id(x): x for x in every if id(x) not in theirs}

    def opened(self, method: Method, site: Site) -> OpenSite:
        """Return a site as ``method.splice`` is given it."""
        shared = self.shared.setdefault(id(method), {})
        return opened(site, self.model, self.chosen[id(method)], shared, self.base_parts)

    def close_fused_path(self, host: str) -> None:
        """Keep PyTorch's fused encoder path from bypassing a host."""
        self.closed |= encoder_fastpath.close(self.model, host)

    def try_out(self, state: HostState) -> None:
        """Show what is inserted into a host to this thread alone, until the commit."""
        state.try_out()
        self.hosts.append(state)

    def commit(self) -> Report:
        """Enter the report into the model's record."""
        for state in self.hosts:
            state.end_trial()
        record = record_of(self.model)
        record.reports[self.report.name] = self.report
        record.settle()
        record.closed |= self.closed
        settle_advance(self.model)
        tell_of_calls(self.model)
        huggingface.let_train(self.model, adapted=True)
        keep_unpacked(self.model, adapted=True)
        return self.report

    def waits(self, inserted: Inserted) -> bool:
        """Whether a module is verified with the others, in one run of the trunk."""
        return inserted.method.together and self.trunk

    def referred(self, inserted: list[Inserted]) -> list[nn.Parameter]:
        """Parameters that modules use without owning them, except those of the base."""
        modules = [m for i in inserted for m in referred(self.model.get_submodule(i.path))]
        found = {id(p): p for m in modules for p in m.parameters()}
        return [p for key, p in found.items() if key not in self.base_parts]
