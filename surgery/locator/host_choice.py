"""Choose the host of each attention and FFN: the smallest module that contains the site whole.

A module is a candidate if every node of the match was run by it or below it. Two hosts overlap if
one traces through the other; they become one, so that one graph holds both sites.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from surgery.locator.call_sites import common_ancestor
from surgery.locator.run_record import Observation
from surgery.patterns import Match


@dataclass
class Group:
    """The matches that share a host.

    Attributes:
        path: the module path of the host.
        matches: the matches whose nodes all lie inside the host.
    """

    path: str
    matches: list[Match] = field(default_factory=list)

    def through(self) -> frozenset[str]:
        """Return the modules on the way from the host to its sites, the host excluded.

        These own a node of a match, or lie between such a module and the host.
        """
        paths = set()
        for owner in {owner for match in self.matches for owner in _owners(match)}:
            while owner != self.path:
                paths.add(owner)
                owner = owner.rpartition(".")[0]
        return frozenset(paths)


def _owners(match: Match) -> set[str]:
    """Return the paths of the modules whose forwards made the nodes of a match."""
    return {str(node.meta["owner"]) for node in match.nodes}


def host_of(match: Match, observation: Observation, model: nn.Module) -> str:
    """Return the path of the smallest module whose forward can be rewritten for a match.

    A ModuleList is never called, so it has no forward to rewrite. A Sequential calls all its
    children, so it would call the inserted ones, too.
    """
    path = common_ancestor([*_owners(match)])
    while path not in observation.calls or isinstance(model.get_submodule(path), nn.Sequential):
        path = path.rpartition(".")[0]
    return path


def groups_of(matches: list[Match], observation: Observation, model: nn.Module) -> list[Group]:
    """Choose a host for every match, and join hosts of which one is on the other's way.

    Two hosts one inside the other would each rewrite a forward that the other traces through.
    """
    groups: dict[str, Group] = {}
    for match in matches:
        path = host_of(match, observation, model)
        groups.setdefault(path, Group(path)).matches.append(match)
    for path in list(groups):
        while path in groups and (inner := _within(groups[path], groups)):
            groups[path].matches += groups.pop(inner).matches
    return list(groups.values())


def _within(outer: Group, groups: dict[str, Group]) -> str | None:
    """Return the path of the first other host that a group traces through."""
    inside = outer.through() & groups.keys()
    return next((path for path in groups if path in inside), None) if inside else None
