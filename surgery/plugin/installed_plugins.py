"""Say which plugins are installed, from which package, what they offer, and whether they loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points

from surgery.plugin.plugin_errors import GROUP
from surgery.plugin.registry import in_order, registry


@dataclass(frozen=True)
class Installed:
    """One plugin.

    Attributes:
        name: the name of its entry point.
        module: the module that it names.
        package, version: the distribution that it comes from.
        offers: the methods and tasks that it offers, and the other hooks that it implements.
        problem: why it is not there; empty if it is.
    """

    name: str
    module: str
    package: str
    version: str
    offers: tuple[str, ...]
    problem: str


def installed() -> list[Installed]:
    """Return the installed plugins, this package's own first."""
    known = registry()
    found = []
    for point in dict.fromkeys(in_order(entry_points(group=GROUP))):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
        problem = known.failures.get(point.name, "")
        offers = () if problem else known.offers_of(point.name)
        found.append(Installed(point.name, point.value, package, version, offers, problem))
    return found
