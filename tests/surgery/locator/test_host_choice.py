"""Hosts of sites: the smallest modules that hold them whole, and hosts that overlap."""

from __future__ import annotations

import itertools
import operator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import fx, nn

from surgery.locator.host_choice import groups_of
from surgery.patterns import Match


def match(key: str, *owners: str) -> Match:
    """A match whose nodes were run by these modules."""
    graph = fx.Graph()
    nodes = [graph.call_function(operator.add, (1, 2)) for _ in owners]
    for node, owner in zip(nodes, owners, strict=True):
        node.meta["owner"] = owner
    return Match("ffn", key, nodes[0], {}, nodes)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_no_site_is_lost_where_three_hosts_are_nested(order: tuple[int, ...]) -> None:
    model = nn.Module()
    for path in ("a", "a.b", "a.b.c", "a.b.c.d", "a.x"):
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, nn.Module())
    calls: Any = {path: None for path, _ in model.named_modules()}
    matches = [
        match("outer", "a.b", "a.x"),
        match("middle", "a.b", "a.b.c"),
        match("inner", "a.b.c"),
    ]
    observation: Any = SimpleNamespace(calls=calls)
    groups = groups_of([matches[i] for i in order], observation, model)
    found = [each.key for group in groups for each in group.matches]
    assert sorted(found) == ["inner", "middle", "outer"]
