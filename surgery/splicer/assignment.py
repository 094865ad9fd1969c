"""Assign methods to the sites that they suit, and explain where a method suits none."""

from __future__ import annotations

from torch import nn

from surgery.errors import SiteError
from surgery.plugin import Method, Site, Sites

_HIDDEN = (
    "; no module there is a projection: a layer of your own must hold its weights, packed or not, "
    "in parameters or buffers, and the is_leaf hook must keep it whole if it has children"
)


def assign(
    model: nn.Module, methods: tuple[Method, ...], sites: Sites
) -> dict[str, list[tuple[Method, Site]]]:
    """Return for each host the methods and the sites that they suit, in the methods' order.

    Raises:
        SiteError: a method suits none of the sites, or the sites belong to another model.
    """
    todo: dict[str, list[tuple[Method, Site]]] = {}
    for method in methods:
        suitable = method.choose(offered(method, sites))
        if not suitable:
            raise SiteError(_nowhere(method, sites))
        if type(method).named_ports is Method.named_ports:
            _require_whole(method, suitable)
        method.check(suitable)
        for site in suitable:
            if site.host is None:
                raise SiteError(f"{site.path}: this site was not made by surgery.locate.")
            todo.setdefault(site.path, []).append((method, site))
    for path in todo:
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise SiteError(
                f"{type(model).__name__} has no module {path!r}: these sites were located in "
                "another model. Call surgery.locate on this one."
            ) from error
    return todo


def _require_whole(method: Method, sites: list[Site]) -> None:
    """Raise if single ports are picked for a method that edits whole sites."""
    for site in sites:
        if site.picked:
            raise SiteError(
                f"method {method.name!r} edits whole sites, and of {site.path} the ports "
                f"{', '.join(site.picked)} alone are chosen. Choose sites by their own paths, as "
                f"with matching({site.path!r})."
            )


def without_attention(
    methods: tuple[Method, ...], sites: Sites
) -> tuple[tuple[Method, ...], Sites, list[str]]:
    """Return methods and sites for a model without attention, and lines that say what was chosen.

    A method that suits no site there may name another for FFN and linear sites
    (``Method.without_attention``). Where the model has attention, all stays as it is.
    """
    if len(sites.attention):
        return methods, sites, []
    chosen, notes = [], []
    for method in methods:
        other = method.without_attention()
        if other is None or any(map(method.suits, offered(method, sites))):
            chosen.append(method)
            continue
        sites = Sites([*sites, *sites.linear], "", sites.others, sites.overlooked)
        chosen.append(other)
        notes.append(f"no attention here: {method.name} is at the FFN and linear sites")
    return tuple(chosen), sites, notes


def offered(method: Method, sites: Sites) -> list[Site]:
    """Return the sites offered to a method: attention, FFN, and the other kinds that it names."""
    return [*sites, *(site for site in sites.others if site.kind in method.kinds)]


def left_out(method: Method, sites: Sites) -> list[str]:
    """Name the sites that lack every port that a method needs, and the single ports that lack."""
    suitable = {id(site): site.kind for site in method.choose(offered(method, sites))}
    lines = []
    for site in sites:
        named = site.picked or method.named_ports(site)
        lacking = [p for p in named if p not in site.ports or site.ports[p].in_width is None]
        if id(site) in suitable:
            lines += [f"{method.name} at {site.path}: {port}" for port in lacking]
        elif site.kind in suitable.values() or named:
            lines.append(f"{method.name} at {site.path}")
    return lines


def _nowhere(method: Method, sites: Sites) -> str:
    """Explain why a method suits none of the sites."""
    there = sorted({site.description for site in sites}) or ["there is none"]
    lacking = dict.fromkeys(f"; no {p}: {why}" for s in sites for p, why in s.missing.items())
    if method.kinds == ("attention",) and not any(s.kind == "attention" for s in sites):
        lacking = {"; there is no attention site": None}
    if method.needs:
        lacking = {f"; it needs {method.needs}": None}
    if any(s.kind == "attention" and not _reads_weights(s) for s in sites):
        lacking[_HIDDEN] = None
    if len(sites.linear):
        lacking[f"; there are {len(sites.linear)} linear sites, in locate(...).linear"] = None
    return (
        f"method {method.name!r} is for none of these {len(sites)} sites ({', '.join(there)})"
        f"{''.join(lacking)}. They have the ports {', '.join(_ports(sites))}. "
        f"Choose other sites with at=, or other options than {method!r}."
    )


def _reads_weights(site: Site) -> bool:
    """Whether a site has a projection: a port whose weight is known to be one."""
    return any(port.in_width is not None for port in site.ports.values())


def _ports(sites: Sites) -> list[str]:
    return list(dict.fromkeys(name for site in sites for name in site.ports)) or ["none"]
