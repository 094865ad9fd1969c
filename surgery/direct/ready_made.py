"""Direct edits that files can hold: they consist of tensors and numbers.

ablate        heads give nothing
transplant    the projections of a site come from another model
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.direct.port_edit import chosen_sites
from surgery.errors import SiteError
from surgery.interop import outside_inference_mode
from surgery.plugin import Port, Site, Sites, method
from surgery.splicer import Report, remove, splice, spliced_model, unused_name


def ablate(
    model: nn.Module,
    sites: Sites | Site | Sequence[Site],
    heads: int | Sequence[int],
    name: str | None = None,
) -> Report:
    """Let attention heads give nothing: what they hand to the output projection is zero.

    The splice is one of the method ``ablate``, so ``save`` and ``load`` keep it.

    Args:
        model: any model; see :func:`surgery.splice`.
        sites: one attention site, or several.
        heads: the numbers of the heads, from 0.
        name: the name of the splice; by default ``ablate``, with a number if that is taken.

    Returns:
        the report of the splice. ``surgery.remove(model, report.name)`` undoes it to the bits.

    Raises:
        MethodError: a site has no such head.
        SiteError: a site is no attention with one row of heads.

    Example:
        ``surgery.ablate(model, sites.attention[1], heads=[0, 3])``
    """
    numbers = (heads,) if isinstance(heads, int) else tuple(heads)
    made = method("ablate", heads=numbers)
    chosen = chosen_sites(sites)
    wrong = next((site for site in chosen if not made.suits(site)), None)
    if wrong is not None:
        raise SiteError(
            f"ablate: the {wrong.description} at {wrong.path or 'the model'} has no heads side by "
            "side (port 'merged'). Choose sites of locate(model).attention."
        )
    name = unused_name(spliced_model(model), "ablate") if name is None else name
    report: Report = splice(model, made, at=chosen, name=name)
    return report


@outside_inference_mode
def transplant(
    source: nn.Module,
    target: nn.Module,
    sites: Sites | Site | Sequence[Site],
    name: str | None = None,
) -> Report:
    """Let sites of one model run with the projections of another: ``y := x W' + b'``.

    Every projection of a site (query, key, value and output; up, gate and output) is replaced by
    the one that has the same name in ``source``. The weights are copied, so the source may go.
    Norms and what else a site computes stay the target's. The splice is one of the method
    ``transplant``, so ``save`` and ``load`` keep it.

    Args:
        source: the model that gives; a fine-tuned version of the target, say.
        target: the model that is spliced.
        sites: one site of the target, or several.
        name: the name of the splice; by default ``transplant``, with a number if that is taken.

    Returns:
        the report of the splice. ``surgery.remove(target, report.name)`` undoes it to the bits.

    Raises:
        SiteError: a site has no projection, or the source lacks one, or has another shape there.

    Example:
        ``surgery.transplant(tuned, model, surgery.locate(model).ffn[1])``
    """
    made = method("transplant")
    chosen = chosen_sites(sites)
    whole = spliced_model(target)
    taken = {
        s.identity: {p: _taken(source, whole, s, s.ports[p]) for p in _ports(s)} for s in chosen
    }
    name = unused_name(whole, "transplant") if name is None else name
    report: Report = splice(target, made, at=chosen, name=name)
    try:
        with torch.no_grad():
            for i in report.inserted:
                weight, bias = taken[i.site.identity][i.edit.port]
                module = whole.get_submodule(i.path)
                module.weight.copy_(weight)  # type: ignore[operator]
                if bias is not None:
                    module.bias.copy_(bias)  # type: ignore[operator]
    except BaseException:
        remove(target, name)
        raise
    report.change.update(dict.fromkeys(report.change))  # measured before the weights came
    return report


def _ports(site: Site) -> list[str]:
    """Return the ports of a site that a plain matrix makes.

    Raises:
        SiteError: there is none.
    """
    found = [n for n, p in site.ports.items() if p.weight and p.in_width and not p.stacked]
    if not found or "call" in site.ports:
        raise SiteError(
            f"transplant: the {site.description} at {site.path or 'the model'} has no projection "
            "with a plain matrix. Choose attention, FFN or linear sites."
        )
    return found


def _taken(
    source: nn.Module, target: nn.Module, site: Site, port: Port
) -> tuple[Tensor, Tensor | None]:
    """Return a copy of the source's weight (width, in_width) and bias (width,) for a port.

    Raises:
        SiteError: the source has none of that name, or of another shape.
    """
    own = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name in filter(None, (port.weight, port.bias)):
        there, here = own.get(name), target.get_parameter(name)
        if there is None or there.shape != here.shape:
            what = "has no" if there is None else f"has the shape {tuple(there.shape)} for"
            raise SiteError(
                f"transplant: {type(source).__name__} {what} {name}, which is "
                f"{tuple(here.shape)} in {type(target).__name__}. Give a model of the same "
                "architecture and sizes."
            )
    columns = slice(None) if port.columns is None else list(port.columns)
    weight = own[port.weight].detach().flatten(1)
    weight = (weight if port.transposed else weight.T)[columns]
    bias = own[port.bias].detach()[columns].clone() if port.bias else None
    return weight.clone(), bias
