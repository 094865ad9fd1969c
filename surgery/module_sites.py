"""Module sites: places that are one childless module each, found by what it is called with.

    norm         its parameters are vectors as wide as what it reads        ports: input, output
    position     it reads the positions 0, 1, 2, ... of the tokens           port: positions
    embedding    it reads the token ids that the model was called with      ports: ids, output

and two whose call is the port: the trunk and the stack, see :func:`call_sites`. They are offered
only to methods that name their kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.dataflow import value
from surgery.observe import Call, Observation
from surgery.pattern import Pattern, PortNode
from surgery.sites import HostPlan, Kind, Port, Site
from surgery.values import by_name, leaves


def module_sites(model: nn.Module, observation: Observation, ids: list[Tensor]) -> list[Site]:
    """Every module that is a site of its own; ``ids`` are the whole numbers given to the model."""
    found = []
    for path, module in model.named_modules():
        call = observation.calls.get(path)
        if call is not None and path and not any(True for _ in module.children()):
            kind = _kind(module, call, ids)
            if kind:
                found.append(_site(kind, path, module, call))
    return found


def _site(kind: Kind, path: str, module: nn.Module, call: Call) -> Site:
    own = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    width = own.shape[-1] if own.dim() else 0
    site = Site(path, "", kind, width, dtype=own.dtype, device=own.device, host=plan)
    names = {"norm": ("input", "output"), "embedding": ("ids", "output")}
    for name in names.get(kind, ("positions",)):
        bias = f"{path}.bias" if name == "output" and _has_bias(module) else ""
        site.ports[name] = Port(name, width, None, site, bias=bias)
    return site


def call_sites(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """The trunk and the stack of a model, if it embeds tokens at one place.

    Theirs are the calls by which a sequence can be made longer on the way in, and cut on the way
    out.
    """
    embeddings = [site.path for site in others if site.kind == "embedding"]
    attention = [site.path for site in sites if site.kind == "attention"]
    if len(embeddings) != 1 or not attention:
        return []

    def called(path: str) -> str:
        while path not in observation.calls:
            path = path.rpartition(".")[0]
        return path

    trunk = called(common([*attention, *embeddings]))
    below = common(attention).removeprefix(trunk).removeprefix(".").split(".")[0]
    stack = f"{trunk}.{below}" if trunk else below
    whole = below and stack in observation.calls and not embeddings[0].startswith(f"{stack}.")
    paths = {"stack": stack if whole else trunk, "trunk": trunk}  # of one module the inner first
    embedding = next(site for site in others if site.kind == "embedding")
    return [_call_site(kind, path, embedding, model, observation) for kind, path in paths.items()]


def _call_site(
    kind: str, path: str, embedding: Site, model: nn.Module, observation: Observation
) -> Site:
    call, module = observation.calls[path], model.get_submodule(path)
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    named = by_name(type(module).forward, module, call.args, call.kwargs)
    assert embedding.host is not None
    tokens = [x for x in leaves((embedding.host.args, embedding.host.kwargs)) if _whole(x)]
    ids = next((n for n, x in named.items() if _whole(x) and _same(x, tokens[0])), "")
    site = Site(
        path, kind, kind, embedding.width, dtype=embedding.dtype, device=embedding.device,  # type: ignore[arg-type]
        host=plan, ids=ids, call=named,
    )  # fmt: skip
    site.ports["call"] = Port("call", embedding.width, None, site)
    return site


def common(paths: list[str]) -> str:
    """The longest module path that all paths lie at or below."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _has_bias(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return isinstance(bias, nn.Parameter) and bias.dim() == 1


def _kind(module: nn.Module, call: Call, ids: list[Tensor]) -> Kind | None:
    given = [x for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    own = list(module.parameters())
    widths = {p.numel() for p in own}
    if own and all(p.dim() == 1 for p in own) and len(widths) == 1:
        reads = next((x for x in given if x.is_floating_point() and x.dim() > 1), None)
        return "norm" if reads is not None and reads.shape[-1] in widths else None
    for x in filter(_whole, given):
        if x.shape[-1] < 2:
            continue
        if any(_same(x, each) for each in ids):
            return "embedding" if own else None
        if not x.is_meta and bool((x[..., 1:] - x[..., :-1] == 1).all()):
            return "position"
    return None


def _whole(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and x.dim() > 0


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or bool((a == b).all()))


def module_pattern(graph: fx.Graph) -> list[Pattern]:
    """The ports of a host that is such a module."""
    nodes = list(graph.nodes)
    floats = [n for n in nodes if n.op == "placeholder" and _tensor(n) is True]
    whole = [n for n in nodes if n.op == "placeholder" and _tensor(n) is False]
    ports: dict[str, PortNode] = {}
    if whole:
        ports["positions"] = ports["ids"] = PortNode(whole[0])
    elif floats:
        ports["input"] = PortNode(floats[0])
    made: Any = nodes[-1].args[0]
    if isinstance(made, fx.Node) and isinstance(value(made), Tensor):
        ports["output"] = PortNode(made)
    return [Pattern("module", "", nodes[-1], ports, nodes)] if ports else []


def _tensor(node: fx.Node) -> bool | None:
    """Is it a tensor of floating-point numbers (True), of whole ones (False), or none (None)?"""
    held = value(node)
    return held.is_floating_point() if isinstance(held, Tensor) and held.dim() else None
