"""The method behind a direct edit: one verb at one port of each site.

    insert, replace, read, watch  ->  PortEdit  ->  surgery.splice

It takes the way of every method, so a direct edit is all or nothing, and is switched, removed and
compiled as any splice is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.direct.port_modules import Around, AtPort, Changing, Constant, Reading
from surgery.errors import PortError, SiteError, SpliceError, shown
from surgery.plugin import Method, OpenPort, OpenSite, Port, Site, Sites, Start
from surgery.splicer import Report, splice

HEADS = ("query_unrotated", "query_heads", "lse", "merged")  # read as they are, and put back


@dataclass(frozen=True, eq=False)
class PortEdit(Method):
    """Apply one verb at ports of sites.

    Attributes:
        verb: insert, replace, read or watch; the name of the method, too.
        what: for each site and port, by identity and name, what is inserted there.
        reads: what replace reads; by default see :func:`reads_of`.
    """

    learns = False
    unsaved = "it holds modules or functions of yours, and a file holds tensors and numbers alone"

    verb: str = "insert"
    what: dict[tuple[Any, str], Any] = field(default_factory=dict)
    reads: tuple[str, ...] | None = None
    made: list[AtPort] = field(default_factory=list)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The verb."""
        return self.verb

    @property
    def start(self) -> Start:
        return "none" if self.verb in ("insert", "replace") else "exact"

    def options(self) -> dict[str, Any]:
        return {"verb": self.verb}

    def suits(self, site: Site) -> bool:
        return any(identity == site.identity for identity, _ in self.what)

    def check(self, sites: list[Site]) -> None:
        for identity, name in self.what:
            for site in sites:
                if site.identity == identity:
                    port = site.port(name)
                    if self.verb == "replace" and self.reads is None:
                        reads_of(site, port)

    def splice(self, site: OpenSite) -> None:
        for (identity, name), what in self.what.items():
            if identity == site.identity:
                self._edit(site, site.port(name), what)

    def _edit(self, site: OpenSite, port: OpenPort, what: Any) -> None:
        where = f"{self.verb} at port {port.name!r} of {site.path or 'the model'}"
        if port.name == "lse" and self.start == "none":
            raise PortError(f"{where}: 'lse' can only be read. Edit another port.")
        tried = isinstance(what, nn.Module) and self.start == "none"
        if isinstance(what, Tensor):
            what = Constant(what, where)
        elif isinstance(what, nn.Module):
            what = site.share(str(id(what)), lambda: what)
        reads = self._reads(site, port, what)
        if self.verb == "read" or (self.verb == "watch" and reads):
            made: AtPort = Reading(what, where, tried)
        else:
            made = Changing(what, where, tried, any(read in HEADS for read in reads))
        self.made.append(made)
        if port.name == "call":
            around = Around(made, whole=self.verb == "replace" and not isinstance(what, Constant))
            port.wrap(around, name="at")
        elif not reads:
            port.insert(made, name="at")
        else:  # the lse can only be read: what reads it stands at another port, which it passes on
            carrier = port if port.name != "lse" else site.port("output")
            carrier.replace(made, name="at", reads=(carrier.name, *reads))

    def _reads(self, site: Site, port: Port, what: Any) -> tuple[str, ...]:
        """Return the ports that ``what`` is called with; empty for the value of its own port."""
        if self.verb in ("read", "watch"):
            return ("lse",) if port.name == "lse" else ()
        if self.verb == "insert" or isinstance(what, Constant):
            return ()
        return reads_of(site, port) if self.reads is None else self.reads


def reads_of(site: Site, port: Port) -> tuple[str, ...]:
    """Return what a module reads that replaces a port: what the part that it replaces reads.

    Raises:
        PortError: no projection makes the port.
    """
    if port.name == "call":
        return ()
    if port.name == "output" and "input" in site.ports:
        return ("input",)
    if port.in_width is None:
        raise PortError(
            f"replace at port {port.name!r} of {site.path or 'the model'}: no projection makes it, "
            f"so nothing says what the new value is made of. Pass reads=, such as "
            f"reads=({port.name!r},)."
        )
    return (f"{port.name}.source",)


def chosen_sites(sites: Sites | Site | Sequence[Site]) -> list[Site]:
    """Return the given sites as a list.

    Raises:
        SiteError: there is none.
    """
    found = [sites] if isinstance(sites, Site) else list(sites)
    if not found:
        raise SiteError(
            "there is no site in what was given. Print surgery.locate(model); blocks, norms and "
            "linear layers are in its .block, .norm and .linear."
        )
    return found


def one_for_each(verb: str, sites: list[Site], port: str, what: Any) -> dict[Any, Any]:
    """Return what is inserted at each site, by identity and port.

    Raises:
        SpliceError: a list has another length than the sites, or holds something that is neither
            a module nor a function.
    """
    each: list[Any] = list(what) if isinstance(what, (list, tuple)) else [what] * len(sites)
    if len(each) != len(sites):
        raise SpliceError(
            f"{verb}: a list of {len(each)} was given for {len(sites)} sites. Give one for each "
            "site, or one for all."
        )
    for item in each:
        if not callable(item) and not (verb == "replace" and isinstance(item, Tensor)):
            what_else = ", a function or a tensor" if verb == "replace" else " or a function"
            raise SpliceError(
                f"{verb}: {shown(item)} is not possible. Pass an nn.Module{what_else}."
            )
    return {(s.identity, port): item for s, item in zip(sites, each, strict=True)}


def apply(model: nn.Module, sites: list[Site], edit: PortEdit, name: str) -> Report:
    """Splice a direct edit; note that a change which no trial runs was not measured."""
    report: Report = splice(model, edit, at=sites, name=name)
    if edit.start == "none" and not all(made.tried for made in edit.made):
        report.change.update(dict.fromkeys(report.change))
    return report


Changer = nn.Module | Callable[..., Tensor] | Tensor
