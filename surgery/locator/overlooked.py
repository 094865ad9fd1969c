"""Name what no site reaches, so that nothing is overlooked in silence.

a projection in the host of an attention or FFN that makes none of its ports: a gate, a table of
relative positions; most are linear sites of their own
a module with parameters that the example did not run: the vision tower of a text-only example
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from surgery.interop import base_children
from surgery.locator.call_sites import with_ancestors
from surgery.locator.run_record import Observation
from surgery.patterns import Match, innermost, projections
from surgery.plugin import Site


def overlooked(
    model: nn.Module, observation: Observation, matches: list[Match], sites: list[Site]
) -> list[str]:
    """Return a line for each projection and each module that no site reaches."""
    return [*_projections(model, observation, matches, sites), *_not_run(model, observation)]


def _projections(
    model: nn.Module, observation: Observation, matches: list[Match], sites: list[Site]
) -> list[str]:
    """Return a line for each projection inside a host that makes no port of the host's sites."""
    known = {p.projection.node for m in matches for p in m.ports.values() if p.projection}
    names = {n for s in sites for p in s.ports.values() for n in (p.weight, p.bias) if n}
    owners = {n.rpartition(".")[0] for n in names}
    order = {path: i for i, path in reversed([*enumerate(s.path for s in sites)])}
    found: dict[str, str] = {}
    experts: dict[str, str] = {}
    for proj in projections(observation.graph, model):
        path = proj.module or str(proj.node.meta["owner"])
        within = [p for p in with_ancestors(path) if p in order]
        host = min(within, key=order.__getitem__, default=None)
        again = proj.module and proj.module in owners
        if host is not None and proj.node not in known and not again:
            if expert := innermost(path, observation.experts):
                experts[path] = expert.rpartition(".")[0]
                continue
            kind = "a linear site" if proj.module else "computed by the forward itself"
            at, inside = (each or "(root)" for each in (path, host))
            found[path] = f"{at}: a projection that makes no port of {inside}; {kind}"
    for at, number in Counter(experts.values()).items():
        found[at] = f"{at}: {number} projections of experts that make no port; linear sites"
    return list(found.values())


def _not_run(model: nn.Module, observation: Observation) -> list[str]:
    """Return a line for each largest module with parameters of which the example used none."""
    read = {str(node.target) for node in observation.graph.nodes if node.op == "get_attr"}
    run = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in read}
    for path in observation.calls:
        run |= {id(p) for p in model.get_submodule(path).parameters(recurse=False)}
    return [
        f"{path}: the example does not run it ({size:,} parameters)"
        for path, size in _unused("", model, run)
    ]


def _base_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the parameters of a module without those that splices have inserted."""
    yield from module.parameters(recurse=False)
    for child in base_children(module).values():
        yield from _base_parameters(child)


def _unused(path: str, module: nn.Module, run: set[int]) -> Iterable[tuple[str, int]]:
    """Yield the largest modules, from ``module`` down, none of whose parameters is in ``run``."""
    own = {id(p): p.numel() for p in _base_parameters(module)}
    if path and own and run.isdisjoint(own):
        yield path, sum(own.values())
        return
    for name, child in base_children(module).items():
        yield from _unused(f"{path}.{name}" if path else name, child, run)
