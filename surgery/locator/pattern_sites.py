"""Describe each match of a pattern as a site, with the host that contains all of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.locator.distances import distances
from surgery.locator.host_choice import Group
from surgery.locator.run_record import Call, floats_in
from surgery.locator.shared_path import shared
from surgery.patterns import (
    Match,
    PortNode,
    bias_of,
    causal,
    op_name,
    origin,
    slopes,
    stretch,
    value,
    weight_of,
)
from surgery.plugin import HostPlan, Port, Site


def _below(path: str, host: str) -> str:
    """Return ``path`` relative to ``host``; a match's number, such as ``#1``, stays."""
    return path.removeprefix(host).removeprefix(".") if host else path


def pattern_site(match: Match, group: Group, call: Call, model: nn.Module) -> Site:
    """Describe one match as a site.

    Args:
        group: the host of the match, and the other matches in it.
        call: the arguments that the host was called with.
    """
    through = frozenset(_below(path, group.path) for path in group.through())
    plan = HostPlan(group.path, through, call.args, call.kwargs)
    ports = match.ports
    tensor = ports["output"].tokens
    weight = _weight(match, model)
    options: dict[str, Any] = {}
    if match.kind == "attention":
        heads = value(ports["query_heads"].node)
        options = {
            "heads": match.heads,
            "kv_heads": match.kv_heads,
            "head_width": heads.shape[-1],
            "value_width": match.value_width,
            "scale": match.scale if match.scale is not None else heads.shape[-1] ** -0.5,
            "softcap": match.softcap,
            "window": match.window,
            "stretch": stretch(value(ports["query_unrotated"].node), heads),
            "slopes": _slopes(match, call),
            "distances": distances(match, group.path, model),
            "stream": match.stream,
            "cross": _is_cross(match),
            "causal": _is_causal(match),
            "batch_first": _batch_first(match),
        }
    found = {name: _port(name, port, model) for name, port in ports.items()}
    if match.kind == "attention" and "lse" not in match.missing:
        found["lse"] = Port("lse", 1, None)
    return Site(
        path=group.path,
        key=_below(match.key, group.path),
        kind=match.kind,  # type: ignore[arg-type]
        width=tensor.shape[-1],
        dtype=weight.dtype,
        device=tensor.device,  # an offloaded weight is on this device only while its module runs
        host=plan,
        ports=found,
        missing=dict(match.missing),
        norm=_norm(match, model),
        **options,
    )


def _slopes(match: Match, call: Call) -> tuple[float, ...]:
    """Return what is added to the scores for each place, to the bits where an argument holds it."""
    names = ("scores", "query_heads", "key_heads")
    if any(name not in match.ports for name in names):
        return ()
    scores, query, key = (value(match.ports[name].node) for name in names)
    scale = match.scale if match.scale is not None else query.shape[-1] ** -0.5
    found = slopes(scores, query, key, scale)
    if not found:
        return ()
    near = torch.tensor(found, device=scores.device)
    for x in floats_in((call.args, call.kwargs)):
        if x.shape[-1] == scores.shape[-1] and x.numel() % (len(near) * x.shape[-1]) == 0:
            held = x.reshape(-1, len(near), x.shape[-1])[0, :, 1].float()
            if torch.allclose(held, near, rtol=1e-3, atol=1e-5):
                return tuple(held.tolist())
    return found


def _port(name: str, port: PortNode, model: nn.Module) -> Port:
    """Describe a port, with the names of the weight and bias that make it."""
    projection = port.projection
    if projection is None:
        return Port(name, port.width, None)
    bias = bias_of(projection, model)
    if isinstance(bias, fx.Node):
        bias = str(bias.target) if bias.op == "get_attr" else ""
    columns = None if port.features is None else tuple(port.features)
    weight, transposed = weight_of(projection, model)
    widths = port.width, projection.in_width
    return Port(
        name, *widths, weight, bias or "", transposed, module=projection.module, columns=columns
    )


def _weight(match: Match, model: nn.Module) -> Tensor:
    """Return a parameter of the site, whose dtype inserted modules follow; else its output."""
    for port in match.ports.values():
        if port.projection is not None and port.projection.module:
            module = model.get_submodule(port.projection.module)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return parameter
    output: Tensor = value(match.ports["output"].node)
    return output


def _norm(match: Match, model: nn.Module) -> str:
    """Return the path of the norm that makes a site's input; empty if no norm does.

    In a post-norm model the norm's output is the residual stream as well (it is added to the
    site's output); such a norm does not belong to the site.
    """
    if "input" not in match.ports:
        return ""
    node = origin(match.ports["input"].node)
    if node.op != "call_module" or any(op_name(user) in ("add", "iadd") for user in node.users):
        return ""
    dims = [p.dim() for p in model.get_submodule(str(node.target)).parameters()]
    return str(node.target) if dims and max(dims) == 1 else ""


def _is_cross(match: Match) -> bool:
    """Whether queries and keys are projected from two different sequences."""
    projections = [match.ports[n].projection for n in ("query", "key") if n in match.ports]
    if len(projections) < 2 or projections[0] is None or projections[1] is None:
        return False
    return projections[0].source is not projections[1].source and (
        value(projections[0].source).shape[-2] != value(projections[1].source).shape[-2]
        or not _related(projections[0].source, projections[1].source)
    )


def _related(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes read a common node, or ``b`` reads ``a``."""
    return bool(set(a.all_input_nodes) & set(b.all_input_nodes)) or a in b.all_input_nodes


def _is_causal(match: Match) -> bool:
    """Whether no query sees a later key, from the weights, the mask or the causal flag.

    An additive mask hides a key with -inf or a large negative number: below -1e4 counts as hidden.
    """
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


def _batch_first(match: Match) -> bool:
    """Whether the batch is the first axis of an attention's ports, as far as they show."""
    ports = [match.ports[name] for name in ("query", "merged", "output") if name in match.ports]
    return all(not port.sequence_first and value(port.node).dim() > 2 for port in ports)


def batches_marked(attention: list[Site], others: list[Site]) -> tuple[list[Site], list[Site]]:
    """Return the sites of a model; those near an attention whose batch is not first say so, too.

    An FFN or a norm reads what the attention beside it returns.
    """
    known = [site for site in attention if site.kind == "attention"]
    if all(site.batch_first for site in known):
        return attention, others

    def marked(site: Site) -> Site:
        near = max(known, key=lambda each: shared(each.path, site.path))
        return dataclasses.replace(site, batch_first=near.batch_first)

    return [s if s in known else marked(s) for s in attention], [marked(s) for s in others]
