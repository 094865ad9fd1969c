"""Match sites: attention, FFN and projections, each with the host that holds it whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.locator.call_sites import common
from surgery.locator.observation import Call, Observation
from surgery.patterns import (
    Match,
    PortNode,
    bias_of,
    causal,
    op_name,
    origin,
    stretch,
    value,
    weight_of,
)
from surgery.plugin import HostPlan, Port, Site


@dataclass
class Group:
    """Sites that share a host."""

    path: str
    matches: list[Match] = field(default_factory=list)

    def through(self) -> frozenset[str]:
        """The modules strictly below the host that own a part of a site, and those above them."""
        paths = set()
        for owner in {owner for p in self.matches for owner in _owners(p)}:
            while owner != self.path:
                paths.add(owner)
                owner = owner.rpartition(".")[0]
        return frozenset(paths)


def _owners(match: Match) -> set[str]:
    return {str(node.meta["owner"]) for node in match.nodes}


def groups_of(matches: list[Match], observation: Observation, model: nn.Module) -> list[Group]:
    """Hosts for all sites; two that overlap become one."""
    groups: dict[str, Group] = {}
    for match in matches:
        path = common([*_owners(match)])
        # Not a container that is never called itself, nor one that would call what is inserted.
        while path not in observation.calls or isinstance(model.get_submodule(path), nn.Sequential):
            path = path.rpartition(".")[0]
        groups.setdefault(path, Group(path)).matches.append(match)
    merged = True
    while merged:
        merged = False
        for outer in list(groups.values()):
            for inner in list(groups.values()):
                if inner is not outer and inner.path in outer.through():
                    outer.matches += groups.pop(inner.path).matches
                    merged = True
    return list(groups.values())


def _below(path: str, host: str) -> str:
    """``path`` relative to ``host``; ordinals such as ``#1`` stay."""
    return path.removeprefix(host).removeprefix(".") if host else path


def pattern_site(match: Match, group: Group, call: Call, model: nn.Module) -> Site:
    through = frozenset(_below(p, group.path) for p in group.through())
    plan = HostPlan(group.path, through, call.args, call.kwargs)
    ports = match.ports
    tensor = value(ports["output"].node)
    anchor = _weight(match, model)
    options: dict[str, Any] = {}
    if match.kind == "attention":
        heads = value(ports["query_heads"].node)
        options = {
            "heads": match.heads,
            "kv_heads": match.kv_heads,
            "head_width": heads.shape[-1],
            "value_width": value(ports["value_heads"].node).shape[-1],
            "scale": match.scale if match.scale is not None else heads.shape[-1] ** -0.5,
            "softcap": match.softcap,
            "window": match.window,
            "stretch": stretch(value(ports["query_unrotated"].node), heads),
            "cross": _is_cross(match),
            "causal": _is_causal(match),
        }
    site = Site(
        path=group.path,
        key=_below(match.key, group.path),
        kind=match.kind,  # type: ignore[arg-type]
        width=tensor.shape[-1],
        dtype=anchor.dtype,
        device=tensor.device,  # of its weights only while it runs, where they are offloaded
        host=plan,
        norm=_norm(match, model),
        **options,
    )
    for name, port in ports.items():
        site.ports[name] = _port(name, port, model)
    site.missing.update(match.missing)
    if match.kind == "attention" and "lse" not in site.missing:
        site.ports["lse"] = Port("lse", 1, None)
    return site


def _port(name: str, port: PortNode, model: nn.Module) -> Port:
    made = port.projection
    if made is None:
        return Port(name, port.width, None)
    bias = bias_of(made, model)
    if isinstance(bias, fx.Node):
        bias = str(bias.target) if bias.op == "get_attr" else ""
    columns = None if port.features is None else tuple(port.features)
    weight, transposed = weight_of(made, model)
    return Port(name, port.width, made.in_width, weight, bias or "", transposed, columns)


def _weight(match: Match, model: nn.Module) -> Tensor:
    """A parameter of the site: what is inserted follows its dtype and device."""
    for port in match.ports.values():
        if port.projection is not None and port.projection.module:
            module = model.get_submodule(port.projection.module)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return parameter
    out: Tensor = value(match.ports["output"].node)
    return out


def _norm(match: Match, model: nn.Module) -> str:
    """The norm that makes a site's input, unless the residual stream goes through it too."""
    if "input" not in match.ports:
        return ""
    node = origin(match.ports["input"].node)
    if node.op != "call_module" or any(op_name(user) in ("add", "iadd") for user in node.users):
        return ""
    own = [p.dim() for p in model.get_submodule(str(node.target)).parameters()]
    return str(node.target) if own and max(own) == 1 else ""


def _is_cross(match: Match) -> bool:
    made = [match.ports[n].projection for n in ("query", "key") if n in match.ports]
    if len(made) < 2 or made[0] is None or made[1] is None:
        return False
    return made[0].source is not made[1].source and (
        value(made[0].source).shape[-2] != value(made[1].source).shape[-2]
        or not _related(made[0].source, made[1].source)
    )


def _related(a: fx.Node, b: fx.Node) -> bool:
    return bool(set(a.all_input_nodes) & set(b.all_input_nodes)) or a in b.all_input_nodes


def _is_causal(match: Match) -> bool:
    core, ports = match.core, match.ports
    if "weights" in ports:
        return causal(value(ports["weights"].node))
    if "mask" in ports:
        mask: Tensor = value(ports["mask"].node)
        return causal(mask if mask.dtype == torch.bool else (mask > -1e4).to(torch.int8))
    flags = dict(core.kwargs)
    if op_name(core) == "scaled_dot_product_attention":
        positional = core.args[5] if len(core.args) > 5 else False
        return bool(flags.get("is_causal", positional))
    flag = flags.get("is_causal")
    return bool(getattr(core.meta.get("module"), "is_causal", True) if flag is None else flag)
